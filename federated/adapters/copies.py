"""Tensors of the base that an adapter trains itself: its norms, or all of them, as copies of its own.

The tree shares every tensor with the base; those that are trained are replaced in it by copies that start from the
base's values, so that a fresh adapter answers as the base and the base is never written to. Copies are float32, as
the base has to be: in fewer bits they would not be the base's weights.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from federated.adapters.base import BaseModel
from federated.adapters.heads import backbone_path
from federated.errors import ModelError
from federated.manifest import AdapterSpec
from federated.state import group_of

__all__ = ["all_tensors", "check_copies", "norm_tensors", "own_copies"]


def all_tensors(base: BaseModel, *, headed: bool) -> tuple[str, ...]:
    """Paths of every parameter that answers depend on, tied ones once, sorted.

    Args:
        base: the base model.
        headed: for a model with a task head: without what only a language model's output or a stock head reads.
    """
    return tuple(sorted(_usable(base, headed=headed)))


def norm_tensors(base: BaseModel, *, headed: bool) -> tuple[str, ...]:
    """Paths of the weights and biases of every LayerNorm and RMSNorm, sorted.

    Raises:
        ModelError: if the base has none.
    """
    usable = _usable(base, headed=headed)
    norms = [name for name, module in base.model.named_modules() if _is_norm(module)]
    found = [name for name in usable if name.rpartition(".")[0] in norms]
    if not found:
        raise ModelError(
            f"adapter.kind = layernorm: {base.source} has no LayerNorm or RMSNorm to train; choose another adapter"
        )
    return tuple(sorted(found))


def _is_norm(module: nn.Module) -> bool:
    """Architectures bring classes of their own, such as LlamaRMSNorm."""
    return type(module).__name__.endswith(("LayerNorm", "RMSNorm"))


def _usable(base: BaseModel, *, headed: bool) -> dict[str, nn.Parameter]:
    prefix = backbone_path(base) if headed else ""
    return {
        name: tensor
        for name, tensor in base.model.named_parameters()
        if tensor.numel() and "pooler" not in name.split(".") and (not prefix or name.startswith(f"{prefix}."))
    }


def check_copies(base: BaseModel, spec: AdapterSpec, names: Iterable[str]) -> None:
    """Refuse copies that would not be the base's own values, or that the base does not have.

    Raises:
        ModelError: naming the tensor or the dtype.
    """
    usable = _usable(base, headed=spec.head is not None)
    for name in names:
        if name not in usable:
            raise ModelError(f"the adapter trains {name}, which this base model does not have")
        if group_of(name) != "dense":
            raise ModelError(f"{base.source} has a tensor {name}, which is a factor's name; rename it in the base")
        if str(usable[name].dtype) != "torch.float32":
            raise ModelError(f"an adapter of kind {spec.peft_type} needs a float32 base model; set model.dtype=float32")
    if spec.dtype != "F32":
        raise ModelError(
            f"adapter dtype {spec.dtype!r}: an adapter of kind {spec.peft_type} starts from the base's own weights, "
            "which fewer bits would change; set adapter.dtype=float32"
        )


def own_copies(tree: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Replace parameters of a shared tree by copies of its own, in place; tied ones stay tied.

    Returns:
        The live copies by name.
    """
    made = {name: nn.Parameter(tree.get_parameter(name).detach().clone()) for name in names}
    copies = {id(tree.get_parameter(name)): copy for name, copy in made.items()}
    for module in tree.modules():
        for name, tensor in list(module._parameters.items()):
            if id(tensor) in copies:
                module._parameters[name] = copies[id(tensor)]
    return made
