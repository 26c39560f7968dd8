"""Causal language modelling: plain texts in chunks, or chats with loss on the answers only.

A sample's loss is the mean over its own target tokens. The usual mean over all tokens of a batch ties samples
together: one sample's gradient then grows when another gets shorter, and a per-sample clipping bound does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from federated.config import TaskConfig
from federated.errors import DataError
from federated.rows import NEW_TOKENS, some_text_of
from federated.tasks.batching import exact_mean, in_eval_mode, pad_1d, require_some, sorted_batches, to_device_of
from federated.tasks.chat import check_template, encode_chat, render_prompt
from federated.tasks.protocol import Batch, Evaluation, Features, Prediction, Row

__all__ = ["CausalLM"]

_IGNORE = -100


class CausalLM:
    """Next-token prediction.

    Args:
        config: ``chat`` and ``max_length``.
        tokenizer: transformers tokenizer with a padding token.

    Raises:
        ModelError: if chats are asked for and the tokenizer has no chat template.
    """

    name = "causal_lm"

    def __init__(self, config: TaskConfig, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._max_length = config.max_length
        self._chat = config.chat
        if config.chat:
            check_template(tokenizer)
        self._eos, self._pad = tokenizer.eos_token_id, tokenizer.pad_token_id  # each look there takes a while

    def encode(self, rows: Sequence[Row]) -> list[Features]:
        """Samples of at most ``max_length`` tokens, each with at least one target.

        A long text becomes several samples; neighbours share one token, so that each token after the first is a target
        once. Of a long chat the last ``max_length`` tokens are kept.

        Raises:
            DataError: for no rows, an empty text, or a chat without an answer.
        """
        require_some(rows, "rows")
        if self._chat:
            return [sample for number, row in enumerate(rows, start=1) for sample in self._answers(row, number)]
        texts = [some_text_of(row, number) for number, row in enumerate(rows, start=1)]
        encoded = self._tokenizer(texts, verbose=False)["input_ids"]  # together: a call per text costs ten times more
        return [sample for number, ids in enumerate(encoded, start=1) for sample in self._chunks(list(ids), number)]

    def _chunks(self, ids: list[int], number: int) -> Iterator[Features]:
        if self._eos is not None:
            ids = [*ids, self._eos]
        if len(ids) < 2:
            raise DataError(f"row {number}: the text is {len(ids)} tokens long; expected at least 2")
        step = self._max_length - 1
        for start in range(0, len(ids) - 1, step):
            part = ids[start : start + self._max_length]
            yield {"input_ids": part, "labels": part}

    def _tokens(self, row: Row, number: int) -> list[int]:
        return list(self._tokenizer(some_text_of(row, number), verbose=False)["input_ids"])

    def _answers(self, row: Row, number: int) -> Iterator[Features]:
        ids, marks = encode_chat(self._tokenizer, row.get("messages"), number)
        labels = [token if mark else _IGNORE for token, mark in zip(ids, marks, strict=True)]
        kept = {"input_ids": ids[-self._max_length :], "labels": labels[-self._max_length :]}
        if all(label == _IGNORE for label in kept["labels"][1:]):
            raise DataError(f"row {number}: no token of the answer is left to learn from")
        yield kept

    def length(self, features: Features) -> int:
        """Tokens of a sample."""
        return len(features["input_ids"])

    def collate(self, features: Sequence[Features]) -> Batch:
        """``input_ids``, ``attention_mask`` and ``labels``, int64 [batch, longest]; labels are -100 off target."""
        ids = [one["input_ids"] for one in features]
        return {
            "input_ids": pad_1d(ids, self._pad),
            "attention_mask": pad_1d([[1] * len(one) for one in ids], 0),
            "labels": pad_1d([one["labels"] for one in features], _IGNORE),
        }

    def per_sample_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy over each sample's own target tokens, float32 [batch]."""
        chosen, wanted, mask = self._targets(model, batch)
        return _spread(nn.functional.cross_entropy(chosen, wanted, reduction="none"), mask).sum(1) / mask.sum(1)

    def _targets(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [targets, vocabulary] and tokens of the targets alone, and where they stand [batch, time]."""
        placed = to_device_of(model, batch)
        tokens = placed.pop("labels")[:, 1:]
        mask = tokens != _IGNORE
        logits = model(**placed, use_cache=False).logits[:, :-1].flatten(0, 1)
        if mask.all():  # nothing to leave out
            return logits.float(), tokens.flatten(), mask
        where = mask.flatten().nonzero().squeeze(1)
        return logits.index_select(0, where).float(), tokens.flatten()[where], mask

    def evaluate(self, model: nn.Module, features: Sequence[Features], *, batch_size: int) -> Evaluation:
        """Mean loss per sample; ``perplexity`` and ``token_accuracy`` over all target tokens.

        Raises:
            DataError: for no features.
        """
        require_some(features, "examples to evaluate on")
        sums, tokens, hits = self._run(in_eval_mode(model), features, batch_size)
        total = sum(tokens)
        perplexity = math.exp(min(math.fsum(sums) / total, 700.0))  # beyond it a float would overflow
        metrics = {"perplexity": perplexity, "token_accuracy": sum(hits) / total, "num_tokens": float(total)}
        loss = exact_mean([one / count for one, count in zip(sums, tokens, strict=True)])
        return Evaluation(loss, len(features), metrics)

    @torch.no_grad()
    def _run(
        self, model: nn.Module, features: Sequence[Features], batch_size: int
    ) -> tuple[list[float], list[int], list[int]]:
        sums: list[float] = []
        tokens: list[int] = []
        hits: list[int] = []
        for part in sorted_batches(features, batch_size, _sort_key):
            chosen, wanted, mask = self._targets(model, self.collate(part))
            losses = nn.functional.cross_entropy(chosen, wanted, reduction="none")
            sums += _spread(losses, mask).double().sum(1).tolist()
            tokens += mask.sum(1).tolist()
            hits += _spread(chosen.argmax(-1) == wanted, mask).sum(1).tolist()
        return sums, tokens, hits

    @torch.no_grad()
    def predict(self, model: nn.Module, rows: Sequence[Row]) -> list[Prediction]:
        """A short greedy continuation of each text, or the next turn of each chat."""
        model.eval()
        return [self._continue(model, self._prompt(row, number)) for number, row in enumerate(rows, start=1)]

    def _prompt(self, row: Row, number: int) -> list[int]:
        if not self._chat:
            return self._tokens(row, number)[-self._max_length :]
        asked = row["messages"] if "messages" in row else [{"role": "user", "content": row.get("text")}]
        return render_prompt(self._tokenizer, asked, number)[-self._max_length :]

    def _continue(self, model: Any, prompt: list[int]) -> Prediction:
        ids = torch.tensor([prompt], device=next(model.parameters()).device)
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=self._pad,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = made.sequences[0, len(prompt) :]
        chances = torch.stack(made.logits, dim=1)[0].float().log_softmax(-1).gather(1, tokens[:, None])
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return Prediction(text, float(chances.mean().exp()))


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Put one value per target back where it stands; zero elsewhere."""
    if len(values) == mask.numel():
        return values.view(mask.shape)
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def _sort_key(features: Features) -> Any:
    return len(features["input_ids"]), features["input_ids"], features["labels"]
