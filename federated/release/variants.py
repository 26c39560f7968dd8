"""Which other ways to a version's weights are worth shipping: encode, measure what comes out, keep the smallest.

    artefact, tried = with_variants(Artefact.of(registry, "v8"), held=publisher.held("stable", v7), evaluate=loss_of)

There are two kinds: ways to the very weights, and ways to others whose measured held-out loss is within a tolerance. Of
each kind at most one full file is shipped, and one diff from each of the weights that devices hold. A lossy diff ends
at weights that a full file gives too, and that file is shipped with it. Without a measurement nothing lossy is.
Knows neither models nor keys; the loss comes from whoever calls, such as `federated.cli`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from federated.errors import ReleaseError
from federated.manifest import sha256_hex
from federated.release.artefact import Artefact
from federated.release.codecs import DIFFS, FULL, LOSSLESS, STEPS, TWINS, Encoded, encode, twin
from federated.release.records import Variant

__all__ = ["TOLERANCE", "Tried", "with_variants"]

TOLERANCE = 0.002
"""By which share of the version's held-out loss that of a lossy variant may be higher."""

_WORTH = 0.9
"""A file that saves less than a tenth is not worth its line in the signed metadata."""

Evaluate = Callable[[bytes], float]


@dataclass(frozen=True)
class Tried:
    """One encoding, and what became of it.

    Args:
        codec: its name.
        source: digest of the weights that it starts from; ``""`` for a full file.
        nbytes: of the file; 0 if the codec cannot hold the weights.
        loss: held-out loss of what comes out; None where it was not measured.
        shipped: whether it is in the artefact.
    """

    codec: str
    source: str
    nbytes: int
    loss: float | None
    shipped: bool


def with_variants(
    artefact: Artefact,
    codecs: Literal["auto"] | Sequence[str] = "auto",
    *,
    held: Sequence[bytes] = (),
    evaluate: Evaluate | None = None,
    tolerance: float = TOLERANCE,
) -> tuple[Artefact, list[Tried]]:
    """An artefact with variants.

    Args:
        artefact: without any.
        codecs: ``"auto"`` chooses; names of codecs are shipped whatever was measured, diffs from all that is held.
        held: weights that devices hold, see `Publisher.held`; quantised steps start from the first alone, so that one
            line of weights goes on from version to version.
        evaluate: held-out loss of canonical weights; None: nothing is measured, and ``"auto"`` ships nothing lossy.
        tolerance: see `TOLERANCE`; for ``"auto"``.

    Raises:
        ReleaseError: if a codec is unknown, does not fit the weights, or they are not canonical.
    """
    bench = _Bench(artefact, held, evaluate)
    if codecs == "auto":
        bench.choose(tolerance)
    else:
        bench.take(codecs)
    return bench.made(), bench.tried()


class _Bench:
    """Encodes and measures, each weights once."""

    def __init__(self, artefact: Artefact, held: Sequence[bytes], evaluate: Evaluate | None) -> None:
        own = artefact.manifest.weights_digest
        self._artefact = artefact
        self._evaluate = evaluate
        self._held = {sha256_hex(one): one for one in held if sha256_hex(one) != own}
        self._losses: dict[str, float] = {}
        self._encoded: dict[tuple[str, str], Encoded | None] = {}
        self._shipped: dict[str, Encoded] = {}
        self._loss = self._measured(own, artefact.weights)

    def choose(self, tolerance: float) -> None:
        """The smallest of each kind."""
        limit = None if self._loss is None else self._loss + abs(self._loss) * tolerance
        exact = self._best(["lossless"], "", None, len(self._artefact.weights))
        for source in self._held:
            self._best(["diff"], source, None, exact)
        if limit is None:
            return
        lossy = [one for one in FULL if one not in LOSSLESS]
        smallest = min([exact, *(len(one.data) for name in lossy if (one := self._good(name, "", limit)))])
        for number, source in enumerate(self._held):
            self._best([one for one in TWINS if number == 0 or one not in STEPS], source, limit, smallest)
        shipped = [len(one.data) for one in self._shipped.values() if not one.source]
        self._best(lossy, "", limit, min([exact, *shipped]))

    def take(self, codecs: Iterable[str]) -> None:
        """Those that were asked for."""
        for codec in codecs:
            if codec not in (*FULL, *DIFFS):
                raise ReleaseError(f"no codec {codec!r}; there are {', '.join((*FULL, *DIFFS))}")
            sources = [""] if codec in FULL else list(self._held)
            for source in sources[:1] if codec in STEPS else sources:
                self._ship(self._encode(codec, source))

    def made(self) -> Artefact:
        """The artefact with what was shipped."""
        files = {name: one.data for name, one in self._shipped.items()}
        variants = tuple(
            Variant(name, one.codec, one.result, one.source, self._losses.get(one.result))
            for name, one in self._shipped.items()
        )
        return replace(self._artefact, files={**self._artefact.files, **files}, variants=variants, loss=self._loss)

    def tried(self) -> list[Tried]:
        """All that was encoded."""
        shipped = [(one.codec, one.source, one.result) for one in self._shipped.values()]
        return [
            Tried(
                codec,
                source,
                0 if one is None else len(one.data),
                None if one is None else self._losses.get(one.result),
                one is not None and (codec, source, one.result) in shipped,
            )
            for (codec, source), one in self._encoded.items()
        ]

    def _best(self, names: Sequence[str], source: str, limit: float | None, beaten: int) -> int:
        """Ship the smallest that is good enough, if it beats a size; returns the size to beat from now on."""
        good = [one for name in names if (one := self._good(name, source, limit))]
        best = min(good, key=lambda one: len(one.data), default=None)
        if best is None or len(best.data) > _WORTH * beaten:
            return beaten
        self._ship(best)
        return len(best.data)

    def _good(self, codec: str, source: str, limit: float | None) -> Encoded | None:
        """The encoding, if the codec can hold the weights and what comes out is good enough."""
        try:
            one = self._encode(codec, source)
        except ReleaseError:  # among those tried, with no bytes
            if codec in LOSSLESS:
                raise
            self._encoded[codec, source] = None
            return None
        loss = self._losses.get(one.result)
        good = codec in LOSSLESS or (loss is not None and limit is not None and loss <= limit)
        return one if good and one.result != source else None

    def _encode(self, codec: str, source: str) -> Encoded:
        known = self._encoded.get((codec, source))
        if known is None:
            known = encode(self._artefact.weights, codec, self._held[source] if source else None)
            self._measured(known.result, known.weights)
            self._encoded[codec, source] = known
        return known

    def _ship(self, one: Encoded) -> None:
        self._shipped[f"{one.codec}.{(one.source or one.result)[:12]}.fprc"] = one
        if one.codec in TWINS:
            self._ship(twin(one, self._held[one.source]))

    def _measured(self, digest: str, weights: bytes) -> float | None:
        if self._evaluate is not None and digest not in self._losses:
            self._losses[digest] = float(self._evaluate(weights))
        return self._losses.get(digest)
