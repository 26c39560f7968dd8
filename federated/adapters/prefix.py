"""A prefix: trained keys and values in front of those of the text, in every attention layer.

    softmax(q [P_k, K]^T / sqrt(size)) [P_v, V]    attention mask [1 ... 1, m_1 ... m_T]    positions n ... n + T - 1

It is handed to the model as the cache of a text that was read before, of n tokens. So the positions of the text begin
after it, and keys are trained as a cache holds them: where a model turns keys by their position (RoPE), after the turn.
Nothing comes out in the prefix's own places, so there is nothing to cut: a stock head finds its text where it was.

A fresh prefix is what the base itself keeps after words drawn from the vocabulary: a causal model answers as it does to
those words and the text, which is not how it answers to the text alone. Zeros would not be nothing either: a key of
zeros still takes its share of the attention.

Source: Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", 2021, section 4 (the prefix) and
7.4 (words as first values). Where we differ: keys and values themselves are trained, without their network in between.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from federated.adapters.base import BaseModel
from federated.adapters.heads import MeanPoolClassifier, StockClassifier, backbone_path, generator_for
from federated.adapters.prompt import MOST_TOKENS, Prompted, check_room, most_positions
from federated.errors import ModelError
from federated.manifest import AdapterSpec

__all__ = ["inner_model", "check_prefix", "with_prefix"]

_MOST_VALUES = 2**27
"""Numbers in a prefix: in float32 no more fit a packet (512 MiB)."""

_Pairs = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, each [batch, heads, tokens, size of a head]."""


def check_prefix(base: BaseModel, spec: AdapterSpec) -> None:
    """Refuse a prefix that the base cannot be given; the base reads one token to find out.

    Raises:
        ModelError: for a base that keeps no keys and values, or an impossible length.
    """
    first = _kept(base, torch.zeros(1, 1, dtype=torch.long))
    each = sum(key.numel() + value.numel() for key, value in first)
    tokens, most = spec.virtual_tokens, min(MOST_TOKENS, most_positions(base) - 1, _MOST_VALUES // each)
    if type(tokens) is not int or not 1 <= tokens <= most:
        raise ModelError(f"virtual_tokens is {tokens}; expected 1 to {most} for {base.source}")


def _kept(base: BaseModel, ids: Tensor) -> _Pairs:
    """What the base keeps of a text for those that follow it, in the base's dtype.

    Args:
        base: read only.
        ids: one text, int64 [1, tokens].

    Raises:
        ModelError: if it takes no cache, or does not keep a key and a value for each token in every layer.
    """
    from transformers import DynamicCache

    backbone: Any = base.model.get_submodule(backbone_path(base))
    if base.kind == "module" or "past_key_values" not in inspect.signature(backbone.forward).parameters:
        raise _unfit(base, "takes no past_key_values")
    cache, ids = DynamicCache(), ids.to(next(backbone.parameters()).device)
    try:
        with torch.no_grad():
            backbone(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache)
            pairs = [(layer.keys, layer.values) for layer in cache.layers]
    except Exception as error:  # a model of another kind of memory raises nearly anything
        raise _unfit(base, f"cannot fill a DynamicCache ({type(error).__name__})") from error
    kept = sum(_is_whole(key, ids) and _is_whole(value, ids) for key, value in pairs)
    layers = max(len(pairs), getattr(backbone.config, "num_hidden_layers", 1))
    if kept < layers:
        raise _unfit(base, f"keeps them in {kept} of {layers} layers")
    return pairs


def _is_whole(kept: Any, ids: Tensor) -> bool:
    """Whether a layer kept something for each token; layers of another kind of memory keep nothing or a state."""
    return isinstance(kept, Tensor) and kept.dim() == 4 and (kept.shape[0], kept.shape[2]) == tuple(ids.shape)


def _unfit(base: BaseModel, found: str) -> ModelError:
    other = "lora" if base.kind == "module" else "prompt"
    return ModelError(
        f"an adapter of kind prefix needs a model that keeps keys and values in every layer; {base.source} "
        f"({type(base.model).__name__}) {found}; use adapter={other}"
    )


class _Prefixed(nn.Module):
    """A model of tokens with a prefix.

    Args:
        model: a feature extractor or a causal language model that takes ``past_key_values``.
        pairs: first keys and values of each layer, [1, heads, virtual_tokens, size of a head], in the model's dtype.
        positions: most that the model has.
    """

    def __init__(self, model: nn.Module, pairs: _Pairs, positions: int) -> None:
        super().__init__()
        self.model = model
        self.keys = nn.ParameterList(nn.Parameter(key[0].float().clone()) for key, _ in pairs)
        self.values = nn.ParameterList(nn.Parameter(value[0].float().clone()) for _, value in pairs)
        self._dtype = pairs[0][0].dtype
        self._count = pairs[0][0].shape[2]
        self._positions = positions

    def _behind(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        """A text, [batch, time] each, as one that follows the prefix; the cache is new, and the model adds to it."""
        from transformers import DynamicCache

        batch, length = input_ids.shape
        check_room(self._count, length, self._positions)
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            pair = (one.to(self._dtype).expand(batch, -1, -1, -1) for one in (key, value))
            cache.update(*pair, layer)
        seen = attention_mask.new_ones(batch, self._count)
        return {"past_key_values": cache, "attention_mask": torch.cat([seen, attention_mask], dim=1)}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        """The model's own output for the text, [batch, time, ...]."""
        return self.model(input_ids=input_ids, **{**options, **self._behind(input_ids, attention_mask)})

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        """What the model's own ``generate`` returns as a record; ``sequences`` begin with ``input_ids``.

        One continuation of each text: no beams.
        """
        model: Any = self.model
        behind = self._behind(input_ids, attention_mask)
        # generate wants ids of what the cache holds, too, and skips them; its penalties know the text's first anyway
        ids = torch.cat([input_ids[:, :1].expand(-1, self._count), input_ids], dim=1)
        made = model.generate(input_ids=ids, **behind, **{**options, "return_dict_in_generate": True})
        made.sequences = made.sequences[:, self._count :]
        return made


def inner_model(model: nn.Module) -> nn.Module:
    """The language model behind a prompt or a prefix, which goes on once these are in its cache; else the model."""
    inner: Any = model.model if isinstance(model, Prompted | _Prefixed) else model
    return inner  # type: ignore[no-any-return]


def with_prefix(
    base: BaseModel, model: nn.Module, *, tokens: int, seed: int
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Put a prefix in front of a model.

    Args:
        base: where the model comes from; it reads the drawn words, and stays as it is.
        model: a causal language model's tree, or a classifier, which gets another backbone.
        tokens: length of the prefix.
        seed: which words it starts from.

    Returns:
        The model to use from now on, and the live tensors by canonical name (``prefix.0.key``, ``prefix.0.value`` and
        so on), float32 [heads, tokens, size of a head]: heads are those that a layer has for keys and values.
    """
    pairs = _kept(base, _drawn(base, tokens, seed))
    holder, name = _place(model)
    inner = model if holder is None else getattr(holder, name)
    prefixed = _Prefixed(inner, pairs, most_positions(base))
    if holder is not None:
        holder._modules[name] = prefixed
    tensors = {f"prefix.{layer}.key": key for layer, key in enumerate(prefixed.keys)}
    tensors |= {f"prefix.{layer}.value": value for layer, value in enumerate(prefixed.values)}
    return (prefixed if holder is None else model), tensors


def _place(model: nn.Module) -> tuple[nn.Module | None, str]:
    """Which module holds the feature extractor, and under which name; none holds a language model."""
    if isinstance(model, MeanPoolClassifier):
        return model, "backbone"
    if isinstance(model, StockClassifier):
        return model.stock, str(model.stock.base_model_prefix)
    return None, ""


def _drawn(base: BaseModel, tokens: int, seed: int) -> Tensor:
    """Words drawn from the vocabulary, int64 [1, tokens]."""
    model: Any = base.model
    vocabulary = len(model.get_input_embeddings().weight)
    return torch.randint(vocabulary, (1, tokens), generator=generator_for(seed, "prefix"))
