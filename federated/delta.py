"""Arithmetic on named tensors: ``delta = after - before``, and adding it moves the adapter forward.

Every function makes new float32 tensors and leaves its inputs alone. Keys and shapes must agree exactly: nothing
is broadcast and nothing is matched by position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from federated.errors import AggregationError
from federated.state import AdapterState, Tensors

__all__ = ["Update", "add", "apply", "apply_some", "is_finite", "norm", "scale", "subtract"]


@dataclass(frozen=True)
class Update:
    """The message of one client, after admission.

    Args:
        client_id: stable name.
        delta: canonical name to float32 tensor, ``after - before``.
        num_examples: training examples behind it (a claim of the client).
        round_number: 1-based.
        payload_digest: SHA-256 of the payload as it arrived.
        metrics: what the client reports.
        received: the adapter that the server sent it, for rules that need ``after = received + delta``; the server's
            own object, shared among clients that were sent the same.
        steps: optimizer steps that the server's own plan takes for that many examples; not read from the message.
    """

    client_id: str
    delta: Tensors
    num_examples: int
    round_number: int = 0
    payload_digest: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    received: AdapterState | None = None
    steps: int = 1


def _check_same(left: Tensors, right: Tensors) -> None:
    if left.keys() != right.keys():
        missing, extra = sorted(left.keys() - right.keys()), sorted(right.keys() - left.keys())
        raise AggregationError(f"tensor names differ: missing {missing[:3]}, unexpected {extra[:3]}")
    for name, tensor in left.items():
        if tensor.shape != right[name].shape:
            raise AggregationError(
                f"tensor {name}: found shape {tuple(right[name].shape)}, expected {tuple(tensor.shape)}"
            )


def _zip_with(left: Tensors, right: Tensors, combine: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    _check_same(left, right)
    return {name: combine(left[name].float(), right[name].float()) for name in left}


def subtract(after: Tensors, before: Tensors) -> dict[str, Tensor]:
    """``after - before`` in float32, new tensors.

    Raises:
        AggregationError: if names or shapes differ.
    """
    return _zip_with(after, before, torch.sub)


def add(left: Tensors, right: Tensors) -> dict[str, Tensor]:
    """``left + right`` in float32, new tensors.

    Raises:
        AggregationError: if names or shapes differ.
    """
    return _zip_with(left, right, torch.add)


def scale(delta: Tensors, factor: float) -> dict[str, Tensor]:
    """``factor * delta`` in float32, new tensors."""
    return {name: tensor.float() * factor for name, tensor in delta.items()}


def apply(state: AdapterState, delta: Tensors) -> AdapterState:
    """``state + delta`` in float32: moves an adapter forward; its residual is shared.

    Raises:
        AggregationError: if names or shapes differ.
    """
    return replace(state, tensors=add(state.tensors, delta))


def apply_some(state: AdapterState, delta: Tensors) -> AdapterState:
    """`apply` for a delta of some of the tensors; the others stay as they are, in their own dtype, and are shared.

    Raises:
        AggregationError: if the delta has a name that the adapter has not, or another shape.
    """
    part = {name: state.tensors[name] for name in delta if name in state.tensors}
    return replace(state, tensors={**state.tensors, **add(part, delta)})


def norm(delta: Tensors) -> float:
    """L2 norm over all tensors together, in adapter units, summed in float64; 0.0 for an empty delta."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in delta.values()))


def is_finite(delta: Tensors) -> bool:
    """Whether no tensor holds a NaN or an infinity."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in delta.values())
