"""What of a text model goes beside its ONNX file: the tokenizer's rules, and where a continuation ends."""

from __future__ import annotations

from typing import Any

from torch import nn

from federated.errors import ModelError

__all__ = ["check_generation", "stop_ids", "tokenizer_json"]

_PLAIN: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "num_beams": (None, 1),
    "bad_words_ids": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "sequence_bias": (None,),
}
"""Settings of a model's own generation that change a greedy continuation, and the values that do not."""


def tokenizer_json(tokenizer: Any) -> bytes:
    """The tokenizer's rules as ``tokenizer.json``, without the truncation and padding of the last call.

    Raises:
        ModelError: for a tokenizer that is not a fast one.
    """
    from tokenizers import Tokenizer

    rules = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(rules, Tokenizer):
        raise ModelError("the base model has a slow tokenizer; a device without torch needs tokenizer.json")
    copy = Tokenizer.from_str(rules.to_str())
    copy.no_truncation()
    copy.no_padding()
    return str(copy.to_str()).encode()


def check_generation(model: nn.Module) -> None:
    """Refuse a language model whose own settings change what follows a text; a device takes the likeliest token.

    Raises:
        ModelError: naming the first one.
    """
    settings: Any = getattr(model, "generation_config", None)
    for name, plain in _PLAIN.items():
        value = getattr(settings, name, None)
        if value not in plain:
            raise ModelError(
                f"the base model's generation_config sets {name} = {value}, which a device without torch does not "
                "follow; export it without that setting, or serve it with torch"
            )


def stop_ids(model: nn.Module) -> tuple[int, ...]:
    """Ids of the tokens after which a continuation ends, sorted."""
    settings: Any = getattr(model, "generation_config", None)
    found = getattr(settings, "eos_token_id", None)
    return tuple(sorted(found)) if isinstance(found, list | tuple) else () if found is None else (int(found),)
