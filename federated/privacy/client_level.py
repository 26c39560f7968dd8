"""Client-level differential privacy: a version depends little on all that any one client has (DP-FedAvg).

    release = ( sum over the clients that came of  d_k min(1, C / ||d_k||)   +   N(0, (z C)^2 I) ) / m

with the clipping norm C, the noise multiplier z and the planned cohort m. The norm is that of all tensors of an update
together, heads and factors alike: one bound, however many layers there are. All clients weigh the same, for a number of
examples is a claim. One client changes the sum by at most C, whatever it sends: the release is one Gaussian mechanism
of multiplier z for the relation "add or remove one client".

Fewer replies than planned: the sum of those that came gets the same noise and is still divided by m. A client's
influence stays at most C / m, and the release is drawn towards zero by the share that is missing. Dividing by those
who came would let the absence of some raise the influence of the others.

Noise may also go on from that of the rounds before (`federated.privacy.banded`); then it is not N(0, (z C)^2 I) of
itself, and what a round costs is said there.

Source: McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018, algorithm 1, with the
fixed denominator of its estimator f_f and equal weights. `federated.aggregation.private_mean` puts it in front of a
rule, `federated.privacy.audit` drives it with canaries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from federated.delta import norm
from federated.errors import AggregationError, PrivacyError
from federated.privacy.banded import column_norm
from federated.privacy.chance import NoiseSource
from federated.privacy.noise_chain import NoiseChain
from federated.state import Tensors
from federated.sums import WeightedSum

__all__ = ["Clipped", "NoisySum", "Released", "clip"]

Shapes = Mapping[str, tuple[int, ...]]


class Clipped(NamedTuple):
    """A clipped update.

    Args:
        tensors: float64, new.
        norm: L2 norm before clipping, over all tensors together.
        share: what the update was multiplied by, in (0, 1].
    """

    tensors: dict[str, Tensor]
    norm: float
    share: float


def clip(update: Tensors, clip_norm: float) -> Clipped:
    """Scale an update down to the clipping norm, if it is longer: one bound for all of its tensors together.

    Tensors are told apart by name, in any order. An update of zeros stays as it is.

    >>> clip({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, 1.0).share
    0.2

    Args:
        update: name to tensor of any shape and float dtype; left alone.
        clip_norm: finite and > 0.

    Raises:
        AggregationError: if a value is not finite. A share of what has no length would be no bound.
        PrivacyError: for a clipping norm that bounds nothing.

    Privacy: the norm and the share are exact; nothing is protected before noise.
    """
    _check_clip_norm(clip_norm)
    length = norm(update)
    if not math.isfinite(length):
        raise AggregationError("the update holds values that are not finite: it cannot be clipped, and counts as none")
    share = min(1.0, clip_norm / length) if length > 0 else 1.0
    return Clipped({name: tensor.double() * share for name, tensor in update.items()}, length, share)


def _check_clip_norm(clip_norm: float) -> None:
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise PrivacyError(f"clipping norm {clip_norm}: expected a finite number > 0")


@dataclass(frozen=True)
class Released:
    """What one round gives out.

    Args:
        mean: noised sum over the planned cohort, float64.
        noise_std: standard deviation of the noise on each value of the mean.
        unclipped: noised share of the updates that were not longer than the clipping norm, for adaptive clipping; None
            where it is not asked for. Noise may take it out of [0, 1].
    """

    mean: dict[str, Tensor]
    noise_std: float
    unclipped: float | None = None


class NoisySum:
    """One round's sum of clipped updates, released once, with noise.

    Args:
        shapes: name to shape of every tensor of an update.
        clip_norm: the bound C.
        noise_multiplier: standard deviation of the noise on the sum, in units of C; what is accounted.
        planned: the planned cohort m, > 0; the expected one where cohorts are drawn by chance.
        source: of the noise.
        count_noise: standard deviation of the noise on the count of unclipped updates; 0 counts none.
        chain: what the noise goes on from, raised by as much as that takes; None: it is independent of other rounds.

    Raises:
        PrivacyError: if a number is out of its range: there would be no noise, or no bound.

    Privacy: `release` is the only way out for what was added.
    """

    def __init__(
        self,
        shapes: Shapes,
        *,
        clip_norm: float,
        noise_multiplier: float,
        planned: float,
        source: NoiseSource,
        count_noise: float = 0.0,
        chain: NoiseChain | None = None,
    ) -> None:
        _check_clip_norm(clip_norm)
        for name, value in (("noise multiplier", noise_multiplier), ("planned cohort", planned)):
            if not (math.isfinite(value) and value > 0):
                raise PrivacyError(f"{name} {value}: expected a finite number > 0")
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._clip_norm = clip_norm
        self._std = noise_multiplier * clip_norm * (1.0 if chain is None else column_norm(chain.place.band))
        self._planned = planned
        self._source = source
        self._count_noise = count_noise
        self._chain = chain
        self._sum = WeightedSum()
        self._halves = 0.0
        self._open = True

    @property
    def came(self) -> int:
        """Updates that were added."""
        return self._sum.count

    def add(self, update: Tensors) -> Clipped:
        """Clip an update and add it, with weight 1.

        Raises:
            AggregationError: if it has other tensors than was asked for, or values that are not finite; the sum is
                unchanged then, and the client counts as one that did not come.
        """
        found = {name: tuple(tensor.shape) for name, tensor in update.items()}
        if found != self._shapes:
            odd = sorted(dict(found.items() ^ self._shapes.items()))
            raise AggregationError(f"the update does not hold the tensors that were asked for: {odd[:3]}")
        clipped = clip(update, self._clip_norm)
        self._sum.add(clipped.tensors, 1.0)
        self._halves += 0.5 if clipped.norm <= self._clip_norm else -0.5
        return clipped

    def release(self) -> Released:
        """The noised mean over the planned cohort. Where nobody came, it is noise alone.

        Raises:
            PrivacyError: when called again: two releases of one sum cost twice, and the second was not accounted.
        """
        if not self._open:
            raise PrivacyError("this sum was released before: each release is accounted once; start another round")
        self._open = False
        total = self._sum.total()
        mean = {}
        for name in sorted(self._shapes):
            shape = self._shapes[name]
            noise = self._noise(shape, self._std)
            noise = noise if self._chain is None else self._chain.draw(name, noise)
            mean[name] = (total.get(name, torch.zeros(shape, dtype=torch.float64)) + noise) / self._planned
        growth = 1.0 if self._chain is None else self._chain.growth
        return Released(mean, growth * self._std / self._planned, self._unclipped())

    def _noise(self, shape: tuple[int, ...], std: float) -> Tensor:
        return self._source.normal(math.prod(shape)).double().reshape(shape) * std

    def _unclipped(self) -> float | None:
        """Each update counts one half more or less than nothing: one client moves the count by a half at most."""
        if not self._count_noise:
            return None
        noise = float(self._noise((), self._count_noise))
        return 0.5 + (self._halves + noise) / self._planned
