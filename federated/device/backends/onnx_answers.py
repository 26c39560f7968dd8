"""Rows to a model's inputs, and its logits to answers, in numpy: what `federated.tasks` does in torch.

The same rows are read and refused, and answers differ by float32's last bits alone. Texts go through ``tokenizers``,
without transformers; so chats, whose template transformers renders, are not answered here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from federated.config import TaskConfig
from federated.errors import DeviceError, ModelError
from federated.manifest import sha256_hex
from federated.onnx_layout import OnnxBase, OnnxTokenizer
from federated.rows import NEW_TOKENS, PREDICT_BATCH, Prediction, Row, classified, series_of, some_text_of, text_of

__all__ = ["Answerer", "Run", "answerer"]

Inputs = Mapping[str, npt.NDArray[Any]]
Run = Callable[[Inputs], npt.NDArray[np.float32]]
"""Padded inputs to logits, with one adapter."""


class Answerer(Protocol):
    """Answers one task's rows."""

    def predict(self, run: Run, rows: Sequence[Row]) -> list[Prediction]:
        """Answers in the order of the rows.

        Raises:
            DataError: for a row that is not of the task's shape.
        """
        ...


def answerer(record: OnnxBase, task: TaskConfig, tokenizer_file: Path) -> Answerer:
    """What asks an exported base.

    Args:
        record: the base's.
        task: in the record.
        tokenizer_file: beside the base, where the record says that there is one.

    Raises:
        ModelError: if the tokenizer is missing or another one.
        DeviceError: for chats.
    """
    if task.name == "sensor":
        return _Series(task)
    if task.chat:
        raise DeviceError("the base answers chats, whose template needs transformers: serve it with torch")
    if record.tokenizer is None:
        raise ModelError(f"the exported base says nothing of a tokenizer, which task {task.name} needs")
    tokenizer = _tokenizer(tokenizer_file, record.tokenizer)
    kind = _Continuations if task.name == "causal_lm" else _Texts
    return kind(task, record.tokenizer, tokenizer)


def _tokenizer(path: Path, known: OnnxTokenizer) -> Tokenizer:
    try:
        rules = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}; expected the tokenizer that was exported with the base") from None
    if sha256_hex(rules) != known.digest:
        raise ModelError(f"{path} is not the tokenizer that was exported with the base; copy the whole folder again")
    return Tokenizer.from_buffer(rules)


def _padded(sequences: Sequence[Sequence[int]], value: int) -> npt.NDArray[np.int64]:
    longest = max(len(sequence) for sequence in sequences)
    return np.array([[*one, *[value] * (longest - len(one))] for one in sequences], np.int64)


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found: npt.NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def _classified(run: Run, labels: Sequence[str], batches: Sequence[Inputs]) -> list[Prediction]:
    chances = [np.exp(_log_softmax(run(batch))) for batch in batches]
    return [classified(labels, row) for part in chances for row in part.tolist()]


class _Texts:
    """Classification of texts."""

    def __init__(self, task: TaskConfig, known: OnnxTokenizer, tokenizer: Tokenizer) -> None:
        # once: changing it while another thread uses it fails
        tokenizer.enable_truncation(task.max_length, direction=known.truncation_side)
        self._labels, self._pad, self._tokenizer = task.labels, known.pad, tokenizer

    def predict(self, run: Run, rows: Sequence[Row]) -> list[Prediction]:
        texts = [text_of(row, number) for number, row in enumerate(rows, start=1)]
        ids = [one.ids or [self._pad] for one in self._tokenizer.encode_batch(texts)]
        parts = [ids[start : start + PREDICT_BATCH] for start in range(0, len(ids), PREDICT_BATCH)]
        return _classified(run, self._labels, [self._batch(part) for part in parts])

    def _batch(self, ids: Sequence[Sequence[int]]) -> Inputs:
        return {"input_ids": _padded(ids, self._pad), "attention_mask": _padded([[1] * len(one) for one in ids], 0)}


class _Series:
    """Classification of series of sensor values."""

    def __init__(self, task: TaskConfig) -> None:
        self._labels, self._max_length = task.labels, task.max_length

    def predict(self, run: Run, rows: Sequence[Row]) -> list[Prediction]:
        series = series_of(rows, self._max_length)
        parts = [series[start : start + PREDICT_BATCH] for start in range(0, len(series), PREDICT_BATCH)]
        return _classified(run, self._labels, [self._batch(part) for part in parts])

    def _batch(self, series: Sequence[Sequence[Sequence[float]]]) -> Inputs:
        mask = _padded([[1] * len(one) for one in series], 0)
        values = np.zeros((*mask.shape, len(series[0][0])), np.float32)
        for row, one in zip(values, series, strict=True):
            row[: len(one)] = one
        return {"values": values, "attention_mask": mask}


class _Continuations:
    """A short greedy continuation of each text; every step computes the whole text anew, as the base keeps no cache."""

    def __init__(self, task: TaskConfig, known: OnnxTokenizer, tokenizer: Tokenizer) -> None:
        self._max_length, self._stop, self._tokenizer = task.max_length, set(known.stop), tokenizer

    def predict(self, run: Run, rows: Sequence[Row]) -> list[Prediction]:
        texts = [some_text_of(row, number) for number, row in enumerate(rows, start=1)]
        return [self._continue(run, one.ids[-self._max_length :]) for one in self._tokenizer.encode_batch(texts)]

    def _continue(self, run: Run, prompt: Sequence[int]) -> Prediction:
        tokens: list[int] = []
        chances: list[float] = []
        while len(tokens) < NEW_TOKENS and not self._stop & set(tokens[-1:]):
            ids = np.array([[*prompt, *tokens]], np.int64)
            logits = run({"input_ids": ids, "attention_mask": np.ones_like(ids)})[0, -1]
            tokens.append(int(logits.argmax()))
            chances.append(float(_log_softmax(logits)[tokens[-1]]))
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return Prediction(text, float(np.exp(np.mean(chances))))
