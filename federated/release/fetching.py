"""A version's weights on a device by the smallest way that works: fetch, decode, check, and say which way it was.

Each step back to a larger file is told in a warning and in the outcome. What is written is either weights that are
signed as this version's, or nothing. Called by `federated.release.client`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from federated.errors import MissingFile, ReleaseError, Unreachable, WrongContent
from federated.manifest import sha256_hex
from federated.release.codecs import decode
from federated.release.disk import translated, write_file
from federated.release.records import ReleaseRecord
from federated.release.roles import WEIGHTS
from federated.release.ways import Way
from federated.wire import Limits

__all__ = ["Fetched", "fetched", "held_in", "kept_name"]

_LOG = logging.getLogger(__name__)

Fetch = Callable[[str], Path]
"""Brings a file of the version here, checked, and says where it is."""


@dataclass(frozen=True)
class Fetched:
    """Weights, and how they came.

    Args:
        path: of the canonical weights.
        weights_digest: of them.
        way: the codec, ``"weights"`` for the full file, ``"held"`` if they were here.
        setbacks: what was tried before and why it failed.
    """

    path: Path
    weights_digest: str
    way: str
    setbacks: tuple[str, ...] = ()


def kept_name(record: ReleaseRecord, digest: str) -> str:
    """The file, beside a version's others, in which weights are kept."""
    return WEIGHTS if digest == record.weights_digest else f"{digest[:12]}.{WEIGHTS}"


def held_in(paths: Iterable[Path], limit: int) -> dict[str, Path]:
    """Weights files on this device, by their digests; what is not there, or too large, is told and passed over.

    Args:
        paths: of canonical weights.
        limit: bytes of one.
    """
    found: dict[str, Path] = {}
    for path in paths:
        try:
            if path.stat().st_size <= limit:
                found[sha256_hex(path.read_bytes())] = path
            else:
                _LOG.warning("weights that are said to be held are too large: %s; no diff can start from them", path)
        except OSError as error:
            _LOG.warning("weights that are said to be held cannot be read: %s (%s)", path, error.strerror)
    return found


def fetched(
    ways: Iterable[Way], fetch: Fetch, keep: Callable[[str], Path], *, held: Mapping[str, Path], limit: int
) -> Fetched:
    """Try ways until one gives the weights.

    Args:
        ways: the smallest first, the version's own full weights last.
        fetch: brings a file here.
        keep: where weights with a digest are to be kept.
        held: as `held_in` gives it.
        limit: bytes of the weights, as signed.

    Raises:
        Unreachable: if the source stops answering: a larger file would not come either.
        ReleaseError: if the last way fails.
    """
    setbacks: list[str] = []
    *shortcuts, last = ways
    for way in shortcuts:
        try:
            return Fetched(_take(way, fetch, keep, held, limit), way.weights_digest, way.name, tuple(setbacks))
        except ReleaseError as error:
            if isinstance(error, Unreachable) and not isinstance(error, MissingFile):
                raise
            setbacks.append(f"{way.name}: {error}")
            _LOG.warning("%s does not give the weights, so a larger file is fetched (%s)", way.file, error)
    return Fetched(fetch(last.file), last.weights_digest, last.name, tuple(setbacks))


def _take(way: Way, fetch: Fetch, keep: Callable[[str], Path], held: Mapping[str, Path], limit: int) -> Path:
    """Weights by one way that is not the full file; the encoded file is not kept."""
    encoded, path = fetch(way.file), keep(way.weights_digest)
    with translated(f"decode {way.file}"):
        source = held[way.source].read_bytes() if way.source else None
        weights = decode(encoded.read_bytes(), source, limits=Limits(max_bytes=limit))
        if sha256_hex(weights) != way.weights_digest:
            raise WrongContent(
                f"{way.file} gives weights with SHA-256 {sha256_hex(weights)}, signed are {way.weights_digest}; tell "
                f"the publisher"
            )
        write_file(path, weights)
        encoded.unlink(missing_ok=True)
    return path
