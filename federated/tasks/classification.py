"""Classification of texts or series: cross-entropy per row, accuracy and macro-F1.

What differs between text and sensor data is how a row becomes inputs; that is an `Inputs` object.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from federated.errors import DataError
from federated.rows import PREDICT_BATCH, classified, text_of
from federated.tasks.batching import exact_mean, in_eval_mode, pad_1d, require_some, sorted_batches, to_device_of
from federated.tasks.protocol import Batch, Evaluation, Features, Prediction, Row

__all__ = ["Classification", "Inputs", "TextInputs", "macro_f1"]


class Inputs(Protocol):
    """How rows become a model's inputs."""

    def encode(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Inputs of each row, unpadded.

        Raises:
            DataError: for a row of another shape.
        """
        ...

    def collate(self, features: Sequence[Features]) -> Batch:
        """Pad to the longest; the keys are the arguments of the model."""
        ...

    def values(self, features: Features) -> Sequence[Any]:
        """What is padded: one entry per token or time step."""
        ...


class TextInputs:
    """Texts through a tokenizer.

    Args:
        tokenizer: transformers tokenizer with a padding token.
        max_length: tokens kept of each text.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length

    def encode(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Token ids of each row's ``text``; a text without any token becomes one padding token.

        Raises:
            DataError: if a row has no text.
        """
        texts = [text_of(row, number) for number, row in enumerate(rows, start=1)]
        encoded = self._tokenizer(texts, truncation=True, max_length=self._max_length, padding=False)["input_ids"]
        return [{"input_ids": list(ids) or [self._tokenizer.pad_token_id]} for ids in encoded]

    def collate(self, features: Sequence[Features]) -> Batch:
        """``input_ids`` and ``attention_mask``, both int64 [batch, longest]."""
        ids = [one["input_ids"] for one in features]
        return {
            "input_ids": pad_1d(ids, self._tokenizer.pad_token_id),
            "attention_mask": pad_1d([[1] * len(one) for one in ids], 0),
        }

    def values(self, features: Features) -> Sequence[Any]:
        """The tokens."""
        tokens: list[int] = features["input_ids"]
        return tokens


class Classification:
    """One label per row.

    Args:
        name: the task's name.
        labels: class names; a row's ``label`` is an index into them.
        inputs: how rows become inputs.
    """

    def __init__(self, name: str, labels: Sequence[str], inputs: Inputs) -> None:
        self.name = name
        self.labels = tuple(labels)
        self._inputs = inputs

    def encode(self, rows: Sequence[Row]) -> list[Features]:
        """Inputs and label of each row.

        Raises:
            DataError: for no rows, or a row without a text (series) or a known label.
        """
        require_some(rows, "rows")
        labels = [self._label_of(row, number) for number, row in enumerate(rows, start=1)]
        return [{**one, "label": label} for one, label in zip(self._inputs.encode(rows), labels, strict=True)]

    def _label_of(self, row: Row, number: int) -> int:
        label = row.get("label")
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(self.labels):
            raise DataError(
                f"row {number}: label is not an index from 0 to {len(self.labels) - 1} into {list(self.labels)}"
            )
        return label

    def length(self, features: Features) -> int:
        """Tokens or time steps of an example."""
        return len(self._inputs.values(features))

    def collate(self, features: Sequence[Features]) -> Batch:
        """Padded inputs, and ``labels`` int64 [batch]."""
        return {**self._inputs.collate(features), "labels": torch.tensor([one["label"] for one in features])}

    def per_sample_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of each row, float32 [batch]."""
        logits, labels = self._logits(model, batch)
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    def _logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        placed = to_device_of(model, batch)
        labels = placed.pop("labels")
        return model(**placed).float(), labels

    def evaluate(self, model: nn.Module, features: Sequence[Features], *, batch_size: int) -> Evaluation:
        """Mean loss, ``accuracy`` and ``macro_f1`` (over the classes that occur in the data or the answers).

        Raises:
            DataError: for no features.
        """
        require_some(features, "examples to evaluate on")
        losses, truth, answers = self._run(in_eval_mode(model), features, batch_size)
        hits = sum(int(one == other) for one, other in zip(truth, answers, strict=True))
        metrics = {"accuracy": hits / len(truth), "macro_f1": macro_f1(truth, answers)}
        return Evaluation(exact_mean(losses), len(features), metrics)

    @torch.no_grad()
    def _run(
        self, model: nn.Module, features: Sequence[Features], batch_size: int
    ) -> tuple[list[float], list[int], list[int]]:
        losses: list[float] = []
        truth: list[int] = []
        answers: list[int] = []
        for part in sorted_batches(features, batch_size, self._sort_key):
            logits, labels = self._logits(model, self.collate(part))
            losses += nn.functional.cross_entropy(logits, labels, reduction="none").tolist()
            truth += labels.tolist()
            answers += logits.argmax(-1).tolist()
        return losses, truth, answers

    def _sort_key(self, features: Features) -> Any:
        values = self._inputs.values(features)
        return len(values), values, features["label"]

    @torch.no_grad()
    def predict(self, model: nn.Module, rows: Sequence[Row]) -> list[Prediction]:
        """The most likely label of each row, with the probability of every label."""
        model.eval()
        features = self._inputs.encode(rows)
        made: list[Prediction] = []
        for start in range(0, len(features), PREDICT_BATCH):
            batch = to_device_of(model, self._inputs.collate(features[start : start + PREDICT_BATCH]))
            made += [classified(self.labels, row) for row in model(**batch).float().softmax(-1).tolist()]
        return made


def macro_f1(truth: list[int], answers: list[int]) -> float:
    """Unweighted mean of the classes' F1, over classes that occur among truth or answers.

    >>> macro_f1([0, 0, 1], [0, 1, 1])
    0.6666666666666666
    """
    scores = []
    for label in sorted({*truth, *answers}):
        hits = sum(1 for one, other in zip(truth, answers, strict=True) if one == other == label)
        scores.append(2 * hits / (truth.count(label) + answers.count(label)))
    return exact_mean(scores)
