"""Padding, batches and exact means, shared by the tasks and the trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from federated.config import TrainConfig
from federated.errors import DataError
from federated.tasks.protocol import Batch, Features

__all__ = [
    "exact_mean",
    "in_eval_mode",
    "pad_1d",
    "require_some",
    "sorted_batches",
    "step_count",
    "step_groups",
    "to_device_of",
]

_WINDOW = 4
"""Batches among which training examples are sorted by length: more saves more padding, and mixes less."""


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


def in_eval_mode(model: nn.Module) -> nn.Module:
    """The model in eval mode; looking costs a third of setting."""
    return model.eval() if any(module.training for module in model.modules()) else model


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


def step_groups(lengths: Sequence[int], config: TrainConfig, seed: int) -> list[list[list[int]]]:
    """Which examples each optimizer step sees, as batches of indices.

    Every pass is a new permutation, cut into batches of like lengths; one batch of a pass, and its last group of
    batches, may be short. Part of an epoch is that part of the examples, at least one.

    Args:
        lengths: of each example, in whatever unit it is padded.
        config: batch_size, gradient_accumulation, epochs or steps.
        seed: decides the order.
    """
    generator = torch.Generator().manual_seed(seed)
    count, per_step = len(lengths), config.gradient_accumulation
    left = count if config.steps else max(1, round(config.epochs * count))
    groups: list[list[list[int]]] = []
    while len(groups) < config.steps if config.steps else left > 0:
        order = torch.randperm(count, generator=generator)[:left].tolist()
        batches = _like_lengths(order, lengths, config.batch_size, generator)
        groups += [batches[start : start + per_step] for start in range(0, len(batches), per_step)]
        left -= 0 if config.steps else len(order)
    return groups[: config.steps] if config.steps else groups


def step_count(count: int, config: TrainConfig) -> int:
    """How many optimizer steps `step_groups` makes of ``count`` examples, at least 1: the server knows it as well."""
    if config.steps:
        return config.steps
    passes, rest = divmod(max(1, round(config.epochs * count)), count)

    def of_a_pass(examples: int) -> int:
        return math.ceil(math.ceil(examples / config.batch_size) / config.gradient_accumulation)

    return passes * of_a_pass(count) + of_a_pass(rest)


def _like_lengths(order: list[int], lengths: Sequence[int], size: int, generator: torch.Generator) -> list[list[int]]:
    """Cut an order into batches: sorted by length within a window of a few batches, the batches then shuffled.

    A batch is padded to its longest example; where lengths vary, half of a batch in plain order is padding.
    """
    batches: list[list[int]] = []
    for start in range(0, len(order), size * _WINDOW):
        window = sorted(order[start : start + size * _WINDOW], key=lengths.__getitem__)
        batches += [window[at : at + size] for at in range(0, len(window), size)]
    return [batches[at] for at in torch.randperm(len(batches), generator=generator).tolist()]
