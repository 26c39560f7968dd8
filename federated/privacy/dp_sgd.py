"""DP-SGD's gradients: of a Poisson batch, clipped for each example, with noise, over the expected size of a batch.

    g = (sum_{i in batch} clip(g_i, C) + sigma * C * N(0, I)) / (q * n)

An empty batch is a step of noise alone. What is added afterwards (a proximal term, a shift, a penalty, a bound on the
whole) and the optimizer see g and no data: that costs no privacy. This module decides nothing about budgets: a caller
asks `private_schedule` first and charges that, since whatever started may have been seen.

Source: Abadi et al., "Deep Learning with Differential Privacy", 2016, algorithm 1, with Poisson sampling and the
expected batch size as the divisor (Mironov et al., "Renyi Differential Privacy of the Sampled Gaussian Mechanism",
2019). Neighbouring data sets differ in one example, added or removed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from federated.config import TrainConfig
from federated.errors import PrivacyError
from federated.privacy.chance import NoiseSource, poisson_batches
from federated.privacy.example_clipping import ClippedSum, clipped_sum
from federated.privacy.per_sample import BatchLoss, Gradients

__all__ = [
    "Observed",
    "PrivateGradients",
    "PrivateSchedule",
    "check_private_training",
    "micro_batches",
    "private_schedule",
]


@dataclass(frozen=True)
class PrivateSchedule:
    """What is to be accounted of one run of local training.

    Args:
        sampling: q, the probability of each example to be in the batch of a step.
        steps: how many batches are drawn.
        expected_batch: ``q * n``.
    """

    sampling: float
    steps: int
    expected_batch: int


@dataclass(frozen=True)
class Observed:
    """One step seen from inside, for tests and audits.

    Args:
        step: from 1.
        indices: the examples of the batch, in the order that they were computed in.
        norms: of their gradients before clipping, float64 [n]; NaN where a gradient was not finite.
        clipped: the clipped sum by name.
        noise: what is added to it, by name.

    Privacy: private, all of it.
    """

    step: int
    indices: Sequence[int]
    norms: Tensor
    clipped: Mapping[str, Tensor]
    noise: Mapping[str, Tensor]


def private_schedule(count: int, config: TrainConfig) -> PrivateSchedule:
    """What a run over ``count`` examples would do; nothing is drawn or computed.

    The expected batch is ``batch_size * gradient_accumulation``, and q is that over ``count``, exactly; an epoch is 1/q
    steps, and part of a step counts as one.

    Raises:
        PrivacyError: for fewer than two examples, or an expected batch larger than the data.
    """
    batch = config.batch_size * config.gradient_accumulation
    if count < 2:
        raise PrivacyError("privacy.example needs at least two training examples, and this client has fewer")
    if batch > count:
        raise PrivacyError(
            f"train.batch_size * train.gradient_accumulation = {batch} is more than this client's training examples, "
            "and no example can be in a batch more often than always; set a smaller train.batch_size"
        )
    steps = config.steps or max(1, math.ceil(round(config.epochs * count / batch, 9)))
    return PrivateSchedule(batch / count, steps, batch)


def check_private_training(config: TrainConfig) -> None:
    """Refuse settings that would let data past the noise.

    Raises:
        PrivacyError: for a schedule that follows the loss, or a loss scale that follows the gradients.
    """
    if config.scheduler == "ReduceLROnPlateau":
        raise PrivacyError(
            "train.scheduler = ReduceLROnPlateau follows the training loss, which privacy.example does not give away; "
            "choose a schedule of steps"
        )
    if config.precision == "float16":
        raise PrivacyError(
            "train.precision = float16 scales the loss by what the gradients are, which is not protected under "
            "privacy.example; set bfloat16 or float32"
        )


class PrivateGradients:
    """Fills the parameters' ``grad`` with private gradients, step after step.

    Attributes:
        parameters: as given.
        schedule: as given.

    Args:
        parameters: what is trained, by name; noise is drawn in this order.
        schedule: of the run.
        clip_norm: C, positive.
        noise_multiplier: sigma, positive.
        source: of batches and noise.
        observer: is shown each step, before the optimizer moves.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        schedule: PrivateSchedule,
        *,
        clip_norm: float,
        noise_multiplier: float,
        source: NoiseSource,
        observer: Callable[[Observed], None] | None = None,
    ) -> None:
        if not (noise_multiplier > 0 and math.isfinite(noise_multiplier)):
            raise PrivacyError(
                f"the noise multiplier is {noise_multiplier}, with which nothing is private; expected a positive number: "
                "set privacy.example.noise_multiplier, or solve for privacy.target_epsilon first"
            )
        self.parameters = parameters
        self.schedule = schedule
        self._clip_norm = clip_norm
        self._noise_multiplier = noise_multiplier
        self._source = source
        self._observer = observer

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """The batches of all steps, each sorted by length for little padding; what is in them is as it was drawn."""
        drawn = poisson_batches(len(lengths), self.schedule.sampling, steps=self.schedule.steps, source=self._source)
        return [sorted(batch, key=lengths.__getitem__) for batch in drawn]

    def fill(self, step: int, indices: Sequence[int], parts: Sequence[ClippedSum]) -> None:
        """Set every parameter's ``grad`` to the private gradient.

        Args:
            step: from 1.
            indices: the examples of the batch.
            parts: the clipped sums of its micro-batches; none for an empty batch.
        """
        clipped = {name: _added(one, [part.tensors[name] for part in parts]) for name, one in self.parameters.items()}
        noise = self._noise()
        if self._observer is not None:
            norms = torch.cat([part.norms for part in parts]) if parts else torch.zeros(0, dtype=torch.float64)
            self._observer(Observed(step, tuple(indices), norms, clipped, noise))
        for name, parameter in self.parameters.items():
            made = (clipped[name] + noise[name]) / self.schedule.expected_batch
            parameter.grad = made.to(parameter.dtype)

    def clipped(self, made: Gradients, loss: BatchLoss, batch: dict[str, Tensor]) -> ClippedSum:
        """The clipped sum of one micro-batch."""
        return clipped_sum(made.gradients(loss, batch), self._clip_norm)

    def metrics(self) -> dict[str, float]:
        """What is to be accounted: ``dp_steps``, ``dp_sampling`` (q) and ``dp_noise_multiplier``; all known before."""
        return {
            "dp_steps": float(self.schedule.steps),
            "dp_sampling": self.schedule.sampling,
            "dp_noise_multiplier": self._noise_multiplier,
        }

    def _noise(self) -> dict[str, Tensor]:
        """All of a step's noise in one draw."""
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        parts = self._source.normal(sum(sizes)).mul_(self._noise_multiplier * self._clip_norm).split(sizes)
        named = zip(self.parameters.items(), parts, strict=True)
        return {name: part.view(one.shape).to(one.device) for (name, one), part in named}


def _added(parameter: nn.Parameter, parts: Sequence[Tensor]) -> Tensor:
    """The sum of the parts in float32, or zeros."""
    if not parts:
        return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
    return sum(parts[1:], start=parts[0])


def micro_batches(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    """A batch in parts of at most ``size``, nearly equal: whatever was drawn, never more memory than for one batch."""
    count = math.ceil(len(indices) / size)
    cuts = [len(indices) * one // count for one in range(count + 1)] if count else []
    return [indices[start:stop] for start, stop in zip(cuts, cuts[1:], strict=False)]
