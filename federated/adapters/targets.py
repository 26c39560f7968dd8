"""Which layers an adapter goes on: names resolved against the real base model, never patterns.

peft reads a string as a regular expression and a list as suffixes; here both become the exact list of module paths,
so that a typing error is caught by name and nothing that arrives from outside is ever a pattern.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from federated.errors import ModelError

__all__ = ["adaptable", "layer_sizes", "resolve_targets", "stores_transposed"]

_AUTO = (
    ("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"), ("q", "v"), ("c_attn",), ("query_key_value",),
    ("qkv_proj",), ("Wqkv",), ("query_proj", "value_proj"), ("in_proj",),
)  # fmt: skip
"""Names of the query and value projections (or of the fused one) across architectures, first match wins."""


def stores_transposed(layer: nn.Module) -> bool:
    """Whether the layer keeps its weight as d_in x d_out (transformers' Conv1D, as in GPT-2)."""
    return type(layer).__name__ == "Conv1D"


def layer_sizes(layer: nn.Module) -> tuple[int, int]:
    """``(d_in, d_out)`` of a Linear or Conv1D."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features  # a quantised weight has another shape
    weight: Any = layer.weight
    first, second = (int(size) for size in weight.shape)
    return (first, second) if stores_transposed(layer) else (second, first)


def adaptable(root: nn.Module) -> dict[str, nn.Module]:
    """Every Linear and Conv1D that LoRA can go on, by path; no pooler and no output embeddings.

    The pooler belongs to the stock head, and nothing but a head reads it.
    """
    output = root.get_output_embeddings() if hasattr(root, "get_output_embeddings") else None  # type: ignore[operator]
    return {
        name: module
        for name, module in root.named_modules()
        if (isinstance(module, nn.Linear) or stores_transposed(module))
        and module is not output
        and "pooler" not in name.split(".")
    }


def resolve_targets(root: nn.Module, targets: str | Sequence[str]) -> tuple[str, ...]:
    """The exact paths of the layers to adapt, sorted.

    Args:
        root: module whose layers may be adapted.
        targets: ``"auto"`` (query and value projections; every layer where there are none), ``"all-linear"``, or names:
            each a whole path or its last parts.

    Raises:
        ModelError: if a name matches no layer, or a module that LoRA cannot go on.
    """
    layers = adaptable(root)
    if targets == "all-linear":
        found = set(layers)
    elif targets == "auto":
        found = _auto(layers)
    else:
        found = {name for target in targets for name in _matching(root, layers, target)}
    if not found:
        raise ModelError(f"target_modules = {targets!r} matches no layer; expected some of {_endings(layers)}")
    return tuple(sorted(found))


def _auto(layers: dict[str, nn.Module]) -> set[str]:
    for group in _AUTO:
        found = {name for name in layers if name.rsplit(".", 1)[-1] in group}
        if found:
            return found
    return set(layers)


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _matching(root: nn.Module, layers: dict[str, nn.Module], target: str) -> list[str]:
    found = [name for name in layers if _ends_with(name, target)]
    if found:
        return found
    for name, module in root.named_modules():
        if target and _ends_with(name, target):
            raise ModelError(
                f"target module {target} is {name}, a {type(module).__name__}; LoRA goes on Linear and Conv1D layers: "
                f"{_endings(layers)}"
            )
    raise ModelError(f"target module {target!r} matches nothing in the base model; available: {_endings(layers)}")


def _endings(layers: dict[str, nn.Module], most: int = 12) -> str:
    names = sorted({name.rsplit(".", 1)[-1] for name in layers})
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")
