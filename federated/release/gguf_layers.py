"""Where a base model's layers are in llama.cpp: its architectures, its names for their weights, and the order of rows.

The names come from the `gguf` package. Which layers llama.cpp really adds a LoRA product to, and where it keeps rows in
another order than transformers, no package says: only what was compared with llama.cpp itself stands in `FAMILIES`
(`tests/integration/test_gguf_llama_cpp.py`), everything else is refused. Called by `federated.release.export_gguf`.

For llama's own family, llama.cpp turns pairs of neighbouring values of a head by one angle, transformers the value j
and the one half a head further. So that both compute one thing, the converted rows of ``q_proj`` and ``k_proj`` are
interleaved, and those of their ``factor_b`` must be too. ``factor_a`` and the other layers stay as they are; a Conv1D's
factors have the same orientation here as a Linear's, and a fused layer (``c_attn``, ``qkv_proj``) is one tensor in
both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from federated.errors import ModelError
from federated.manifest import ModuleSpec

__all__ = ["FAMILIES", "Family", "Place", "interleaved", "place_of"]

_ATTENTION = tuple(f"model.layers.N.self_attn.{name}_proj" for name in "qkvo")
_GATED = tuple(f"model.layers.N.mlp.{name}_proj" for name in ("gate", "up", "down"))
_PHI3 = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
_GPT2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_OUTPUT = "lm_head"
_HEADS = {
    "model.layers.N.self_attn.q_proj": "num_attention_heads",
    "model.layers.N.self_attn.k_proj": "num_key_value_heads",
}


@dataclass(frozen=True)
class Family:
    """Base models of one transformers class.

    Args:
        architecture: llama.cpp's, as `gguf.MODEL_ARCH` names it.
        layers: paths that an adapter may have, ``N`` for a block's number.
        depth: key of the configuration that says how many blocks there are.
        heads: of the layers whose rows are interleaved, the key that says over how many heads.
    """

    architecture: str
    layers: tuple[str, ...]
    depth: str = "num_hidden_layers"
    heads: Mapping[str, str] = field(default_factory=dict)


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("LLAMA", (*_ATTENTION, *_GATED, _OUTPUT), heads=_HEADS),
    "MistralForCausalLM": Family("LLAMA", (*_ATTENTION, *_GATED, _OUTPUT), heads=_HEADS),
    "Qwen2ForCausalLM": Family("QWEN2", (*_ATTENTION, *_GATED, _OUTPUT)),
    "Qwen3ForCausalLM": Family("QWEN3", (*_ATTENTION, *_GATED, _OUTPUT)),
    "Gemma3ForCausalLM": Family("GEMMA3", (*_ATTENTION, *_GATED)),
    "Phi3ForCausalLM": Family("PHI3", (*(f"model.layers.N.{name}" for name in _PHI3), _OUTPUT)),
    "GPT2LMHeadModel": Family("GPT2", tuple(f"transformer.h.N.{name}" for name in _GPT2), depth="n_layer"),
}
"""By the name of the base model's class."""


@dataclass(frozen=True)
class Place:
    """Where one layer's factors go.

    Args:
        architecture: value of ``general.architecture``.
        name: of the weight in llama.cpp (``"blk.0.attn_q.weight"``).
        heads: over how many heads the rows of ``factor_b`` are interleaved; 0 where they stay.
    """

    architecture: str
    name: str
    heads: int = 0


def place_of(module: ModuleSpec, base_class: str, config: Mapping[str, Any]) -> Place:
    """Find a layer's place.

    Args:
        module: the adapted layer.
        base_class: class of the base model, such as ``"LlamaForCausalLM"``.
        config: the base model's whole configuration, as transformers' ``config.to_dict()`` gives it.

    Raises:
        ModelError: if the class is not one of `FAMILIES`, the layer is none that an adapter may have there, or it does
            not fit the configuration.
    """
    import gguf

    family = FAMILIES.get(base_class)
    if family is None:
        raise ModelError(f"a {base_class} as GGUF was never compared with llama.cpp; expected {', '.join(FAMILIES)}")
    path = re.sub(r"\.[0-9]+\.", ".N.", module.name, count=1)
    if path not in family.layers:
        raise ModelError(
            f"layer {module.name}: llama.cpp adds an adapter of a {base_class} to {', '.join(family.layers)} alone"
        )
    if path == _OUTPUT and config["tie_word_embeddings"]:
        raise ModelError(f"layer {module.name} is tied to the embeddings: in GGUF it is no layer of its own")
    architecture = gguf.MODEL_ARCH[family.architecture]
    known = gguf.get_tensor_name_map(architecture, config[family.depth])
    name = known.get_name(f"{module.name}.weight", try_suffixes=(".weight",))
    if name is None:
        raise ModelError(f"layer {module.name}: the base model has {config[family.depth]} blocks, counted from 0")
    heads = config[family.heads[path]] if path in family.heads else 0
    if heads and module.d_out % (2 * heads):
        raise ModelError(f"layer {module.name}: {module.d_out} rows are not those of {heads} heads, two halves in each")
    return Place(gguf.MODEL_ARCH_NAMES[architecture], name, heads)


def interleaved(factor_b: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rows in llama.cpp's order: of each head the first of each half, the second of each half ...

    Args:
        factor_b: d_out x rank; d_out is a multiple of ``2 * heads``.
        heads: how many; 0 leaves all rows where they are.
    """
    if not heads:
        return factor_b
    d_out, rank = factor_b.shape
    halves = factor_b.reshape(heads, 2, d_out // heads // 2, rank)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(d_out, rank)
