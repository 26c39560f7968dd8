"""Small random base models, made on the spot: for tests, first steps and machines without any weights.

Each is the same on every call (a fixed seed of its own; the global random state is left alone). They know nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from federated.errors import ModelError

__all__ = ["TINY_CHANNELS", "TinySensor", "byte_tokenizer", "tiny_model"]

_SEED = 20_26
_HIDDEN = 32
_LAGS = 4
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_CHAT = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
TINY_CHANNELS = 3
"""Channels that ``tiny:sensor`` reads."""


class TinySensor(nn.Module):
    """A feature extractor for series: a small network over each time step and the three before it.

    Args:
        channels: values per time step.
        hidden: size of a feature vector.
    """

    def __init__(self, channels: int = TINY_CHANNELS, hidden: int = _HIDDEN) -> None:
        super().__init__()
        self.hidden_size = hidden
        self.channels = channels
        self.embed = nn.Linear(_LAGS * channels, hidden)
        self.mix = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, values: Tensor, attention_mask: Tensor) -> Tensor:
        """Features of each step.

        Args:
            values: float32 [batch, time, channels].
            attention_mask: [batch, time], 1 for real steps, 0 for padding.

        Returns:
            float32 [batch, time, hidden].

        Raises:
            ModelError: for another number of channels.
        """
        if values.shape[-1] != self.channels:
            raise ModelError(f"the series have {values.shape[-1]} channels, the base model reads {self.channels}")
        masked = values * attention_mask.unsqueeze(-1)
        padded = nn.functional.pad(masked, (0, 0, _LAGS - 1, 0))
        steps = values.shape[1]
        window = torch.stack([padded[:, lag : lag + steps] for lag in range(_LAGS)], dim=-1).flatten(2)
        hidden = torch.tanh(self.embed(window))
        features: Tensor = self.out(torch.tanh(self.mix(hidden)))
        return features


def byte_tokenizer(*, chat: bool) -> Any:
    """A tokenizer in memory whose tokens are the 256 bytes, plus pad, bos, eos and unk.

    Args:
        chat: give it a minimal chat template.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))  # noqa: S106 - no secret
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), _SPECIAL, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    if chat:
        tokenizer.chat_template = _CHAT
    return tokenizer


def _bert(vocabulary: int) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=vocabulary, hidden_size=_HIDDEN, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=512, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
    )  # fmt: skip
    model: nn.Module = BertModel(config)
    return model


def _gpt2(vocabulary: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary, n_embd=_HIDDEN, n_layer=2, n_head=2, n_positions=512, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def _llama(vocabulary: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=_HIDDEN, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    return model


_TEXT: Mapping[str, Callable[[int], nn.Module]] = {"bert": _bert, "gpt2": _gpt2, "llama": _llama}


def tiny_model(name: str) -> tuple[nn.Module, Any | None]:
    """Make the tiny model ``bert``, ``gpt2``, ``llama`` or ``sensor`` with its tokenizer (None for ``sensor``).

    Raises:
        ModelError: for another name.
    """
    if name != "sensor" and name not in _TEXT:
        raise ModelError(f"tiny:{name} is unknown; expected tiny:bert, tiny:gpt2, tiny:llama or tiny:sensor")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        if name == "sensor":
            return TinySensor(), None
        tokenizer = byte_tokenizer(chat=name == "llama")
        return _TEXT[name](len(tokenizer)), tokenizer
