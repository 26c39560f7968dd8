"""What devices hold of a version: all weights that were signed as its, got from the repository as devices get them.

A diff must start from these very bits. So nothing is computed anew: the signed files are read, checked and decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from federated.errors import ReleaseError
from federated.manifest import sha256_hex
from federated.release import shelf
from federated.release.codecs import CODECS, STEPS, decode
from federated.release.disk import translated
from federated.release.edition import Edition
from federated.release.records import ReleaseRecord
from federated.release.roles import WEIGHTS, file_name, target_path
from federated.release.transfer import digest_of_target
from federated.wire import Limits

__all__ = ["weights_on"]


def weights_on(edition: Edition, folder: Path, channel: str, record: ReleaseRecord) -> list[bytes]:
    """Weights of a version that a channel has; first those from which quantised steps go on.

    Those are where a step to it ended; else what its first lossy full file gives; else its own.

    Raises:
        NotReleased: if the channel lacks a file of it.
        ReleaseError: if a file is gone from the folder, or is another one.
    """
    own = _read(edition, folder, channel, record, WEIGHTS)
    found = {record.weights_digest: own}
    for weights in _decoded(edition, folder, channel, record, limit=len(own)):
        found.setdefault(sha256_hex(weights), weights)
    stepped = [one.weights_digest for one in record.variants if one.codec in STEPS]
    first = [*stepped, *list(found)[1:], record.weights_digest][0]
    return [found.pop(first), *found.values()]


def _decoded(edition: Edition, folder: Path, channel: str, record: ReleaseRecord, *, limit: int) -> Iterator[bytes]:
    for one in record.variants:
        if not one.source and one.codec in CODECS:
            weights = decode(_read(edition, folder, channel, record, one.file), limits=Limits(max_bytes=limit))
            if sha256_hex(weights) != one.weights_digest:
                raise ReleaseError(
                    f"{one.file} of version {record.version_id[:12]} gives other weights than were signed: publish "
                    f"without a diff from that version"
                )
            yield weights


def _read(edition: Edition, folder: Path, channel: str, record: ReleaseRecord, name: str) -> bytes:
    target = shelf.files_of(edition, channel, record)[target_path(channel, record.version_id, name)]
    path = folder / file_name(target.path, digest_of_target(target))
    with translated("read what devices hold"):
        data = path.read_bytes()
    if sha256_hex(data) != digest_of_target(target):
        raise ReleaseError(f"{path} is not what was signed; bring it back from a copy, or publish without diffs")
    return data
