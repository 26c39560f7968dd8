"""Rows of several slots: in one batch where the backend can, else slot by slot. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from federated.device.backends.protocol import Backend, Mixes
from federated.device.records import Slot

__all__ = ["predict_each"]


def predict_each(backend: Backend, slots: Sequence[Slot], rows: Sequence[Mapping[str, Any]]) -> Sequence[Any]:
    """Each row's prediction by the slot beside it, in order; the slots are pinned by the caller."""
    if isinstance(backend, Mixes):
        return backend.predict_mixed([(slot.handle, row) for slot, row in zip(slots, rows, strict=True)])
    made: dict[int, Any] = {}
    for digest in dict.fromkeys(slot.digest for slot in slots):
        places = [at for at, slot in enumerate(slots) if slot.digest == digest]
        answers = backend.predict(slots[places[0]].handle, [rows[at] for at in places])
        made |= dict(zip(places, answers, strict=True))
    return [made[at] for at in range(len(rows))]
