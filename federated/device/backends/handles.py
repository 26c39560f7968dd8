"""What the torch backend hands out for a slot. Needs torch."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from torch import nn

from federated.adapters import AdapterModel, BaseModel

__all__ = ["TorchHandle", "own_bytes", "places"]


@dataclass(frozen=True, eq=False)
class TorchHandle:
    """A module tree over the base's own tensors, for reading only.

    Args:
        model: takes a task's batch.
        adapter: what the tree was built from; None for the base alone, and where an adapter was merged.
        kind: what was done to the base.
    """

    model: nn.Module
    adapter: AdapterModel | None = None
    kind: str = "null"


def places(base: BaseModel) -> frozenset[int]:
    """Where the base's tensors are in memory."""
    return frozenset(tensor.data_ptr() for tensor in [*base.model.parameters(), *base.model.buffers()])


def own_bytes(model: nn.Module, shared: AbstractSet[int]) -> int:
    """Bytes of a tree's tensors that are not the base's."""
    own = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()] if t.data_ptr() not in shared}
    return sum(own.values())
