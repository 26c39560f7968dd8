"""Series of sensor values as a classifier's inputs: the proof that a task needs no text and no transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from federated.rows import series_of
from federated.tasks.batching import pad_1d
from federated.tasks.protocol import Batch, Features, Row

__all__ = ["SeriesInputs"]


class SeriesInputs:
    """Series ``[[float] * channels] * time``, padded in time.

    Args:
        max_length: time steps kept, from the start.
    """

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length

    def encode(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """The values of each row.

        Raises:
            DataError: if a row's ``values`` are not a series of finite numbers with as many channels as the first row.
        """
        return [{"values": one} for one in series_of(rows, self._max_length)]

    def collate(self, features: Sequence[Features]) -> Batch:
        """``values`` float32 [batch, longest, channels], ``attention_mask`` int64 [batch, longest]."""
        series = [torch.tensor(one["values"], dtype=torch.float32) for one in features]
        return {
            "values": torch.nn.utils.rnn.pad_sequence(series, batch_first=True),
            "attention_mask": pad_1d([[1] * len(one) for one in series], 0),
        }

    def values(self, features: Features) -> Sequence[Any]:
        """The time steps."""
        steps: list[list[float]] = features["values"]
        return steps
