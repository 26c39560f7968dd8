"""What goes up: a trained delta becomes the tensors of an update as its plan wants them, and a delta again.

`pack` runs on the client, `layout` and `unpack` on the server; all three follow the same `TrainPlan`, so that the
server knows names, shapes and dtypes before an update arrives. Pure tensors: no chance, no files, no Flower.

    density_up < 1    the entries of the factors that moved most, and their positions (`federated.sparse`)
    rank_budget > 0   the columns or rows of the trained factor that matter most (`federated.rank_selection`)
    else              the groups that are sent, whole

Dense tensors (heads, norms, biases) are always sent whole.
"""

from __future__ import annotations

from federated.alignment import turned
from federated.delta import apply_some
from federated.manifest import TensorEntry, TensorLayout, TrainPlan
from federated.rank_selection import chosen_layout, expand, select
from federated.sketches import projected, projection_layout, sketch_layout, sketched
from federated.sparse import fill, sparse_layout, split, thin
from federated.state import AdapterState, Tensors, group_of

__all__ = ["layout", "pack", "unpack"]


def layout(plan: TrainPlan, received: AdapterState) -> TensorLayout:
    """The exact tensors of an update, sorted by name: of the groups that are sent, or what stands for their factors.

    Args:
        plan: what the client is asked to do.
        received: the adapter that it is sent.
    """
    if plan.upload == "projection":
        return _sorted(projection_layout(received.spec, received.extra))
    whole = received.update_layout(plan.sent)
    dense = [entry for entry in whole if group_of(entry.name) == "dense"]
    if plan.upload == "sketch":
        return _sorted([*sketch_layout(received.spec, plan.sketch_columns), *dense])
    if plan.density_up < 1:
        shapes = {entry.name: entry.shape for entry in whole if entry not in dense}
        return _sorted([*sparse_layout(shapes, plan.density_up), *dense])
    if plan.rank_budget:
        return _sorted([*chosen_layout(received, _factor(plan), plan.rank_budget), *dense])
    return whole


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
    moved, dense = split(sent)
    if plan.density_up < 1:
        return dense | thin(moved, plan.density_up)
    if plan.rank_budget:
        return dense | select(received, _factor(plan), moved, budget=plan.rank_budget)
    if plan.upload == "delta":
        return sent
    factors = {name: tensor for name, tensor in delta.items() if group_of(name) != "dense"}
    after = apply_some(received, factors)
    if plan.upload == "projection":
        return projected(after, received.extra)
    return {**dense, **sketched(after, columns=plan.sketch_columns, seed=plan.sketch_seed)}


def unpack(plan: TrainPlan, received: AdapterState, tensors: Tensors) -> Tensors:
    """What an accumulator is given, from an update's admitted tensors: what was not sent is zero.

    Raises:
        WireError: if the tensors do not say which values they hold; nothing else, whatever they are.
    """
    if plan.density_up < 1:
        names = {entry.name: entry.shape for entry in received.update_layout(plan.sent)}
        return fill(tensors, {name: shape for name, shape in names.items() if group_of(name) != "dense"})
    if plan.rank_budget:
        return expand(received, _factor(plan), tensors)
    return tensors


def _factor(plan: TrainPlan) -> str:
    """The one factor that a plan with a rank budget sends."""
    return next(group for group in plan.sent if group != "dense")
