"""Per-sample gradients in the one ordinary backward pass: `federated.privacy.per_sample`'s method ``fused``.

For a linear layer the gradient of one example is ``g_i^T x_i``, with output gradients g_i (time x d_out) and inputs x_i
(time x d_in). A batched product of all of them costs what the product ``g^T x`` of their sum costs, which is then not
computed: that is all the overhead there is. Layers are not wrapped: while the context is open, a layer that owns
trained tensors has another ``forward``, whose backward keeps the gradients of single examples and gives autograd none.

    y = x W^T + b           nn.Linear, and transformers' Conv1D with y = x W + b
    y = normalised(x) w + b nn.LayerNorm; RMSNorm of any make, by a copy of w for each example
    y = s * (W x + b)       peft's IA3 layers, likewise
    y = w[ids]              nn.Embedding; each example has a whole gradient of its own, with a row for each word
    whatever a module itself says may be copied for each example (``per_sample_parameters``: a soft prompt)

Nothing is left out: a gradient that reaches a tensor by any other way ends in its ``grad``, which is looked at. Under
gradient checkpointing of both kinds the recomputed forward is the same one. Products are float32 sums under autocast.

The batch has to be the leading dimension of what every trained layer sees; another size there is refused. Source: the
per-example gradient as a product, Goodfellow, "Efficient Per-Example Gradient Computations", 2015; not computing the
summed one is our own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from federated.errors import PrivacyError
from federated.privacy.fused_layers import Kept, find_layers

__all__ = ["opened", "uncovered"]


def uncovered(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> tuple[str, ...]:
    """Names of the trained tensors that belong to a layer of no known kind, or to none."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    layers = find_layers(model, names)
    protected = {name for layer in layers for name in layer.names} - _also_elsewhere(model, names, layers)
    return tuple(name for name in parameters if name not in protected)


def _also_elsewhere(model: nn.Module, names: Mapping[int, str], layers: list[Any]) -> set[str]:
    """Names of tensors that a layer of no known kind holds as well: tied weights."""
    known = {id(owner) for layer in layers for owner in layer.owners}
    return {
        names[id(tensor)]
        for module in model.modules()
        if id(module) not in known
        for tensor in module._parameters.values()
        if id(tensor) in names
    }


class _Fused:
    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], kept: Kept) -> None:
        self._model = model
        self._parameters = parameters
        self._kept = kept

    def gradients(self, loss: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `federated.privacy.per_sample.Gradients`."""
        self._kept.start(len(next(iter(batch.values()))))
        try:
            loss(self._model, batch).sum().backward()
            self._refuse_others()
            return {name: self._kept.taken(name, parameter) for name, parameter in self._parameters.items()}
        finally:
            self._kept.start(0)

    def _refuse_others(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                parameter.grad = None
                raise PrivacyError(
                    f"{name} has an effect on the loss outside of its own layer, which is not protected; "
                    "set privacy.example.per_sample=vmap"
                )


@contextmanager
def opened(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[_Fused]:
    """Give the layers that own trained tensors their other ``forward``, and take it away again."""
    kept = Kept()
    patched: list[nn.Module] = []
    for parameter in parameters.values():
        parameter.grad = None
    try:
        for layer in find_layers(model, {id(one): name for name, one in parameters.items()}):
            patched.append(layer.module)
            layer.module.__dict__["forward"] = partial(layer.forward, kept)
        yield _Fused(model, parameters, kept)
    finally:
        for module in patched:
            module.__dict__.pop("forward", None)
