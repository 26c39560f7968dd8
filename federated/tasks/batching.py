"""Padding, batches and exact means, shared by the tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from federated.errors import DataError
from federated.tasks.protocol import Batch, Features

__all__ = ["exact_mean", "pad_1d", "require_some", "sorted_batches", "to_device_of"]


def require_some(items: Sequence[Any], what: str) -> None:
    """Refuse an empty sequence.

    Raises:
        DataError: if it is empty.
    """
    if len(items) == 0:
        raise DataError(f"there are no {what}; expected at least one")


def pad_1d(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    """Integer sequences as int64 [batch, longest], filled up on the right with ``value``."""
    longest = max(len(sequence) for sequence in sequences)
    return torch.tensor([[*sequence, *[value] * (longest - len(sequence))] for sequence in sequences])


def to_device_of(model: nn.Module, batch: Batch) -> Batch:
    """The batch on the model's device; not copied when it is there already."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def sorted_batches(
    features: Sequence[Features], batch_size: int, key: Callable[[Features], Any]
) -> Iterator[list[Features]]:
    """Batches of like lengths, cut from one canonical order: the same batches whatever order the features come in."""
    ordered = sorted(features, key=key)
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


def exact_mean(values: Sequence[float]) -> float:
    """The correctly rounded mean: independent of order."""
    return math.fsum(values) / len(values)
