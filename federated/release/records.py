"""What is signed of a version: on its record's target, and on the target that says where a channel points.

The record is small plain data beside the target's length and hash (TUF's ``custom``). With it a device can decide
before it downloads: whether the version is for its base model, and whether it is below the security floor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from tuf.api.metadata import Targets

from federated.errors import ReleaseError, WrongContent
from federated.manifest import canonical_json
from federated.release.roles import FLOORS, check_file

__all__ = ["LARGEST", "ReleaseRecord", "Variant", "check_variants", "floors_of", "to_floors"]

_CODEC = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LONGEST, _MOST_VARIANTS = 200, 64
_FLOORS = "least_release_counters"
LARGEST = 2**53
"""Release counters stay below; every JSON reader holds such numbers exactly."""


@dataclass(frozen=True)
class Variant:
    """Another way to get weights of a version: fewer bytes, and what comes out of them is signed too.

    Args:
        file: one of the version's files; its length and hash are signed where all files' are.
        codec: how to read it; see `federated.release.codecs`.
        weights_digest: of the canonical weights that come out: the version's own, or others that are nearly as good.
        source: digest of the weights that it starts from, if it is a diff; ``""`` for a full file.
        loss: held-out loss of what comes out, as the publisher measured it; None where nobody did.
    """

    file: str
    codec: str
    weights_digest: str
    source: str = ""
    loss: float | None = None

    def to_custom(self) -> dict[str, Any]:
        """Plain data for signed metadata, which know no fractions: a loss is text of six digits."""
        return {name: value for name, value in (asdict(self) | {"loss": _told(self.loss)}).items() if value}

    @classmethod
    def from_custom(cls, value: Any) -> Self:
        """Read what `to_custom` wrote; keys of a newer library are passed over.

        Raises:
            KeyError, TypeError, ValueError: if it is none.
        """
        names = (value["file"], value["codec"], value["weights_digest"], value.get("source", ""))
        return cls(*names, loss=_loss(value.get("loss", "")))


@dataclass(frozen=True)
class ReleaseRecord:
    """One version as it was released.

    Args:
        version_id: digest of the manifest.
        release_counter: grows by each new version of an adapter, whatever its channel; a security floor is one of
            these numbers.
        base_digest: of the base model that it is for.
        weights_digest: of the reconstructed weights, however they travel.
        adapter_id: which adapter this is a version of.
        audit_head: the registry's audit log at that time, as it was given; ``""`` where there was none.
        files: what else the version has (variants, diffs, exports), sorted.
        variants: those of the files that are weights on another way. A diff among them ends at the version's own
            weights, or at those that a full variant gives too.
        loss: held-out loss of the weights, as the publisher measured it.
    """

    version_id: str
    release_counter: int
    base_digest: str
    weights_digest: str
    adapter_id: str = ""
    audit_head: str = ""
    files: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = ()
    loss: float | None = None

    @property
    def digests(self) -> frozenset[str]:
        """Of all weights that are signed as this version's."""
        return frozenset({self.weights_digest, *(one.weights_digest for one in self.variants)})

    def to_custom(self) -> dict[str, Any]:
        """Plain data for signed metadata."""
        plain = {name: value for name, value in vars(self).items() if name not in ("files", "variants", "loss")}
        later = {"variants": [one.to_custom() for one in self.variants], "loss": _told(self.loss)}
        return plain | {"files": list(self.files)} | {name: value for name, value in later.items() if value}

    def to_bytes(self) -> bytes:
        """The same as a file."""
        return canonical_json(self.to_custom())

    @classmethod
    def from_custom(cls, value: Any, where: str) -> Self:
        """Read what `to_custom` wrote; keys of a newer library are passed over.

        Args:
            value: from signed metadata, so whoever holds the channel's keys wrote it.
            where: for messages.

        Raises:
            WrongContent: if it is no record.
        """
        try:
            plain = [name for name in cls.__dataclass_fields__ if name not in ("files", "variants", "loss")]
            record = cls(
                **{name: value[name] for name in plain},
                files=tuple(value["files"]),
                variants=tuple(map(Variant.from_custom, value.get("variants", ()))),
                loss=_loss(value.get("loss", "")),
            )
            record._check()
        except (KeyError, TypeError, ValueError, AttributeError, ReleaseError) as error:
            raise WrongContent(f"what is signed for {where} is no record of a release ({error})") from error
        return record

    def _check(self) -> None:
        for name in ("version_id", "weights_digest"):
            if not _DIGEST.fullmatch(getattr(self, name)):
                raise ValueError(f"{name} is no SHA-256")
        if type(self.release_counter) is not int or not 0 < self.release_counter < LARGEST:
            raise ValueError(f"release_counter is {self.release_counter!r}")
        for name in ("base_digest", "adapter_id", "audit_head"):
            text = getattr(self, name)
            if not (len(text) <= _LONGEST and text.isprintable()):
                raise ValueError(f"{name} is not printable, or too long")
        for file in self.files:
            check_file(file)
        check_variants(self.variants, self.files, self.weights_digest)


def check_variants(variants: Sequence[Variant], files: Collection[str], weights_digest: str) -> None:
    """Check that variants are files of a version, and that each diff ends where a full file does.

    Args:
        variants: of the version.
        files: names of its files.
        weights_digest: of its own weights.

    Raises:
        ValueError: if they do not.
        TypeError: if a part is of another type.
    """
    if len(variants) > _MOST_VARIANTS or len({one.file for one in variants}) < len(variants):
        raise ValueError(f"{len(variants)} variants; expected at most {_MOST_VARIANTS}, each a file of its own")
    full = {weights_digest, *(one.weights_digest for one in variants if not one.source)}
    for one in variants:
        if one.file not in files:
            raise ValueError(f"variant {one.file!r} is no file of the version")
        if not (_CODEC.fullmatch(one.codec) and _DIGEST.fullmatch(one.weights_digest)):
            raise ValueError(f"variant {one.file} has codec {one.codec!r} and weights {one.weights_digest!r}")
        if one.source and not _DIGEST.fullmatch(one.source):
            raise ValueError(f"variant {one.file} starts from {one.source!r}; expected a SHA-256")
        if one.weights_digest not in full:
            raise ValueError(f"variant {one.file} ends at weights that no full file gives")


def _told(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.6g}"


def _loss(text: str) -> float | None:
    if not text:
        return None
    value = float(text)
    if len(text) > _LONGEST or not math.isfinite(value):
        raise ValueError(f"a loss is {text[:20]!r}")
    return value


def floors_of(targets: Targets) -> dict[str, int]:
    """The least release counter of each adapter that has one, as the top-level targets sign them.

    Raises:
        WrongContent: if they do not.
    """
    signed = targets.targets.get(FLOORS)
    custom = None if signed is None else signed.custom
    floors = custom.get(_FLOORS) if isinstance(custom, Mapping) else None
    if not isinstance(floors, Mapping) or not all(map(_is_floor, floors, floors.values())):
        raise WrongContent(f"the signed security floors are {floors!r}; expected a release counter for each adapter")
    return dict(floors)


def to_floors(floors: Mapping[str, int]) -> dict[str, Any]:
    """What `floors_of` reads, for the target's ``custom``."""
    return {_FLOORS: dict(floors)}


def _is_floor(adapter_id: Any, least: Any) -> bool:
    return isinstance(adapter_id, str) and type(least) is int and 0 <= least < LARGEST
