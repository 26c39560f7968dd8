"""Series of sensor values as a classifier's inputs: the proof that a task needs no text and no transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from federated.errors import DataError
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
        series = [_series_of(row, number) for number, row in enumerate(rows, start=1)]
        for number, one in enumerate(series, start=1):
            if any(len(step) != len(series[0][0]) for step in one):
                raise DataError(f"row {number}: a step has another number of channels than row 1 ({len(series[0][0])})")
        return [{"values": one[: self._max_length]} for one in series]

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


def _series_of(row: Row, number: int) -> list[list[float]]:
    try:
        series = [[float(value) for value in step] for step in row["values"]]
    except (KeyError, TypeError, ValueError):
        series = []
    if not series or not series[0] or not all(math.isfinite(value) for step in series for value in step):
        raise DataError(f"row {number}: 'values' is not a series of finite numbers; expected [[float, ...], ...]")
    return series
