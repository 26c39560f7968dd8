"""Canaries as gradients of single examples, through the batches, clipping and noise of DP-SGD.

Beside `federated.privacy.canaries`, for the unit example: an example whose gradient is a canary. How gradients of
single examples are made is no part of it; a reference holds that elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from federated.privacy.chance import NoiseSource
from federated.privacy.dp_sgd import PrivateGradients, PrivateSchedule
from federated.privacy.example_clipping import clipped_sum
from federated.state import Tensors

__all__ = ["ExampleLevelPath"]


class ExampleLevelPath:
    """What a step of private training does to its examples' gradients: draw, clip, sum, noise.

    Args:
        shapes: of a gradient.
        clip_norm: the bound.
        noise_multiplier: in units of it.
        sampling: with which probability an example is in a batch.
        expected_batch: what the sum is divided by.
        source: of batches and noise.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        clip_norm: float,
        noise_multiplier: float,
        sampling: float,
        expected_batch: int,
        source: NoiseSource,
    ) -> None:
        self._clip_norm = clip_norm
        self._parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
        self._made = PrivateGradients(
            self._parameters,
            PrivateSchedule(sampling, 1, expected_batch),
            clip_norm=clip_norm,
            noise_multiplier=noise_multiplier,
            source=source,
        )
        self._step = 0

    def __call__(self, members: Mapping[str, Tensors]) -> Tensors:
        """One step's private gradient."""
        self._step += 1
        names = list(members)
        (batch,) = self._made.batches([1] * len(names))
        rows = [members[names[index]] for index in batch]
        gradients = {name: torch.stack([row[name] for row in rows]).float() for name in self._parameters if rows}
        self._made.fill(self._step, batch, [clipped_sum(gradients, self._clip_norm)] if rows else [])
        return {name: one.grad.detach().clone() for name, one in self._parameters.items() if one.grad is not None}
