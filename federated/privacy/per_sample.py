"""Gradients of single examples, by one of several methods behind one interface.

    with per_sample("auto", model, parameters) as made:
        gradients = made.gradients(task.per_sample_loss, batch)     # {name: [n, *shape]}

``fused``  our own backward for the layers that adapters train; one pass (`federated.privacy.fused`)
``hooks``  Opacus (`federated.privacy.opacus_hooks`)
``vmap``   `torch.func`, for whatever else runs under it (`federated.privacy.vectorised`)

A trainable tensor that a method cannot protect is refused by name before anything is computed; no method leaves one
out. Models are shared: they are changed only inside the context, and put back whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from federated.errors import PrivacyError
from federated.privacy import fused, opacus_hooks, vectorised

__all__ = ["BatchLoss", "Gradients", "chosen_method", "coverage", "per_sample"]

BatchLoss = Callable[[Any, dict[str, Tensor]], Tensor]
"""``(model, batch) -> losses [n]``; the loss of an example must not depend on the others of its batch."""


class Gradients(Protocol):
    """What `per_sample` gives."""

    def gradients(self, loss: BatchLoss, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The gradient of each example's own loss, by name, [n, *shape], at least float32.

        Args:
            loss: of each example.
            batch: tensors with the examples in the first dimension, n of them, at least one.

        Raises:
            PrivacyError: if a layer sees another first dimension, or a tensor has an effect that is not accounted for.

        Privacy: private; to be clipped, summed and given noise before anything leaves.
        """
        ...


_METHODS: Mapping[str, Any] = {"fused": fused, "hooks": opacus_hooks, "vmap": vectorised}


def coverage(method: str, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> tuple[str, ...]:
    """Names of the trainable tensors that a method cannot protect, sorted; empty when it covers all of them.

    Args:
        method: ``fused``, ``hooks`` or ``vmap``.
        model: owns the parameters.
        parameters: what is trained, by name.
    """
    uncovered: tuple[str, ...] = _METHODS[method].uncovered(model, parameters)
    return tuple(sorted(uncovered))


def chosen_method(method: str, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> str:
    """The method to use: the one asked for, or for ``auto`` the first that covers everything.

    Raises:
        PrivacyError: naming a tensor that it, or every one of them, cannot protect; or if something else is trainable.
    """
    wanted = list(_METHODS) if method == "auto" else [method]
    _refuse_strays(model, parameters)
    missing: tuple[str, ...] = ()
    for name in wanted:
        missing = coverage(name, model, parameters)
        if not missing:
            return name
    raise PrivacyError(
        f"{missing[0]} cannot be trained under privacy.example: privacy.example.per_sample = {method} gives no "
        f"gradient of single examples for it ({len(missing)} of {len(parameters)} trained tensors); set auto, or train "
        "an adapter that leaves it out"
    )


def _refuse_strays(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    known = {id(parameter) for parameter in parameters.values()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            raise PrivacyError(f"{name} is trainable and would not be protected; freeze it, or train it by name")


@contextmanager
def per_sample(method: str, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[Gradients]:
    """Prepare a model for gradients of single examples, and put it back afterwards.

    Args:
        method: as in ``privacy.example.per_sample``.
        model: in the mode that it is to run in.
        parameters: what is trained, by name; all of it requires a gradient.

    Raises:
        PrivacyError: if a tensor cannot be protected (see `chosen_method`), or Opacus is not installed.
    """
    chosen = chosen_method(method, model, parameters)
    opened: AbstractContextManager[Gradients] = _METHODS[chosen].opened(model, parameters)
    try:
        with opened as made:
            yield made if chosen == "vmap" else _Unambiguous(made)
    finally:
        for parameter in parameters.values():
            parameter.grad = None


class _Unambiguous:
    """Keeps a batch from being as long as its examples are.

    A layer that has time in the first dimension is known, and refused, by the number of rows that it sees. Where that
    is the number of examples by chance, its steps in time would pass for examples: such a batch is computed in parts.
    """

    def __init__(self, made: Gradients) -> None:
        self._made = made

    def gradients(self, loss: BatchLoss, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Gradients`."""
        count = len(next(iter(batch.values())))
        if count < 2 or not any(count in tensor.shape[1:] for tensor in batch.values()):
            return self._made.gradients(loss, batch)
        half = count // 2
        parts = [{name: one[part] for name, one in batch.items()} for part in (slice(half), slice(half, None))]
        found = [self._made.gradients(loss, part) for part in parts]
        return {name: torch.cat([one[name] for one in found]) for name in found[0]}
