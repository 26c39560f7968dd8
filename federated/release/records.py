"""What is signed of a version: on its record's target, and on the target that says where a channel points.

The record is small plain data beside the target's length and hash (TUF's ``custom``). With it a device can decide
before it downloads: whether the version is for its base model, and whether it is below the security floor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from tuf.api.metadata import Targets

from federated.errors import ReleaseError, WrongContent
from federated.manifest import canonical_json
from federated.release.roles import FLOORS, check_file

__all__ = ["LARGEST", "ReleaseRecord", "floors_of", "to_floors"]

_DIGEST = re.compile(r"[0-9a-f]{64}")
_LONGEST = 200
_FLOORS = "least_release_counters"
LARGEST = 2**53
"""Release counters stay below; every JSON reader holds such numbers exactly."""


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
    """

    version_id: str
    release_counter: int
    base_digest: str
    weights_digest: str
    adapter_id: str = ""
    audit_head: str = ""
    files: tuple[str, ...] = ()

    def to_custom(self) -> dict[str, Any]:
        """Plain data for signed metadata."""
        return vars(self) | {"files": list(self.files)}

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
            names = cls.__dataclass_fields__
            record = cls(**{name: value[name] for name in names if name != "files"}, files=tuple(value["files"]))
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
