"""Where an adapter's layers and head are in the model that peft loads it into.

That host is, for language models, the base itself; for a stock head, the architecture's own classifier; for a
mean-pooled head, a `MeanPoolClassifier` around the backbone. Places are found by identity in a tree that is built here,
so that no architecture's prefixes need to be known. Used where PEFT folders are written and read; peft is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from federated.adapters.base import BaseModel
from federated.adapters.heads import build_head
from federated.adapters.model import share
from federated.adapters.targets import adaptable
from federated.manifest import HeadSpec

__all__ = ["PeftHost", "host_of"]


@dataclass(frozen=True)
class PeftHost:
    """The host's places.

    Args:
        layers: each adaptable layer's path in the base model, and in the host.
        head: each head tensor's canonical name, and its path in the host.
        start: the head's tensors as they start from its seed, by canonical name; no copies of anything in use.
        modules_to_save: the host's modules that hold the head.
        modules: every module's path in the host.
    """

    layers: Mapping[str, str]
    head: Mapping[str, str]
    start: Mapping[str, torch.Tensor]
    modules_to_save: tuple[str, ...]
    modules: tuple[str, ...]

    def targets(self, layers: set[str]) -> list[str]:
        """What peft calls the layers at these base paths: last names where these mean the same, else whole paths."""
        paths = {self.layers[name] for name in layers}
        endings = {path.rpartition(".")[2] for path in paths}
        meant = {path for path in self.modules if path.rpartition(".")[2] in endings}
        return sorted(endings if meant == paths else paths)


def host_of(base: BaseModel, head: HeadSpec | None) -> PeftHost:
    """The host of a base and a head.

    Raises:
        ModelError: if the base cannot have that head.
    """
    tree = share(base)
    model, parameters = (tree, {}) if head is None else build_head(base, tree, head)
    host: nn.Module = getattr(model, "stock", model)  # `StockClassifier` only unpacks logits
    modules = {id(module): path for path, module in host.named_modules()}
    tensors = {id(tensor): path for path, tensor in host.named_parameters()}
    inside = adaptable(tree)
    places = {name: tensors[id(tensor)] for name, tensor in parameters.items()}
    return PeftHost(
        layers={name: modules[id(layer)] for name, layer in inside.items() if id(layer) in modules},
        head=places,
        start={name: tensor.detach() for name, tensor in parameters.items()},
        modules_to_save=tuple(sorted({_module(name, place) for name, place in places.items()})),
        modules=tuple(modules.values()),
    )


def _module(name: str, place: str) -> str:
    """The module that holds a head tensor: ``bert.pooler`` for ``pooler.dense.bias`` at ``bert.pooler.dense.bias``."""
    return place.removesuffix(name) + name.partition(".")[0]
