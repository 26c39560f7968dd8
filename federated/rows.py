"""What a task is asked and what it answers, as plain data: rows in, predictions out.

No torch, so that every backend of a device reads the same rows, refuses the same ones and gives answers of one form.
Called by `federated.tasks` and `federated.device.backends`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from federated.errors import DataError, ModelError

__all__ = ["NEW_TOKENS", "PREDICT_BATCH", "Prediction", "Row", "classified", "series_of", "some_text_of", "text_of"]

Row = Mapping[str, Any]
"""One example as data rooms deliver it, e.g. ``{"text": str, "label": int}``."""

NEW_TOKENS = 32
"""Longest continuation of a text, in tokens."""

PREDICT_BATCH = 64
"""Rows that are answered together."""


@dataclass(frozen=True)
class Prediction:
    """One answer.

    Args:
        label: class name, or the generated continuation.
        probability: of the label; for a continuation the geometric mean of its tokens' probabilities.
        scores: probability of each class by name; empty for a continuation.
    """

    label: str
    probability: float
    scores: Mapping[str, float] = field(default_factory=dict)


def classified(labels: Sequence[str], probabilities: Sequence[float]) -> Prediction:
    """The most likely label, the first of equal ones.

    Args:
        labels: class names.
        probabilities: one for each label.

    Raises:
        ModelError: if there are more or fewer.
    """
    if len(probabilities) != len(labels):
        raise ModelError(f"the model has {len(probabilities)} classes, the task {len(labels)} labels")
    scores = dict(zip(labels, probabilities, strict=True))
    best = max(scores, key=lambda label: scores[label])
    return Prediction(best, scores[best], scores)


def text_of(row: Row, number: int) -> str:
    """A row's text, which may be empty.

    Raises:
        DataError: if there is none; the row is named by its number, never by its content.
    """
    text = row.get("text")
    if not isinstance(text, str):
        raise DataError(f"row {number}: found {type(text).__name__} under 'text', expected a string")
    return _whole(text, number)


def some_text_of(row: Row, number: int) -> str:
    """A row's text, which may not be empty.

    Raises:
        DataError: if there is none.
    """
    text = row.get("text")
    if not isinstance(text, str) or not text:
        raise DataError(f"row {number}: expected a text that is not empty under 'text'")
    return _whole(text, number)


def _whole(text: str, number: int) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"row {number}: the text holds half of a surrogate pair, which is no character") from None
    return text


def series_of(rows: Sequence[Row], max_length: int) -> list[list[list[float]]]:
    """Each row's series ``[[float] * channels] * time``.

    Args:
        rows: with ``values``.
        max_length: time steps kept, from the start.

    Raises:
        DataError: if a row's ``values`` are not a series of finite numbers with as many channels as the first row.
    """
    series = [_one_series(row, number) for number, row in enumerate(rows, start=1)]
    for number, one in enumerate(series, start=1):
        if any(len(step) != len(series[0][0]) for step in one):
            raise DataError(f"row {number}: a step has another number of channels than row 1 ({len(series[0][0])})")
    return [one[:max_length] for one in series]


def _one_series(row: Row, number: int) -> list[list[float]]:
    try:
        series = [[float(value) for value in step] for step in row["values"]]
    except (KeyError, TypeError, ValueError):
        series = []
    if not series or not series[0] or not all(math.isfinite(value) for step in series for value in step):
        raise DataError(f"row {number}: 'values' is not a series of finite numbers; expected [[float, ...], ...]")
    return series
