"""Per-sample gradients by Opacus: `federated.privacy.per_sample`'s method ``hooks``, and the one importer of opacus.

Its hooks go on the layers that own trained tensors, without wrapping the model, and are taken off each time. It keeps
what goes into a layer only while the layer is in training mode, so those layers are, for as long as the context is
open; none of them does anything else in that mode. It computes the summed gradient as well, which is dropped.

Of Opacus only the gradients are used: its data loader, its optimizer's generator and its accountant are not. Source:
Yousefpour et al., "Opacus: User-Friendly Differential Privacy Library in PyTorch", 2021.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from federated.errors import PrivacyError

__all__ = ["opened", "uncovered"]


def uncovered(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> tuple[str, ...]:
    """Names of the trained tensors outside of linear layers and norms, where Opacus is wrong or gives none."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    owners = {id(parameter): 0 for parameter in parameters.values()}
    strange: set[str] = set()
    for module in model.modules():
        for tensor in module._parameters.values():
            if tensor is not None and id(tensor) in names:
                owners[id(tensor)] += 1
                if not _known(module):
                    strange.add(names[id(tensor)])
    strange |= {names[key] for key, count in owners.items() if count != 1}  # in no layer, or tied
    return tuple(name for name in parameters if name in strange)


def _known(module: nn.Module) -> bool:
    kind = type(module)
    named = kind.__name__ == "Conv1D" or kind.__name__.endswith("RMSNorm")
    return (kind in (nn.Linear, nn.LayerNorm) or named) and "forward" not in module.__dict__


def _hooks(model: nn.Module) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from opacus.grad_sample import GradSampleHooks
    except ImportError:
        raise PrivacyError(
            "privacy.example.per_sample = hooks needs Opacus, which is not installed; pip install "
            "federated-peft[privacy], or set privacy.example.per_sample=auto"
        ) from None
    return GradSampleHooks(model, batch_first=True, loss_reduction="sum", strict=False)


class _Hooked:
    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._model = model
        self._parameters = parameters

    def gradients(self, loss: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `federated.privacy.per_sample.Gradients`."""
        losses = loss(self._model, batch)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            try:
                losses.sum().backward()
            except (AttributeError, ValueError, RuntimeError) as error:
                raise PrivacyError(
                    f"Opacus cannot take this model's gradients ({type(error).__name__}); set "
                    "privacy.example.per_sample=auto"
                ) from error
        return {name: self._taken(name, one, len(losses)) for name, one in self._parameters.items()}

    def _taken(self, name: str, parameter: Any, count: int) -> Tensor:
        found, total = parameter.grad_sample, parameter.grad
        parameter.grad_sample = parameter.grad = None
        wide = torch.promote_types(parameter.dtype, torch.float32)
        if found is None and total is None:
            return torch.zeros((count, *parameter.shape), dtype=wide, device=parameter.device)
        if not isinstance(found, Tensor) or len(found) != count:
            raise PrivacyError(
                f"Opacus gives no gradient of each of the {count} examples for {name}; set "
                "privacy.example.per_sample=auto"
            )
        return found.detach().to(wide)


@contextmanager
def opened(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[_Hooked]:
    """Put the hooks on, and take them and all they leave behind off again."""
    known = {id(parameter) for parameter in parameters.values()}
    layers = [one for one in model.modules() if any(id(tensor) in known for tensor in one._parameters.values())]
    modes = [layer.training for layer in layers]
    hooks = _hooks(model)
    try:
        for layer in layers:
            layer.training = True
        yield _Hooked(model, parameters)
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode
            for left in ("activations", "max_batch_len"):
                layer.__dict__.pop(left, None)
        hooks.cleanup()
