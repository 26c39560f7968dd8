"""Against client drift: what a client adds to each of its gradients, and what it remembers for the next time.

A client follows ``grad + mu (w - w_received) + shift`` with a constant ``shift`` (`federated.training`;
``train.max_grad_norm`` bounds the sum). Both methods here are one such shift, made from what the server sends and what
the client kept; ``d = w_after - w_received``.

SCAFFOLD (Karimireddy et al. 2020, option II). The paper keeps mean gradients, c of the server and c_i of the client:

    shift = c - c_i,    c_i <- c_i - c - d / (K eta)            after K steps of size eta

Here both are kept as mean moves per step, ``v = -eta c``, so that the server needs to know no step size:

    shift = (v_i - v) / eta,    v_i <- v_i - v + d / K

A client that has none yet takes ``v`` for its own: its first training is plain. (The paper starts at zero, and counts
all clients of the federation in the server's mean; ours counts those that have taken part. With all clients in the
first round the two are the same.)

FedDyn (Acar et al. 2021). The paper keeps the gradient g_i at the client's last optimum; here it is kept as the sum of
the client's own moves, ``g_i = -alpha m_i``, and ``mu = alpha``:

    shift = alpha m_i,    m_i <- m_i + d                        m_i starts at zero

Pure tensors. `federated.flower.client_steering` keeps the memory on the client's disk.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from federated.errors import WireError
from federated.manifest import TrainPlan
from federated.state import AdapterState, Tensors, group_of

__all__ = ["SHIFT", "VARIATE", "memory_before", "memory_after", "shift_of"]

VARIATE = "variate:"
"""Prefix of the server's control variate among an adapter's extra tensors."""

SHIFT = "shift:"
"""Prefix of what a client adds to its gradients; never travels."""


def memory_before(plan: TrainPlan, received: AdapterState, kept: Tensors | None) -> dict[str, Tensor]:
    """What the client remembers when it begins, float32, for every tensor that the plan trains.

    Args:
        plan: names the method.
        received: with the server's variate, under SCAFFOLD.
        kept: from its last update that the server took; None where there is none.

    Raises:
        WireError: if the server's variate is missing, or of other shapes than the adapter.
    """
    trained = {name: tensor for name, tensor in received.tensors.items() if group_of(name) in plan.trainable}
    begins = _variate(received, trained) if plan.correction == "scaffold" else _zeros(trained)
    return dict(begins if kept is None else kept)


def shift_of(plan: TrainPlan, received: AdapterState, memory: Tensors, *, learning_rate: float) -> dict[str, Tensor]:
    """What is added to each gradient, float32.

    Args:
        plan: names the method.
        received: with the server's variate, under SCAFFOLD.
        memory: from `memory_before`.
        learning_rate: the client's constant step size.
    """
    if plan.correction == "scaffold":
        variate = _variate(received, memory)
        return {name: (own - variate[name]) / learning_rate for name, own in memory.items()}
    return {name: plan.proximal_mu * own for name, own in memory.items()}


def memory_after(
    plan: TrainPlan, received: AdapterState, memory: Tensors, *, delta: Tensors, steps: int
) -> dict[str, Tensor]:
    """What the client remembers from now on, if the server takes its update; new float32 tensors.

    Args:
        plan: names the method.
        received: with the server's variate, under SCAFFOLD.
        memory: from `memory_before`.
        delta: how far it moved.
        steps: in how many optimizer steps.
    """
    if plan.correction == "scaffold":
        variate = _variate(received, memory)
        return {name: own - variate[name] + delta[name] / steps for name, own in memory.items()}
    return {name: own + delta[name] for name, own in memory.items()}


def _variate(received: AdapterState, like: Tensors) -> Mapping[str, Tensor]:
    found = {name.removeprefix(VARIATE): one for name, one in received.extra.items() if name.startswith(VARIATE)}
    variate = {name: found[name] for name in like if name in found}
    if {name: one.shape for name, one in variate.items()} != {name: one.shape for name, one in like.items()}:
        raise WireError("the server's control variate is missing, or is not that of this adapter")
    return variate


def _zeros(like: Tensors) -> dict[str, Tensor]:
    return {name: torch.zeros(tensor.shape) for name, tensor in like.items()}
