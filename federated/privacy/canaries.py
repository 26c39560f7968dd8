"""Canaries through the real mechanism: the clipping, sampling and noise that a run uses, without a model.

Each canary is an update of its own direction, orthogonal to all others and ten times as long as the clipping norm, and
spread over several tensors: a missing bound, a bound for each tensor apart, or weak noise shows at once. Its sign turns
from step to step, so that noise that comes twice cancels out in the difference of two steps and leaves the canary bare.

Two adversaries. One sees the sum of all releases, like somebody who has the last version. One sees each release, like
a client that takes part in every round: it looks at each step and each difference of neighbouring steps, too.

An audit of the mechanism, not of a training run: it finds faults of the code, whatever the model would have learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from federated.errors import PrivacyError
from federated.privacy.audit import Bound, Flags, Floats, ceiling, lower_bound
from federated.privacy.chance import NoiseSource
from federated.privacy.client_level import NoisySum
from federated.privacy.cohorts import PoissonCohorts
from federated.state import Tensors

__all__ = ["Audit", "Canaries", "ClientLevelPath", "Mechanism", "Views", "audit_mechanism", "sign_of"]

Mechanism = Callable[[Mapping[str, Tensors]], Tensors]
"""One step: from the members' updates by name to what is released."""
Views = Callable[[Floats], dict[str, Floats]]
"""From scores [steps, canaries] of each release to further scores of each canary, by name."""
_LENGTH = 10.0
"""Of a canary, in clipping norms."""


class Canaries(Mapping[str, Tensors]):
    """The updates of those canaries that were put in, made when they are asked for.

    Args:
        included: which are in.
        layers: tensors that each is spread over.
        clip_norm: each is ten times as long.
        sign: of this step.
    """

    def __init__(self, included: Flags, *, layers: int, clip_norm: float, sign: float = 1.0) -> None:
        self._included = included
        self._layers = layers
        self._value = sign * _LENGTH * clip_norm / layers**0.5

    @staticmethod
    def names(count: int) -> list[str]:
        """Of all canaries, put in or not."""
        return [f"canary-{index:05d}" for index in range(count)]

    @staticmethod
    def shapes(count: int, layers: int) -> dict[str, tuple[int, ...]]:
        """Of an update's tensors: one value for each canary in each layer."""
        return {f"layer-{layer:02d}": (count,) for layer in range(layers)}

    def __getitem__(self, name: str) -> Tensors:
        index = int(name.rpartition("-")[2])
        if not self._included[index]:
            raise KeyError(name)
        vector = torch.zeros(len(self._included), dtype=torch.float64)
        vector[index] = self._value
        return dict.fromkeys(self.shapes(len(vector), self._layers), vector)

    def __iter__(self) -> Iterator[str]:
        return (name for name, one in zip(self.names(len(self._included)), self._included, strict=True) if one)

    def __len__(self) -> int:
        return int(self._included.sum())


class ClientLevelPath:
    """What a round with client-level privacy does to its updates: draw, clip, sum, noise.

    Args:
        shapes: of an update.
        clip_norm: the bound.
        noise_multiplier: in units of it.
        planned: the planned cohort.
        source: of the noise.
        fraction: with which probability each client is in a cohort.
        cohorts: who draws; None asks everybody in each round.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        clip_norm: float,
        noise_multiplier: float,
        planned: float,
        source: NoiseSource,
        fraction: float = 1.0,
        cohorts: PoissonCohorts | None = None,
    ) -> None:
        self._shapes = shapes
        self._clip_norm = clip_norm
        self._noise_multiplier = noise_multiplier
        self._planned = planned
        self._source = source
        self._fraction = fraction
        self._cohorts = cohorts

    def __call__(self, members: Mapping[str, Tensors]) -> Tensors:
        """One round's release."""
        noisy = NoisySum(
            self._shapes,
            clip_norm=self._clip_norm,
            noise_multiplier=self._noise_multiplier,
            planned=self._planned,
            source=self._source,
        )
        drawn = self._cohorts.draw(self._fraction) if self._cohorts else tuple(members)
        for name in drawn:
            if name in members:
                noisy.add(members[name])
        return noisy.release().mean


def sign_of(step: int) -> float:
    """Of all canaries in a step, from 0."""
    return 1.0 - 2.0 * (step % 2)


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Args:
        bound: the lower bound at 95 %.
        canaries: how many there were.
        steps: releases that were looked at.
        ceiling: the largest bound that so many canaries could have given.
        target_delta: of the claim.
        accounted: the claimed epsilon.
        each_step: whether the adversary saw each release, or their sum alone.
    """

    bound: Bound
    canaries: int
    steps: int
    ceiling: float
    target_delta: float
    accounted: float
    each_step: bool

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the claim."""
        return self.bound.epsilon <= self.accounted

    @property
    def threat_model(self) -> str:
        """Who the adversary is, in words."""
        seen = "each release" if self.each_step else "the sum of all releases"
        return (
            f"sees {seen}, not the noise and not who was sampled; chooses every client's update, and knows all but "
            "which of them were in"
        )


def audit_mechanism(
    path: Mechanism,
    *,
    canaries: int,
    steps: int,
    clip_norm: float,
    accounted: float,
    target_delta: float,
    layers: int = 8,
    each_step: bool = False,
    further: Views | None = None,
    seed: int = 0,
) -> Audit:
    """Push canaries through a mechanism and bound what it leaks from below.

    Args:
        path: the mechanism; it is given `Canaries` of ``layers`` tensors.
        canaries: how many; each is put in by a fair coin.
        steps: releases.
        clip_norm: the bound that it says it has.
        accounted: the epsilon that is claimed for all steps together.
        target_delta: of that claim.
        layers: tensors that a canary is spread over.
        each_step: let the adversary see each release.
        further: what else it looks at then.
        seed: of the coins alone, never of the mechanism.

    Raises:
        PrivacyError: for fewer than two canaries or one step.
    """
    if canaries < 2 or steps < 1:
        raise PrivacyError(f"{canaries} canaries and {steps} steps: an audit needs two canaries and one step")
    chance = np.random.default_rng(seed)
    included = chance.random(canaries) < 0.5
    scores = np.zeros((steps, canaries))
    for step in range(steps):
        sign = sign_of(step)
        released = path(Canaries(included, layers=layers, clip_norm=clip_norm, sign=sign))
        scores[step] = sign * sum(tensor.double().numpy() for tensor in released.values())
    views = _views(scores, each_step=each_step)
    if each_step and further is not None:
        views |= further(scores)
    return Audit(
        lower_bound(views, included, target_delta=target_delta),
        canaries,
        steps,
        ceiling(canaries, target_delta=target_delta, views=len(views)),
        target_delta,
        accounted,
        each_step,
    )


def _views(scores: Floats, *, each_step: bool) -> dict[str, Floats]:
    """The score of each canary by what the adversary looks at; signs are turned back."""
    views = {"all steps together": scores.sum(axis=0)}
    if each_step:
        views |= {f"step {number + 1}": row for number, row in enumerate(scores)}
        views |= {
            f"steps {number + 1} and {number + 2}": scores[number] + scores[number + 1]
            for number in range(len(scores) - 1)
        }
    return views
