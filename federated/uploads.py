"""What goes up: a trained delta becomes the tensors of an update as its plan wants them, and a delta again.

`pack` runs on the client, `layout` and `unpack` on the server; all three follow the same `TrainPlan`, so that the
server knows names, shapes and dtypes before an update arrives. Pure tensors: no chance, no files, no Flower.
"""

from __future__ import annotations

from federated.alignment import turned
from federated.delta import apply_some
from federated.manifest import TensorEntry, TensorLayout, TrainPlan
from federated.sketches import projected, projection_layout, sketch_layout, sketched
from federated.state import AdapterState, Tensors, group_of

__all__ = ["layout", "pack", "unpack"]


def layout(plan: TrainPlan, received: AdapterState) -> TensorLayout:
    """The exact tensors of an update: float32 tensors of the groups that are sent, or sketches in place of factors.

    Args:
        plan: what the client is asked to do.
        received: the adapter that it is sent.
    """
    if plan.upload == "projection":
        return _sorted(projection_layout(received.spec, received.extra))
    if plan.upload == "sketch":
        dense = received.update_layout([group for group in plan.sent if group == "dense"])
        return _sorted([*sketch_layout(received.spec, plan.sketch_columns), *dense])
    return received.update_layout(plan.sent)


def _sorted(entries: list[TensorEntry]) -> TensorLayout:
    return tuple(sorted(entries, key=lambda entry: entry.name))


def pack(plan: TrainPlan, received: AdapterState, delta: Tensors) -> Tensors:
    """The tensors that a client sends: the groups that the plan sends, its factors turned where the plan aligns them.

    Args:
        plan: what it was asked to do.
        received: the adapter that it was sent; where the plan says ``cached``, with the factors that it holds.
        delta: ``after - before`` of all trained groups, float32; where the plan says ``cached``, of the dense ones.

    Raises:
        AggregationError: if factors are to be aligned and one of them was not trained, or if the basis of a projection
            is missing or does not fit.

    Privacy:
        What is returned is computed from private data and leaves the client.
    """
    if plan.align and plan.align_strength:
        delta = turned(received, delta, group=plan.align, strength=plan.align_strength)
    sent = {name: tensor for name, tensor in delta.items() if group_of(name) in plan.sent}
    if plan.upload == "delta":
        return sent
    factors = {name: tensor for name, tensor in delta.items() if group_of(name) != "dense"}
    after = apply_some(received, factors)
    if plan.upload == "projection":
        return projected(after, received.extra)
    dense = {name: tensor for name, tensor in sent.items() if group_of(name) == "dense"}
    return {**dense, **sketched(after, columns=plan.sketch_columns, seed=plan.sketch_seed)}


def unpack(plan: TrainPlan, received: AdapterState, tensors: Tensors) -> Tensors:  # noqa: ARG001
    """What an accumulator is given, from an update's admitted tensors."""
    return tensors
