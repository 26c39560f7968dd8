"""Personal adapters on the device's disk: versions that are never changed, and a pointer to the one in use.

    FOLDER/NAME-DIGEST/1.safetensors, 1.json, standing.json

A version appears with its record, the pointer moves last; a kill in between leaves the old pointer. These files are the
user's own: nothing that sends, publishes or uploads reads them, and their record is no version's manifest.

Imports no torch. Called by `federated.device.personal`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from federated.device.durable import read_whole, translated, write_whole
from federated.device.records import NULL
from federated.device.routing import check_name
from federated.errors import DeviceError, WireError
from federated.manifest import AdapterSpec, RawTensor, canonical_json, sha256_hex
from federated.wire import decode_tensors, encode_tensors

__all__ = ["PersonalStore", "PersonalVersion", "Standing"]

_LOG = logging.getLogger(__name__)

_STANDING = "standing.json"


@dataclass(frozen=True)
class PersonalVersion:
    """The record of one personal adapter.

    Args:
        name: whose it is.
        number: 1-based; a name's numbers only grow.
        previous: number that it was trained from; 0: from nothing.
        weights_digest: SHA-256 of its bytes.
        base_digest: the base model.
        onto: weights digest of the global adapter that it was trained over; ``"null"`` of a whole adapter, which stands
            on the base alone.
        onto_version: version id of that one; of a whole adapter, of the global version that its training started from.
        spec: its algebra.
        metrics: what training measured.
        recipe: of a whole adapter: what to rebuild around its weights, as a version's record says it; else empty.
    """

    name: str
    number: int
    previous: int
    weights_digest: str
    base_digest: str
    onto: str
    onto_version: str
    spec: AdapterSpec
    metrics: Mapping[str, float]
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether it is a whole adapter, and not one that is stacked on a global version."""
        return self.onto == NULL


@dataclass(frozen=True)
class Standing:
    """Which personal version is in use, and where.

    Args:
        number: the version; 0: none, the global adapter answers alone.
        onto: weights digest of the global adapter that it stands on; ``"null"`` of whole adapters.
        stale: it did not pass its probe there, so the global adapter answers alone.
    """

    number: int
    onto: str
    stale: bool = False


class PersonalStore:
    """Files of personal adapters.

    Args:
        folder: made when the first one is stored, for its owner alone.
        keep: versions of each name that stay; at least 2, so that one can be rolled back.

    Raises:
        DeviceError: for a smaller ``keep``.
    """

    def __init__(self, folder: Path, *, keep: int = 4) -> None:
        if keep < 2:
            raise DeviceError(f"keep = {keep} personal versions leave nothing to roll back to; expected at least 2")
        self._folder = folder
        self._keep = keep

    def names(self) -> list[str]:
        """Whose adapters are here, sorted; a folder without a record that can be read is told in the log."""
        with translated("list the personal adapters"):
            records = [sorted(place.glob("[0-9]*.json")) for place in self._folder.glob("*")]
        return sorted(filter(None, map(self._name_in, records)))

    def holds(self, name: str) -> bool:
        """Whether anything of a name is here, damaged or not."""
        return self._place(name).exists()

    def standing(self, name: str) -> Standing | None:
        """Which version is in use; None for a name without any.

        Raises:
            DeviceError: if the file is damaged.
        """
        path = self._place(name) / _STANDING
        if read_whole(path) is None:
            return None
        told = self._json(path)
        try:
            return Standing(int(told["number"]), str(told["onto"]), bool(told["stale"]))
        except (KeyError, TypeError, ValueError):
            raise _damaged(path) from None

    def stand(self, name: str, standing: Standing) -> None:
        """Move the pointer.

        Raises:
            DeviceError: if the file system refuses; the pointer is as it was.
        """
        write_whole(self._place(name) / _STANDING, canonical_json(asdict(standing)))

    def known(self, name: str) -> Standing:
        """Which version is in use.

        Raises:
            DeviceError: for an unknown name, or if the file is damaged.
        """
        found = self.standing(name)
        if found is None:
            raise DeviceError(f"no personal adapter named {name!r} on this device, found {self.names()}")
        return found

    def before(self, name: str) -> Standing:
        """Where a rollback leads: the version before, on the same global one; 0 before the first, or one that is gone.

        Raises:
            DeviceError: for an unknown name, or if a file is damaged.
        """
        standing = self.known(name)
        number = self.get(name, standing.number)[0].previous if standing.number else 0
        if number not in self.numbers(name):
            number = 0  # pruned, or none
        return Standing(number, standing.onto, stale=standing.stale and number > 0)

    def next_number(self, name: str) -> int:
        """The number of the next version: above all that are there."""
        return max(self.numbers(name), default=0) + 1

    def put(self, version: PersonalVersion, tensors: Mapping[str, RawTensor]) -> None:
        """Store a version; the pointer stays where it is.

        Raises:
            DeviceError: if the file system refuses.
        """
        place = self._place(version.name)
        write_whole(place / f"{version.number}.safetensors", encode_tensors(tensors))
        record = asdict(version) | {"spec": dict(version.spec.plain)}
        write_whole(place / f"{version.number}.json", canonical_json(record))
        self._prune(version)

    def get(self, name: str, number: int) -> tuple[PersonalVersion, dict[str, RawTensor]]:
        """A version with its tensors, checked against its digest.

        Raises:
            DeviceError: if it is not here, or its bytes are damaged.
        """
        place = self._place(name)
        weights = read_whole(place / f"{number}.safetensors")
        if weights is None or number not in self.numbers(name):
            raise DeviceError(f"personal adapter {name!r} has no version {number}, found {self.numbers(name)}")
        version = self._record(place / f"{number}.json")
        if version.name != name or sha256_hex(weights) != version.weights_digest:
            raise _damaged(place / f"{number}.safetensors")
        try:
            return version, decode_tensors(weights)
        except WireError:
            raise _damaged(place / f"{number}.safetensors") from None

    def forget(self, name: str) -> None:
        """Delete everything of a name.

        Raises:
            DeviceError: if the file system refuses.
        """
        place = self._place(name)
        with translated(f"delete {place.name}"):
            (place / _STANDING).unlink(missing_ok=True)  # first: what is left then is in nobody's use
            if place.exists():
                shutil.rmtree(place)

    def _place(self, name: str) -> Path:
        """A name's folder: by digest, since names may differ in case alone and disks may not."""
        return self._folder / hashlib.sha256(check_name(name).encode()).hexdigest()[:32]

    def numbers(self, name: str) -> list[int]:
        """The versions of a name that are here, ascending."""
        return sorted(int(path.stem) for path in self._place(name).glob("[0-9]*.json"))

    def _prune(self, newest: PersonalVersion) -> None:
        standing = self.standing(newest.name)
        kept = {newest.number, standing.number if standing else 0}
        old = [number for number in self.numbers(newest.name) if number not in kept]
        for number in old[: max(0, len(old) + len(kept) - self._keep)]:
            for ending in ("json", "safetensors"):
                with translated("delete an old personal version"):
                    (self._place(newest.name) / f"{number}.{ending}").unlink(missing_ok=True)

    def _name_in(self, records: Sequence[Path]) -> str:
        for path in records:
            try:
                return self._record(path).name
            except DeviceError as error:
                _LOG.warning("%s", error)
        return ""

    def _record(self, path: Path) -> PersonalVersion:
        told = self._json(path)
        try:
            return PersonalVersion(**{**told, "spec": AdapterSpec.from_dict(told["spec"])})
        except (KeyError, TypeError, ValueError):
            raise _damaged(path) from None

    def _json(self, path: Path) -> dict[str, Any]:
        try:
            told = json.loads(read_whole(path) or b"")
        except (ValueError, RecursionError):
            raise _damaged(path) from None
        if not isinstance(told, dict):
            raise _damaged(path)
        return told


def _damaged(path: Path) -> DeviceError:
    return DeviceError(f"{path} is damaged; delete the personal adapter and train it again")
