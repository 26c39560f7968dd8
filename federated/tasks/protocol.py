"""What a task is: how rows become batches, what a sample's loss is, how a model is measured and asked.

A task knows no adapter, no optimizer and no federation; any callable module that returns what the task expects will
do. The loss of a sample never depends on the other samples of its batch: a per-sample gradient bound means nothing
otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from federated.rows import Prediction, Row

__all__ = ["Batch", "Evaluation", "Features", "Prediction", "Row", "Task"]

Features = Mapping[str, Any]
"""One encoded example: plain lists and numbers, made once and used in many batches."""

Batch = dict[str, Tensor]
"""Padded tensors, the batch first; ``labels`` among them."""


@dataclass(frozen=True)
class Evaluation:
    """A model measured on held-out examples.

    Args:
        loss: mean of the per-sample losses.
        num_examples: how many samples.
        metrics: e.g. ``accuracy`` and ``macro_f1``, or ``perplexity`` and ``token_accuracy``.
    """

    loss: float
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, float]:
        """One flat record: loss, num_examples and every metric."""
        return {"loss": self.loss, "num_examples": self.num_examples, **self.metrics}


class Task(Protocol):
    """A kind of learning problem over rows of one shape."""

    @property
    def name(self) -> str:
        """The task's name in the configuration."""
        ...

    def encode(self, rows: Sequence[Row]) -> list[Features]:
        """Turn rows into features, once.

        Raises:
            DataError: for no rows, or a row that is not of this task's shape (named by its number, never its content).
        """
        ...

    def length(self, features: Features) -> int:
        """How long an example is before padding, in tokens or time steps."""
        ...

    def collate(self, features: Sequence[Features]) -> Batch:
        """Pad features to the longest among them."""
        ...

    def per_sample_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Loss of each sample, float32 [batch], on the model's device, with gradient."""
        ...

    def evaluate(self, model: nn.Module, features: Sequence[Features], *, batch_size: int) -> Evaluation:
        """Measure a model without gradient; it is left in eval mode. The order of ``features`` does not matter.

        Raises:
            DataError: for no features.
        """
        ...

    def predict(self, model: nn.Module, rows: Sequence[Row]) -> list[Prediction]:
        """Answer rows in their order; labels are not looked at.

        Raises:
            DataError: for a row that is not of this task's shape.
        """
        ...
