"""The base model's fingerprint: one digest over configuration, weights and tokenizer.

Equal weights loaded from a folder, a package or a hub give equal digests; one changed weight, another tokenizer or
another dtype gives another. It reads the model and never changes it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from federated.manifest import digest_of

__all__ = ["base_digest", "base_parts", "config_digest", "tokenizer_digest", "weights_digest"]

_NOISE = frozenset({
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "id2label",
    "label2id", "num_labels", "problem_type", "quantization_config", "_attn_implementation", "attn_implementation",
    "output_attentions", "output_hidden_states", "return_dict",
})  # fmt: skip
"""Keys of a configuration that say where a model came from or how it is used, not what it computes."""


def base_digest(model: nn.Module, tokenizer: Any | None) -> str:
    """Fingerprint of a base model.

    Args:
        model: the frozen model.
        tokenizer: its transformers tokenizer; None for a plain module.

    Returns:
        64 hexadecimal characters.
    """
    return digest_of(base_parts(model, tokenizer))


def base_parts(model: nn.Module, tokenizer: Any | None) -> dict[str, str | None]:
    """What the fingerprint is the digest of: the model's class by name, and the digests of its parts."""
    return {
        "class": type(model).__name__,
        "config": config_digest(model),
        "tokenizer": tokenizer_digest(tokenizer),
        "weights": weights_digest(model),
    }


def config_digest(model: nn.Module) -> str | None:
    """Digest of what the configuration changes from its class's defaults; None for a plain module."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    told = {key: value for key, value in config.to_diff_dict().items() if key not in _NOISE}
    return digest_of(json.loads(json.dumps(told, default=str)))


def weights_digest(model: nn.Module) -> str:
    """Digest of every parameter and persistent buffer: name, dtype, shape and bytes; tied weights count once."""
    hasher = hashlib.sha256()
    seen: set[tuple[int, int]] = set()
    for name, tensor in sorted(model.state_dict().items()):
        place = (tensor.data_ptr(), tensor.numel())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        hasher.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        hasher.update(_bytes(tensor))
    return hasher.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def tokenizer_digest(tokenizer: Any | None) -> str | None:
    """Digest of a tokenizer's rules, special tokens and chat template; None where there is none.

    Truncation and padding are left out: they are how a call was made, not what the tokenizer is.
    """
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(rules, dict):
        rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return digest_of({"rules": rules, "special": special, "template": tokenizer.chat_template})
