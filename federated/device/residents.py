"""Which slots are in memory, who holds them, and which one goes when there are too many.

A structure without a lock of its own: `federated.device.slots` calls it under its lock. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from federated.device.records import NULL, Slot
from federated.errors import DeviceError

__all__ = ["Limits", "Residents"]


@dataclass(frozen=True)
class Limits:
    """What may be resident besides the null adapter.

    Args:
        slots: how many adapters.
        nbytes: how much memory they cost together; None: any.

    Raises:
        DeviceError: for a limit that lets nothing in.
    """

    slots: int = 4
    nbytes: int | None = None

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise DeviceError(f"a runtime with room for {self.slots} adapters cannot serve; expected capacity >= 1")
        if self.nbytes is not None and self.nbytes < 1:
            raise DeviceError(f"a runtime with {self.nbytes} bytes for adapters cannot serve; expected at least 1")


class Residents:
    """Slots by name, the least recently used first, with the pins on them.

    Args:
        null: always there, never counted.
        limits: beyond them the least recently used go.
    """

    def __init__(self, null: Slot, limits: Limits) -> None:
        self.null = null
        self.limits = limits
        self.pins: Counter[str] = Counter()
        self._slots: dict[str, Slot] = {}

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots.values())

    def get(self, digest: str) -> Slot | None:
        """The slot of that name, or None."""
        return self.null if digest == NULL else self._slots.get(digest)

    def find(self, digest: str) -> Slot:
        """The slot of that name.

        Raises:
            DeviceError: if it is not resident; resident ones are named.
        """
        slot = self.get(digest)
        if slot is None:
            resident = ", ".join([NULL, *(name[:12] for name in self._slots)])
            raise DeviceError(f"no slot {digest[:12]!r} on this device, found {resident}: install the version first")
        return slot

    def put(self, slot: Slot) -> None:
        """Add a slot, or replace the one of its name, as the most recently used."""
        self._slots.pop(slot.digest, None)
        self._slots[slot.digest] = slot

    def hold(self, slot: Slot) -> None:
        """Pin a slot once, and make it the most recently used."""
        self.pins[slot.digest] += 1
        if slot.digest in self._slots:
            self._slots[slot.digest] = self._slots.pop(slot.digest)

    def release(self, digest: str) -> bool:
        """Take one pin off; whether it was the last."""
        self.pins[digest] -= 1
        if self.pins[digest]:
            return False
        del self.pins[digest]
        return True

    @property
    def nbytes(self) -> int:
        """What all resident adapters cost."""
        return sum(slot.nbytes for slot in self._slots.values())

    def evict(self, kept: Collection[str]) -> set[str]:
        """Drop the least recently used until the limits hold; never a pinned one, nor one of ``kept``.

        Returns:
            Names of what went.
        """
        gone: set[str] = set()
        for digest in [name for name in self._slots if name not in kept and name not in self.pins]:
            if self._fits():
                break
            del self._slots[digest]
            gone.add(digest)
        return gone

    def _fits(self) -> bool:
        most = self.limits.nbytes
        return len(self._slots) <= self.limits.slots and (most is None or self.nbytes <= most)
