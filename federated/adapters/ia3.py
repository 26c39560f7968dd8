"""IA3 through peft: one trained factor for each channel of keys, values and feed-forward activations.

    y = scale_out * (W x + b)    keys and values;        y = W (scale_in * x) + b    the last layer of a feed-forward

All factors start at one, so a fresh adapter answers exactly as the base. As with LoRA, peft only swaps the layers in;
which ones comes from a checked `AdapterSpec`.

Source: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", 2022,
section 3.3. Where we differ: where query, key and value are one layer (GPT-2), all of its output is scaled, as in peft.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from federated.adapters.quiet import quiet_peft
from federated.adapters.targets import adaptable, resolve_targets
from federated.errors import ModelError
from federated.manifest import AdapterSpec

__all__ = ["check_ia3", "ia3_tensors", "inject_ia3"]

_ADAPTER = "default"
_IN, _OUT = "scale_in", "scale_out"
_KEYS_AND_VALUES = (
    ("k_proj", "v_proj"), ("key", "value"), ("k_lin", "v_lin"), ("k", "v"), ("key_proj", "value_proj"), ("c_attn",),
    ("query_key_value",), ("qkv_proj",), ("Wqkv",), ("in_proj",),
)  # fmt: skip
"""Names of the key and value projections (or of the fused one) across architectures, first match wins."""
_FEED_FORWARD = (
    "down_proj", "output.dense", "lin2", "fc2", "mlp.c_proj", "dense_4h_to_h", "fc_out", "wo", "w2", "mlp.Wo",
)  # fmt: skip
"""Endings of the last layer of a feed-forward network."""


def ia3_tensors(root: nn.Module, targets: str | Sequence[str]) -> tuple[str, ...]:
    """Names of the factors: a layer's path with ``scale_in`` or ``scale_out``, sorted.

    Args:
        root: module whose layers may be scaled.
        targets: ``"auto"`` (keys, values and feed-forwards; every layer where there are no such names),
            ``"all-linear"``, or names of layers.

    Raises:
        ModelError: if a name matches no layer, or a module that cannot be scaled.
    """
    paths = _auto(adaptable(root)) if targets == "auto" else ()
    chosen = paths or resolve_targets(root, "all-linear" if targets == "auto" else targets)
    return tuple(sorted(f"{path}.{_IN if _is_feed_forward(path) else _OUT}" for path in chosen))


def _auto(layers: dict[str, nn.Module]) -> list[str]:
    for group in _KEYS_AND_VALUES:
        found = [name for name in layers if name.rpartition(".")[2] in group]
        if found:
            return found + [name for name in layers if _is_feed_forward(name)]
    return []


def _is_feed_forward(path: str) -> bool:
    """BERT's attention ends in an ``output.dense`` of its own, which is no feed-forward."""
    attention = {"attention", "attn", "self_attn"} & set(path.split("."))
    return not attention and any(path == ending or path.endswith(f".{ending}") for ending in _FEED_FORWARD)


def check_ia3(root: nn.Module, names: Sequence[str]) -> None:
    """Refuse names that are not factors of this base's layers, each layer once.

    Raises:
        ModelError: naming the first that does not fit.
    """
    layers = adaptable(root)
    seen: set[str] = set()
    for name in names:
        path, _, side = name.rpartition(".")
        if side not in (_IN, _OUT) or path not in layers:
            raise ModelError(f"the adapter trains {name}, which is no {_IN} or {_OUT} of a layer of this base model")
        if path in seen:
            raise ModelError(f"the adapter's spec names layer {path} twice; expected each layer once")
        seen.add(path)
    if not seen:
        raise ModelError("the adapter scales no layer; expected at least one name in its spec")


def inject_ia3(root: nn.Module, spec: AdapterSpec) -> dict[str, nn.Parameter]:
    """Swap the layers that a spec names for scaled ones around them, in place.

    Args:
        root: a shared tree, not the base itself.
        spec: checked against the base.

    Returns:
        The live factors by name: ``scale_in`` [1, d_in], ``scale_out`` [d_out, 1], all one.

    Raises:
        ModelError: if peft scaled other layers than these, or on the other side.
    """
    from peft import IA3Config, inject_adapter_in_model

    sides = {path: side for path, _, side in (name.rpartition(".") for name in spec.trained)}
    inputs = [path for path, side in sides.items() if side == _IN]
    config: Any = IA3Config(target_modules=list(sides), feedforward_modules=inputs)
    with quiet_peft(), torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, root, adapter_name=_ADAPTER)
    scaled: dict[str, Any] = {name: module for name, module in root.named_modules() if hasattr(module, "ia3_l")}
    found = {name: _IN if module.is_feedforward else _OUT for name, module in scaled.items()}
    if found != sides:
        odd = sorted(dict(found.items() ^ sides.items()))
        raise ModelError(f"peft scaled other layers than asked for: {odd[:3]}; give adapter.target_modules as paths")
    return {f"{name}.{sides[name]}": module.ia3_l[_ADAPTER] for name, module in scaled.items()}
