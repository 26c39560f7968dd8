"""What goes up: a trained delta becomes the tensors of an update as its plan wants them, and a delta again.

`pack` runs on the client, `layout` and `unpack` on the server; all three follow the same `TrainPlan`, so that the
server knows names, shapes and dtypes before an update arrives. Pure tensors: no chance, no files, no Flower.
"""

from __future__ import annotations

from federated.alignment import turned
from federated.manifest import TensorLayout, TrainPlan
from federated.state import AdapterState, Tensors, group_of

__all__ = ["layout", "pack", "unpack"]


def layout(plan: TrainPlan, received: AdapterState) -> TensorLayout:
    """The exact tensors of an update: float32 tensors of the groups that are sent.

    Args:
        plan: what the client is asked to do.
        received: the adapter that it is sent.
    """
    return received.update_layout(plan.sent)


def pack(plan: TrainPlan, received: AdapterState, delta: Tensors) -> Tensors:
    """The tensors that a client sends: the groups that the plan sends, its factors turned where the plan aligns them.

    Args:
        plan: what it was asked to do.
        received: the adapter that it was sent.
        delta: ``after - before`` of all trained groups, float32.

    Raises:
        AggregationError: if factors are to be aligned and one of them was not trained.

    Privacy:
        What is returned is computed from private data and leaves the client.
    """
    if plan.align and plan.align_strength:
        delta = turned(received, delta, group=plan.align, strength=plan.align_strength)
    return {name: tensor for name, tensor in delta.items() if group_of(name) in plan.sent}


def unpack(plan: TrainPlan, received: AdapterState, tensors: Tensors) -> Tensors:  # noqa: ARG001
    """What an accumulator is given, from an update's admitted tensors."""
    return tensors
