"""Per-sample gradients by `torch.func`: `federated.privacy.per_sample`'s method ``vmap``, for all that runs under it.

The gradient function of one example, vectorised over the batch. It knows no layers, so it protects whatever is trained;
what a model does with values of tensors (a mask that is looked at) fails under it, and is refused as such. While the
context is open a transformers model computes its attention in the plain way (``eager``), which looks at no causal mask,
and an encoder is given its mask ready-made: [1, 1, time, time], added to the scores.

Every example has tensors of a whole gradient's size at once: embeddings make that large. Random numbers (dropout) are
drawn for each example.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from federated.errors import PrivacyError

__all__ = ["opened", "uncovered"]


def uncovered(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> tuple[str, ...]:
    """Names of the trained tensors that are no parameter of the model."""
    owned = {id(parameter) for parameter in model.parameters()}
    return tuple(name for name, parameter in parameters.items() if id(parameter) not in owned)


class _Lossy(nn.Module):
    """The loss of one example as a module over the model."""

    def __init__(self, model: nn.Module, loss: Any) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, example: dict[str, Tensor]) -> Tensor:
        """A scalar."""
        alone = {name: tensor.unsqueeze(0) for name, tensor in example.items()}
        made: Tensor = self._loss(self.model, alone).sum()
        return made


class _Vectorised:
    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._model = model
        paths = {id(parameter): path for path, parameter in model.named_parameters()}
        self._paths = {name: f"model.{paths[id(parameter)]}" for name, parameter in parameters.items()}
        self._parameters = parameters

    def gradients(self, loss: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `federated.privacy.per_sample.Gradients`."""
        lossy = _Lossy(self._model, loss)
        tensors = {self._paths[name]: one.detach() for name, one in self._parameters.items()}

        def of_one(values: dict[str, Tensor], example: dict[str, Tensor]) -> Tensor:
            made: Tensor = torch.func.functional_call(lossy, values, (example,))
            return made

        every = torch.func.vmap(torch.func.grad(of_one), in_dims=(None, 0), randomness="different")
        try:
            made = every(tensors, batch)
        except RuntimeError as error:
            raise PrivacyError(
                "this model or task does not run under torch.func.vmap: it looks at values, or changes tensors in "
                "place; train an adapter without embeddings, and set privacy.example.per_sample=auto"
            ) from error
        wide = {name: torch.promote_types(one.dtype, torch.float32) for name, one in self._parameters.items()}
        return {name: made[path].to(wide[name]) for name, path in self._paths.items()}


@contextmanager
def opened(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[_Vectorised]:
    """Let attention be plain for a while."""
    models = [one for one in model.modules() if hasattr(one, "config") and hasattr(one, "get_input_embeddings")]
    configs: list[Any] = list({id(one.config): one.config for one in models}.values())
    chosen = [one._attn_implementation for one in configs]
    causal = any(getattr(one, "is_causal", False) for one in model.modules())
    hooks = [] if causal else [one.register_forward_pre_hook(_ready_mask, with_kwargs=True) for one in models]
    try:
        for one in configs:
            one._attn_implementation = "eager"
        yield _Vectorised(model, parameters)
    finally:
        for one, before in zip(configs, chosen, strict=True):
            one._attn_implementation = before
        for hook in hooks:
            hook.remove()


def _ready_mask(model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:  # noqa: ARG001
    mask = named.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        hidden = (1.0 - mask[:, None, None, :].to(torch.float32)) * torch.finfo(torch.float32).min
        named = {**named, "attention_mask": hidden.expand(-1, -1, mask.shape[1], -1)}
    return inputs, named
