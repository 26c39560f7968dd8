"""The ways to a version's weights on a device: which are signed, which are open to it, and which takes fewest bytes.

    diff from weights that are held -> full variant of the same weights -> the version's own full weights

Pure arithmetic on signed records; `federated.release.client` fetches, decodes and checks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from federated.errors import ReleaseError
from federated.release.codecs import CODECS, FULL
from federated.release.records import ReleaseRecord, Variant
from federated.release.roles import WEIGHTS

__all__ = ["EXACT", "PREFERENCES", "SMALLEST", "Way", "accepted", "ways_to"]

EXACT, SMALLEST = "exact", "smallest"
PREFERENCES = (EXACT, SMALLEST, *FULL)
"""The version's very weights; any that are signed as its; what the full file of that codec gives."""


@dataclass(frozen=True)
class Way:
    """One file from which weights can be got.

    Args:
        name: the codec, or ``"weights"`` for the version's own file.
        file: to be fetched.
        nbytes: of that file.
        weights_digest: of what comes out.
        source: digest of the weights that it starts from, or ``""``.
    """

    name: str
    file: str
    nbytes: int
    weights_digest: str
    source: str = ""


def accepted(record: ReleaseRecord, prefer: str) -> frozenset[str]:
    """Digests of the weights that will do; the version's own, where it has no such variant.

    Raises:
        ReleaseError: if nobody can prefer that.
    """
    if prefer not in PREFERENCES:
        raise ReleaseError(f"prefer={prefer!r}; expected one of {', '.join(PREFERENCES)}")
    if prefer == SMALLEST:
        return record.digests
    found = {one.weights_digest for one in record.variants if one.codec == prefer}
    return frozenset(found or {record.weights_digest})


def ways_to(
    record: ReleaseRecord, sizes: Mapping[str, int], digests: Collection[str], held: Collection[str]
) -> list[Way]:
    """The ways to try, one after another.

    First the one of fewest bytes. If it fails, the full files that give the same weights, then the version's own.

    Args:
        record: as it was signed.
        sizes: bytes of the version's files, as signed.
        digests: of weights that will do.
        held: digests of weights that the device holds.
    """
    own = Way("weights", WEIGHTS, sizes[WEIGHTS], record.weights_digest)
    known = [_way(one, sizes) for one in record.variants if one.codec in CODECS]
    usable = [one for one in (own, *known) if not one.source or one.source in held]
    by_size = sorted(usable, key=lambda one: one.nbytes)
    first = next(one for one in by_size if one.weights_digest in digests or one is own)
    twins = [one for one in by_size if not one.source and one.weights_digest == first.weights_digest]
    return [*(one for one in dict.fromkeys([first, *twins]) if one is not own), own]


def _way(one: Variant, sizes: Mapping[str, int]) -> Way:
    return Way(one.codec, one.file, sizes[one.file], one.weights_digest, one.source)
