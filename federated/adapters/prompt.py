"""A soft prompt: trained vectors in front of each text, where the embeddings of words would be.

    [p_1 ... p_n, e(x_1) ... e(x_T)]    attention mask [1 ... 1, m_1 ... m_T]    positions 0 ... n + T - 1

The prompt is seen by every real token. What comes out is cut back to the text's own positions: a classifier's mean and
a language model's targets are those of the text alone. The vectors start as the embeddings of words drawn from the
vocabulary, so a fresh prompt does not answer as the base does: it starts as something, as a prefix does and no other
kind of adapter.

Source: Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", 2021, section 2.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from federated.adapters.base import BaseModel
from federated.adapters.heads import MeanPoolClassifier, backbone_path, generator_for
from federated.errors import ModelError
from federated.manifest import AdapterSpec

__all__ = ["MOST_TOKENS", "Prompted", "check_prompt", "check_room", "most_positions", "with_prompt"]

PROMPT = "prompt.embedding"
"""Canonical name of the vectors, [virtual_tokens, size of an embedding]."""
MOST_TOKENS = 1024
"""Virtual tokens of a prompt or a prefix, at most."""


def check_prompt(base: BaseModel, spec: AdapterSpec) -> None:
    """Refuse a prompt that the base cannot be given.

    Raises:
        ModelError: for a base without token embeddings, a stock head, or an impossible length.
    """
    tokens, most = spec.virtual_tokens, min(MOST_TOKENS, most_positions(base) - 1)
    if base.kind == "module" or "inputs_embeds" not in inspect.signature(_backbone(base).forward).parameters:
        raise ModelError(f"an adapter of kind prompt needs a model of tokens; {base.source} takes no embeddings")
    if spec.head is not None and spec.head.kind != "mean_pool":
        raise ModelError("a stock head reads positions that a soft prompt moves; set task.head=mean_pool")
    if type(tokens) is not int or not 1 <= tokens <= most:
        raise ModelError(f"virtual_tokens is {tokens}; expected 1 to {most} for {base.source}")


def most_positions(base: BaseModel) -> int:
    """How many positions the base has; a very large number where it does not say."""
    told = getattr(getattr(base.model, "config", None), "max_position_embeddings", None)
    return told if isinstance(told, int) else 2**31


def check_room(tokens: int, length: int, positions: int) -> None:
    """Refuse a text that does not fit behind virtual tokens.

    Args:
        tokens: virtual tokens.
        length: tokens of the text.
        positions: most that the model has.

    Raises:
        ModelError: with the three numbers.
    """
    if tokens + length > positions:
        raise ModelError(
            f"{tokens} virtual tokens and a text of {length} pass the model's {positions} positions; "
            "set a smaller task.max_length or adapter.virtual_tokens"
        )


def _backbone(base: BaseModel) -> nn.Module:
    return base.model.get_submodule(backbone_path(base))


class Prompted(nn.Module):
    """What both kinds share: the prompt, and the inputs with it in front."""

    per_sample_parameters = ("prompt",)
    """May be [batch, tokens, size] while a forward runs, one prompt for each example: `federated.privacy.fused`."""

    def __init__(self, prompt: nn.Parameter, positions: int) -> None:
        super().__init__()
        self.prompt = prompt
        self._positions = positions

    def _joined(self, embed: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        batch, length = input_ids.shape
        count = self.prompt.shape[-2]
        check_room(count, length, self._positions)
        words = embed(input_ids)
        front = self.prompt.to(words.dtype).expand(batch, -1, -1)
        seen = attention_mask.new_ones(batch, count)
        return {
            "inputs_embeds": torch.cat([front, words], dim=1),
            "attention_mask": torch.cat([seen, attention_mask], dim=1),
        }


class _PromptedBackbone(Prompted):
    """A feature extractor with a prompt.

    Args:
        backbone: returns ``last_hidden_state``.
        prompt: the vectors.
        positions: most that the backbone has.
    """

    def __init__(self, backbone: nn.Module, prompt: nn.Parameter, positions: int) -> None:
        super().__init__(prompt, positions)
        self.model = backbone

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Features of the text's own positions, [batch, time, hidden]."""
        model: Any = self.model
        output = model(**self._joined(model.get_input_embeddings(), input_ids, attention_mask))
        features: Tensor = output.last_hidden_state[:, self.prompt.shape[-2] :]
        return features


class _PromptedLM(Prompted):
    """A causal language model with a prompt.

    Args:
        model: a transformers causal language model.
        prompt: the vectors.
        positions: most that the model has.
    """

    def __init__(self, model: nn.Module, prompt: nn.Parameter, positions: int) -> None:
        super().__init__(prompt, positions)
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        """The model's output; ``logits`` are those of the text's own positions, [batch, time, vocabulary]."""
        model: Any = self.model
        output = model(**self._joined(model.get_input_embeddings(), input_ids, attention_mask), **options)
        output.logits = output.logits[:, self.prompt.shape[-2] :]
        return output

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        """What the model's own ``generate`` returns as a record; ``sequences`` begin with ``input_ids``."""
        model: Any = self.model
        inputs = self._joined(model.get_input_embeddings(), input_ids, attention_mask)
        made = model.generate(**inputs, **{**options, "return_dict_in_generate": True})
        made.sequences = torch.cat([input_ids, made.sequences], dim=1)
        return made


def with_prompt(
    base: BaseModel, model: nn.Module, *, tokens: int, seed: int
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Put a prompt in front of a model.

    Args:
        base: where the model comes from.
        model: a causal language model's tree, or a classifier over mean-pooled features, which gets another backbone.
        tokens: length of the prompt.
        seed: which words it starts as.

    Returns:
        The model to use from now on, and the live vectors by canonical name.
    """
    prompt = nn.Parameter(_drawn(base, tokens, seed))
    if isinstance(model, MeanPoolClassifier):
        model.backbone = _PromptedBackbone(model.backbone, prompt, most_positions(base))
        return model, {PROMPT: prompt}
    return _PromptedLM(model, prompt, most_positions(base)), {PROMPT: prompt}


def _drawn(base: BaseModel, tokens: int, seed: int) -> Tensor:
    """Embeddings of words drawn from the vocabulary, float32."""
    backbone: Any = _backbone(base)
    words: Tensor = backbone.get_input_embeddings().weight.detach()
    chosen = torch.randint(len(words), (tokens,), generator=generator_for(seed, "prompt"))
    return words[chosen].float().clone()
