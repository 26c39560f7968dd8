"""Tokens of a causal language model, one forward pass each, over keys and values of one request.

The cache is made here for each answer and given to one module tree alone, so that no adapter ever reads what another
one wrote. Greedy answers equal transformers' own ``generate``. Called by `federated.device.backends.torch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from federated.adapters import BaseModel, inner_model, most_positions
from federated.device.records import Sampling, Token
from federated.device.streaming import TextStream
from federated.errors import DeviceError

__all__ = ["check_room_for", "end_tokens", "tokens_of"]


def check_room_for(base: BaseModel, prompt: int, sampling: Sampling, *, virtual: int) -> None:
    """Refuse an answer that the model has no positions for.

    Args:
        base: says how many it has.
        prompt: tokens of the prompt.
        sampling: says how many may be made.
        virtual: tokens that the adapter puts in front.

    Raises:
        DeviceError: with the numbers.
    """
    most = most_positions(base)
    if virtual + prompt + sampling.max_tokens > most:
        raise DeviceError(
            f"a prompt of {prompt} tokens and max_tokens = {sampling.max_tokens} pass the model's "
            f"{most - virtual} positions; shorten the prompt or set a smaller max_tokens"
        )


def end_tokens(base: BaseModel) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, and those of the model's own generation settings."""
    told: Any = getattr(getattr(base.model, "generation_config", None), "eos_token_id", None)
    listed = told if isinstance(told, list) else [told]
    own = None if base.tokenizer is None else base.tokenizer.eos_token_id
    return frozenset(one for one in [*listed, own] if one is not None)


def tokens_of(
    model: nn.Module,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    ends: frozenset[int],
    decode: Callable[[Sequence[int]], str],
) -> Iterator[Token]:
    """An answer's tokens, each computed when it is asked for.

    Args:
        model: a language model's tree.
        prompt: token ids.
        sampling: how they are chosen.
        ends: tokens that end the answer.
        decode: token ids to text.
    """
    choose, text = _Chooser(sampling), TextStream(decode, sampling.stop)
    for number, logits in enumerate(_logits(model, prompt, choose), start=1):
        token_id, logprob = choose(logits)
        if token_id in ends:
            yield Token(token_id, text.end(), logprob, "stop")
            return
        last = number == sampling.max_tokens
        made, stopped = text.add(token_id, last=last)
        reason: Literal["stop", "length"] | None = "stop" if stopped else "length" if last else None
        yield Token(token_id, made, logprob, reason)
        if reason:
            return


def _logits(model: nn.Module, prompt: Sequence[int], choose: _Chooser) -> Iterator[Tensor]:
    """Of the next token, again and again, each time after the one that was chosen."""
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        output: Any = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    inner, cache = inner_model(model), output.past_key_values
    while True:
        yield output.logits[0, -1].float()
        with torch.no_grad():
            output = inner(input_ids=torch.tensor([[choose.last]]), past_key_values=cache, use_cache=True)


class _Chooser:
    """Chooses tokens, with a generator of its own."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self.last = -1

    def __call__(self, logits: Tensor) -> tuple[int, float]:
        """A token and its logarithmic probability by the model."""
        if self._sampling.temperature == 0:
            self.last = int(logits.argmax())
        else:
            chances = (logits / self._sampling.temperature).softmax(-1)
            self.last = int(torch.multinomial(self._nucleus(chances), 1, generator=self._generator))
        return self.last, float(logits.log_softmax(-1)[self.last])

    def _nucleus(self, chances: Tensor) -> Tensor:
        if self._sampling.top_p >= 1:
            return chances
        ordered, places = chances.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # a token stays while those before it do not reach top_p
        return torch.zeros_like(chances).scatter(0, places, torch.where(before < self._sampling.top_p, ordered, 0.0))
