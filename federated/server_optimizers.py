"""Server optimizers: how the global adapter moves along the pseudo-gradient ``g = -mean_delta``.

    sgd       x <- x - lr * g
    momentum  v <- mu * v + g;                                        x <- x - lr * v
    adagrad   m <- b1 * m + (1 - b1) * g;  v <- v + g^2;              x <- x - lr * m / (sqrt(v) + tau)
    yogi      m as above;  v <- v - (1 - b2) * g^2 * sign(v - g^2);   x as above
    adam      m as above;  v <- b2 * v + (1 - b2) * g^2;              x as above

Source: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, Algorithm 2: no bias correction, and v starts
at tau^2. ``momentum`` is FedAvgM (Hsu et al. 2019). With ``sgd`` and learning rate 1 the step is plain averaging.

All arithmetic is float64 on explicit state; the adapter is rounded to float32 once per step. Pure functions: no
hidden attributes, no global random numbers. `federated.flower` calls `step` once per round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from federated.config import ServerOptimizerConfig
from federated.errors import AggregationError
from federated.state import AdapterState, Tensors

__all__ = ["OptimizerState", "init", "step"]

_SLOTS: Mapping[str, tuple[str, ...]] = {
    "sgd": (),
    "momentum": ("v",),
    "adam": ("m", "v"),
    "yogi": ("m", "v"),
    "adagrad": ("m", "v"),
}


@dataclass(frozen=True)
class OptimizerState:
    """Moments by name (``"m/<tensor>"``, ``"v/<tensor>"``, float64), the number of steps, and the optimizer's name."""

    steps: int = 0
    moments: Tensors = field(default_factory=dict)
    name: str = "sgd"


def init(config: ServerOptimizerConfig, adapter: AdapterState) -> OptimizerState:
    """State before the first step: zero first moments, second moments at ``tau^2`` for the adaptive ones."""
    moments: dict[str, Tensor] = {}
    for slot in _SLOTS[config.name]:
        adaptive = slot == "v" and config.name != "momentum"
        start = config.tau**2 if adaptive else 0.0
        for name, tensor in adapter.tensors.items():
            moments[f"{slot}/{name}"] = torch.full(tensor.shape, start, dtype=torch.float64)
    return OptimizerState(0, moments, config.name)


def step(
    config: ServerOptimizerConfig, state: OptimizerState, adapter: AdapterState, *, pseudo_gradient: Tensors
) -> tuple[AdapterState, OptimizerState]:
    """Move the adapter one step.

    Args:
        config: which optimizer and its numbers.
        state: moments from `init` or the step before; untouched.
        adapter: float32 tensors; untouched.
        pseudo_gradient: ``-mean_delta``, float64, with the adapter's names and shapes; a tensor that is not in it was
            not trained in this round, and neither it nor its moments move.

    Returns:
        The new adapter (float32, new tensors) and the new state.

    Raises:
        AggregationError: if names or shapes differ, or the state belongs to another optimizer or adapter.
    """
    _check(config, state, adapter, pseudo_gradient)
    tensors, moments = dict(adapter.tensors), dict(state.moments)
    for name in pseudo_gradient:
        tensor = adapter.tensors[name]
        old = {slot: state.moments[f"{slot}/{name}"] for slot in _SLOTS[config.name]}
        direction, new = _direction(config, pseudo_gradient[name].double(), old)
        tensors[name] = (tensor.double() - config.learning_rate * direction).float()
        moments |= {f"{slot}/{name}": moment for slot, moment in new.items()}
    return AdapterState(adapter.spec, tensors), OptimizerState(state.steps + 1, moments, config.name)


def _check(config: ServerOptimizerConfig, state: OptimizerState, adapter: AdapterState, gradient: Tensors) -> None:
    shapes = {name: tensor.shape for name, tensor in adapter.tensors.items()}
    given = {name: tensor.shape for name, tensor in gradient.items()}
    if not given or not given.items() <= shapes.items():
        raise AggregationError("the pseudo-gradient does not have the adapter's names and shapes")
    expected = {f"{slot}/{name}": shape for slot in _SLOTS[config.name] for name, shape in shapes.items()}
    if state.name != config.name or {name: tensor.shape for name, tensor in state.moments.items()} != expected:
        found = f"the optimizer state was made by {state.name}, not by {config.name} for this adapter"
        raise AggregationError(f"{found}; start a new run")


def _direction(
    config: ServerOptimizerConfig, gradient: Tensor, old: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    if config.name == "sgd":
        return gradient, {}
    if config.name == "momentum":
        velocity = config.momentum * old["v"] + gradient
        return velocity, {"v": velocity}
    first = config.beta1 * old["m"] + (1 - config.beta1) * gradient
    second = _second_moment(config, gradient.square(), old["v"])
    return first / (second.sqrt() + config.tau), {"m": first, "v": second}


def _second_moment(config: ServerOptimizerConfig, square: Tensor, old: Tensor) -> Tensor:
    if config.name == "adagrad":
        return old + square
    if config.name == "yogi":
        return old - (1 - config.beta2) * square * torch.sign(old - square)
    return config.beta2 * old + (1 - config.beta2) * square
