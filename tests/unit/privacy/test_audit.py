"""Audits: the bound is one, the right mechanism passes, and each planted fault is found."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from federated.errors import PrivacyError
from federated.privacy.accounting import GaussianSteps, epsilon
from federated.privacy.audit import ceiling, lower_bound, p_value
from federated.privacy.canaries import Audit, Canaries, ClientLevelPath, audit_mechanism
from federated.privacy.chance import NoiseSource, noise_source
from federated.privacy.client_level import NoisySum, clip
from federated.privacy.cohorts import PoissonCohorts
from federated.state import Tensors

COUNT, LAYERS, DELTA = 300, 16, 1e-5
SHAPES = Canaries.shapes(COUNT, LAYERS)


def audited(path: Any, *, accounted: float, steps: int = 1, **changes: Any) -> Audit:
    parts: dict[str, Any] = {"canaries": COUNT, "layers": LAYERS, "clip_norm": 1.0, "target_delta": DELTA}
    return audit_mechanism(path, **{**parts, "accounted": accounted, "steps": steps, "seed": 1, **changes})


def cost(noise: float, steps: int = 1, sampling: float = 1.0) -> float:
    return epsilon([GaussianSteps(noise, sampling, steps)], DELTA)


def right(noise: float, *, seed: int = 3, fraction: float = 1.0) -> ClientLevelPath:
    return ClientLevelPath(
        SHAPES,
        clip_norm=1.0,
        noise_multiplier=noise,
        planned=fraction * COUNT,
        source=noise_source(seed),
        fraction=fraction,
        cohorts=PoissonCohorts(Canaries.names(COUNT), key=b"k" * 32) if fraction < 1 else None,
    )


class Faulty:
    """The mechanism with one fault."""

    def __init__(self, noise: float = 2.0, *, seed: int = 4) -> None:
        self.noise, self.source, self.step = noise, noise_source(seed), 0

    def clipped(self, update: Tensors) -> Tensors:
        return clip(update, 1.0).tensors

    def std(self) -> float:
        return self.noise

    def drawn(self) -> NoiseSource:
        return self.source

    def __call__(self, members: Mapping[str, Tensors]) -> Tensors:
        self.step += 1
        total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
        for name in members:
            for key, tensor in self.clipped(members[name]).items():
                total[key] += tensor
        source = self.drawn()
        return {name: one + source.normal(COUNT).double() * self.std() for name, one in total.items()}


class WeakNoise(Faulty):
    def std(self) -> float:
        return self.noise / 4


class PerLayerClip(Faulty):
    def clipped(self, update: Tensors) -> Tensors:
        return {name: clip({name: tensor}, 1.0).tensors[name] for name, tensor in update.items()}


class NoClip(Faulty):
    def clipped(self, update: Tensors) -> Tensors:
        return update


class WeightedByExamples(Faulty):
    """Sensitivity times n: a claimed number of examples scales what was clipped."""

    def clipped(self, update: Tensors) -> Tensors:
        return {name: 20.0 * tensor for name, tensor in clip(update, 1.0).tensors.items()}


class RepeatedNoise(Faulty):
    def drawn(self) -> NoiseSource:
        return noise_source(3)


class SkippedOnOddSteps(Faulty):
    def std(self) -> float:
        return 0.0 if self.step % 2 else self.noise


def test_the_fixture_without_a_fault_is_the_mechanism():
    members = Canaries(np.arange(COUNT) % 2 == 0, layers=LAYERS, clip_norm=1.0)
    noisy = NoisySum(SHAPES, clip_norm=1.0, noise_multiplier=2.0, planned=1.0, source=noise_source(4))
    for name in members:
        noisy.add(members[name])
    faultless = Faulty()(members)
    assert all(torch.allclose(one, faultless[name]) for name, one in noisy.release().mean.items())


@pytest.mark.parametrize(
    ("noise", "steps", "fraction"), [(2.0, 1, 1.0), (1.0, 1, 1.0), (2.0, 4, 1.0), (0.7, 6, 0.1), (4.0, 2, 0.5)]
)
@pytest.mark.parametrize("each_step", [False, True])
def test_the_right_mechanism_stays_below_what_is_accounted(noise: float, steps: int, fraction: float, each_step: bool):
    path = right(noise, fraction=fraction)
    found = audited(path, accounted=cost(noise, steps, fraction), steps=steps, each_step=each_step)
    assert found.passed
    assert found.bound.epsilon <= found.accounted


@pytest.mark.parametrize("fault", [WeakNoise, PerLayerClip, NoClip, WeightedByExamples])
def test_a_fault_of_one_step_is_found(fault: type[Faulty]):
    found = audited(fault(), accounted=cost(2.0))
    assert found.bound.epsilon > found.accounted
    assert not found.passed
    assert audited(Faulty(), accounted=cost(2.0)).passed


@pytest.mark.parametrize(("fault", "steps"), [(RepeatedNoise, 3), (SkippedOnOddSteps, 3)])
def test_a_fault_between_steps_is_found_by_looking_at_each(fault: type[Faulty], steps: int):
    accounted = cost(4.0, steps)
    found = audited(fault(4.0), accounted=accounted, steps=steps, each_step=True)
    assert found.bound.epsilon > accounted
    assert found.bound.view.startswith("step")
    assert audited(Faulty(4.0), accounted=accounted, steps=steps, each_step=True).passed


def test_noise_that_is_skipped_is_lost_in_the_sum_of_all_steps():
    """Why each step is looked at: their sum has noise of the other steps on it."""
    assert audited(SkippedOnOddSteps(4.0), accounted=cost(4.0, 3), steps=3).passed


def test_the_bound_is_seldom_wrong_on_randomised_response():
    """Truth is known there: the right answer with probability e^eps / (1 + e^eps)."""
    chance, truth, wrong = np.random.default_rng(0), 1.0, 0
    for _ in range(100):
        included = chance.random(500) < 0.5
        told = np.where(chance.random(500) < 1 / (1 + math.exp(-truth)), included, ~included).astype(float)
        wrong += lower_bound({"answers": told}, included, target_delta=0.0).epsilon > truth
    assert wrong <= 8


def test_the_p_value_is_the_binomial_tail_and_the_slack():
    assert p_value(10, 10, epsilon=0.0, target_delta=0.0, canaries=10) == pytest.approx(2**-10)
    assert p_value(0, 10, epsilon=0.0, target_delta=0.5, canaries=10) == pytest.approx(1.0)
    tail = [sum(math.comb(4, k) for k in range(v, 5)) / 16 for v in range(5)]
    slack = max((tail[3 - i] - tail[3]) / i for i in (1, 2, 3)) * 2 * 8 * 1e-3
    assert p_value(3, 4, epsilon=0.0, target_delta=1e-3, canaries=8) == pytest.approx(tail[3] + slack)


def test_more_canaries_raise_the_ceiling():
    found = [ceiling(count, target_delta=DELTA) for count in (50, 200, 1000)]
    assert found == sorted(found)
    assert ceiling(200, target_delta=DELTA, views=9) < ceiling(200, target_delta=DELTA)


def test_guesses_at_random_prove_nothing():
    included = np.random.default_rng(0).random(400) < 0.5
    found = lower_bound({"nothing": np.zeros(400)}, included, target_delta=DELTA)
    assert found.epsilon < 0.5


def test_an_audit_says_who_was_looking():
    found = audited(right(2.0), accounted=cost(2.0))
    assert "the sum of all releases" in found.threat_model
    assert "each release" in audited(right(2.0), accounted=2.0, each_step=True).threat_model
    assert (found.canaries, found.steps) == (COUNT, 1)
    assert found.ceiling == ceiling(COUNT, target_delta=DELTA)


def test_canaries_are_ten_bounds_long_and_orthogonal():
    included = np.array([True, False, True])
    members = Canaries(included, layers=4, clip_norm=0.5)
    assert list(members) == ["canary-00000", "canary-00002"]
    assert len(members) == 2
    assert "canary-00001" not in members
    one, other = members["canary-00000"], members["canary-00002"]
    assert clip(one, 0.5).norm == pytest.approx(5.0)
    assert sum(float((one[name] * other[name]).sum()) for name in one) == 0.0


@pytest.mark.parametrize(("canaries", "steps"), [(1, 1), (2, 0)])
def test_an_audit_needs_canaries_and_steps(canaries: int, steps: int):
    with pytest.raises(PrivacyError, match="two canaries and one step"):
        audited(right(1.0), accounted=1.0, canaries=canaries, steps=steps)


def test_a_bound_needs_a_view():
    with pytest.raises(PrivacyError, match="needs one view"):
        lower_bound({}, np.ones(4, dtype=bool), target_delta=0.0)
