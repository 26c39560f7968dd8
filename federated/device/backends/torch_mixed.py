"""One forward pass of the base for rows of several adapters.

A tree over the base's own tensors is built once, in which every layer that LoRA can go on looks up, for each forward,
which rows get which factors. The base's layers see the whole batch; each adapter's factors see its own rows alone.
Heads follow behind the shared features, one for each adapter. Nothing in the tree is written after it is built: what a
forward pass needs comes in a context variable of its thread.

Called by `federated.device.backends.torch`. Only LoRA (with or without a core), trained heads alone and the null
adapter mix; other kinds change the base's own layers or inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from federated.adapters import BaseModel, Branch, share
from federated.adapters.heads import MeanPoolClassifier, backbone_path, mean_pooled
from federated.adapters.targets import adaptable
from federated.device.backends.handles import TorchHandle

__all__ = ["MixedTree", "can_mix"]

_KINDS = ("null", "lora", "lora_xs", "head")


@dataclass(frozen=True)
class _Share:
    """The rows ``start`` to ``stop`` of a batch, and the factors that they get in each layer."""

    start: int
    stop: int
    branches: Mapping[str, Branch]


_SHARES: ContextVar[Sequence[_Share]] = ContextVar("shares", default=())


def can_mix(handle: TorchHandle) -> bool:
    """Whether a handle's rows may share a batch with others'."""
    return handle.kind in _KINDS and isinstance(handle.model, MeanPoolClassifier)


class _MixedLayer(nn.Module):
    """A layer of the base, with each row's own factors beside it."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        self.layer = layer
        self.name = name

    def forward(self, inputs: Tensor) -> Tensor:
        """``layer(x) + scaling * up(down(x))`` for the rows of each share."""
        result: Tensor = self.layer(inputs)
        parts = [(one, one.branches[self.name]) for one in _SHARES.get() if self.name in one.branches]
        if not parts:
            return result
        dtype = result.dtype
        made = result.float() if dtype != torch.float32 else result.clone()
        for one, branch in parts:
            made[one.start : one.stop] += branch.update(inputs[one.start : one.stop])
        return made.to(dtype)


class MixedTree:
    """The base with a place for factors in every layer, and the heads of its handles.

    Args:
        base: shared, frozen.
    """

    def __init__(self, base: BaseModel) -> None:
        tree = share(base).eval()
        for name in adaptable(base.model):
            parent, _, last = name.rpartition(".")
            tree.get_submodule(parent)._modules[last] = _MixedLayer(tree.get_submodule(name), name)
        backbone: Any = tree.get_submodule(backbone_path(base))
        if hasattr(backbone, "config"):
            backbone.config.use_cache = False  # a decoder would keep keys and values that no classifier reads
        self._backbone: nn.Module = backbone

    def classifier(self, handles: Sequence[TorchHandle]) -> nn.Module:
        """A model for one request: its first batch's rows belong to the first handles, and so on.

        Args:
            handles: one for each row, equal ones side by side.
        """
        return _Classifier(self._backbone, handles)


class _Classifier(nn.Module):
    """Logits of rows of several handles; lives for one request."""

    def __init__(self, backbone: nn.Module, handles: Sequence[TorchHandle]) -> None:
        super().__init__()
        self._handles = handles
        self._done = 0
        self.backbone = backbone

    def forward(self, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Logits [batch, num_labels] of the next rows."""
        handles = self._handles[self._done : self._done + len(attention_mask)]
        self._done += len(handles)
        runs = list(_runs(handles))
        token = _SHARES.set([_Share(start, stop, _branches(one)) for one, start, stop in runs])
        try:
            pooled = mean_pooled(self.backbone(attention_mask=attention_mask, **inputs), attention_mask)
        finally:
            _SHARES.reset(token)
        return torch.cat([_classify(one, pooled)[start:stop] for one, start, stop in runs])


def _runs(handles: Sequence[TorchHandle]) -> Iterator[tuple[TorchHandle, int, int]]:
    start = 0
    for at in range(1, len(handles) + 1):
        if at == len(handles) or handles[at] is not handles[start]:
            yield handles[start], start, at
            start = at


def _branches(handle: TorchHandle) -> Mapping[str, Branch]:
    return {} if handle.adapter is None else handle.adapter.branches


def _classify(handle: TorchHandle, pooled: Tensor) -> Tensor:
    """By the handle's own head. It is given the whole batch: equal shapes round alike whatever rows are whose."""
    model: Any = handle.model
    logits: Tensor = model.classify(pooled)
    return logits
