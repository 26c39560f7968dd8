"""Clipping and noise at client level: one bound over all tensors, noise as accounted, nothing silent."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from federated.delta import norm
from federated.errors import AggregationError, PrivacyError
from federated.privacy.chance import NoiseSource, noise_source
from federated.privacy.client_level import NoisySum, clip

SHAPES = {"q.factor_a": (2, 3), "q.factor_b": (4, 2), "head.weight": (5,)}


class NoNoise(NoiseSource):
    """Zeros, to see the sum beneath."""

    def __init__(self) -> None:
        super().__init__(lambda count: bytes(count), private=False)

    def normal(self, count: int) -> torch.Tensor:
        return torch.zeros(count)


def update(value: float = 1.0, seed: int = 0) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return {name: value * torch.randn(shape, generator=chance) for name, shape in SHAPES.items()}


def noisy(source: NoiseSource | None = None, **changes: Any) -> NoisySum:
    parts: dict[str, Any] = {"clip_norm": 1.0, "noise_multiplier": 1.0, "planned": 4.0}
    return NoisySum(SHAPES, **{**parts, "source": source or NoNoise(), **changes})


@given(st.floats(1e-30, 1e30), st.floats(1e-6, 1e6))
def test_no_update_is_longer_than_the_bound_and_short_ones_are_untouched(size: float, bound: float):
    given_ = update(size)
    clipped = clip(given_, bound)
    assert norm(clipped.tensors) <= bound * (1 + 1e-12)
    assert clipped.norm == norm(given_)
    if clipped.norm <= bound:
        assert clipped.share == 1.0
        assert all(torch.equal(clipped.tensors[name], given_[name].double()) for name in given_)
    else:
        assert norm(clipped.tensors) == pytest.approx(bound)


def test_one_bound_covers_factors_and_heads_together():
    """A bound for each tensor apart would let three of them through."""
    clipped = clip({name: torch.full(shape, 100.0) for name, shape in SHAPES.items()}, 1.0)
    assert norm(clipped.tensors) == pytest.approx(1.0)
    assert all(norm({name: tensor}) < 1.0 for name, tensor in clipped.tensors.items())


def test_an_update_of_zeros_stays_one():
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    clipped = clip(zeros, 1.0)
    assert (clipped.norm, clipped.share) == (0.0, 1.0)
    assert not any(tensor.any() for tensor in clipped.tensors.values())


def test_the_order_of_names_does_not_matter_and_nothing_is_changed_in_place():
    """Flower's clipping goes by position: another order of keys corrupts the update."""
    given_ = {"a": torch.tensor([5.1]), "b": torch.tensor([0.1])}
    forth, back = clip(given_, 1.0), clip(dict(reversed(given_.items())), 1.0)
    assert {name: tensor.item() for name, tensor in forth.tensors.items()} == {
        name: tensor.item() for name, tensor in back.tensors.items()
    }
    assert given_["a"].item() == pytest.approx(5.1)
    untouched = clip(given_, 100.0)
    untouched.tensors["a"].zero_()
    assert given_["a"].item() == pytest.approx(5.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_and_leaves_the_sum_alone(bad: float):
    made = noisy()
    made.add(update(0.01))
    with pytest.raises(AggregationError, match="not finite"):
        made.add({**update(), "head.weight": torch.tensor([bad, 0, 0, 0, 0])})
    assert made.came == 1
    torch.testing.assert_close(made.release().mean["head.weight"], update(0.01)["head.weight"].double() / 4)


def test_a_length_beyond_float64_is_refused():
    with pytest.raises(AggregationError, match="not finite"):
        clip({"a": torch.tensor([1e200], dtype=torch.float64)}, 1.0)


@pytest.mark.parametrize("bad", [{"head.weight": torch.zeros(5)}, {**update(), "more": torch.zeros(1)}])
def test_other_tensors_than_asked_for_are_refused(bad: dict[str, torch.Tensor]):
    with pytest.raises(AggregationError, match="tensors that were asked for"):
        noisy().add(bad)


def test_shapes_are_not_broadcast():
    with pytest.raises(AggregationError, match="tensors that were asked for"):
        noisy().add({**update(), "head.weight": torch.zeros(1)})


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("key", ["clip_norm", "noise_multiplier", "planned"])
def test_numbers_that_give_no_privacy_are_refused(key: str, bad: float):
    with pytest.raises(PrivacyError, match="expected a finite number > 0"):
        noisy(**{key: bad})


def test_noise_is_on_the_sum_in_units_of_the_bound_and_over_the_planned_cohort():
    made = NoisySum({"x": (200_000,)}, clip_norm=0.5, noise_multiplier=3.0, planned=10.0, source=noise_source(1))
    released = made.release()
    assert released.noise_std == pytest.approx(0.15)
    assert float(released.mean["x"].std()) == pytest.approx(0.15, rel=0.01)
    assert abs(float(released.mean["x"].mean())) < 0.15 * 4 / 200_000**0.5


def test_who_is_missing_leaves_the_divisor():
    made = noisy(clip_norm=100.0)
    for seed in range(2):
        made.add(update(seed=seed))
    truth = {name: (update(seed=0)[name].double() + update(seed=1)[name].double()) / 4 for name in SHAPES}
    mean = made.release().mean
    assert all(torch.equal(mean[name], truth[name]) for name in SHAPES)


def test_one_client_moves_the_release_by_the_bound_over_the_cohort_at_most():
    with_, without = noisy(), noisy()
    for seed in range(3):
        with_.add(update(seed=seed))
        without.add(update(seed=seed))
    with_.add(update(1e30, seed=9))
    left, right = with_.release().mean, without.release().mean
    assert norm({name: left[name] - right[name] for name in SHAPES}) <= 1.0 / 4 * (1 + 1e-6)


def test_a_sum_is_released_once():
    made = noisy()
    made.release()
    with pytest.raises(PrivacyError, match="released before"):
        made.release()


def test_noise_is_new_each_time_and_repeats_under_a_test_seed_alone():
    mean = [noisy(noise_source()).release().mean["q.factor_a"] for _ in range(2)]
    assert not torch.equal(mean[0], mean[1])
    mean = [noisy(noise_source(5)).release().mean["q.factor_a"] for _ in range(2)]
    assert torch.equal(mean[0], mean[1])


def test_torch_s_seeds_do_not_reach_the_noise():
    seen = []
    for _ in range(2):
        torch.manual_seed(0)
        seen.append(noisy(noise_source()).release().mean["q.factor_a"])
    assert not torch.equal(*seen)


def test_the_count_of_unclipped_updates_is_over_the_planned_cohort():
    made = noisy(count_noise=1.0)
    for size in (0.01, 0.01, 100.0):
        made.add(update(size))
    assert made.release().unclipped == pytest.approx(0.5 + (0.5 + 0.5 - 0.5) / 4)
    assert noisy().release().unclipped is None


def test_the_count_s_noise_has_its_own_size():
    shares = [noisy(noise_source(seed), count_noise=2.0).release().unclipped for seed in range(400)]
    spread = torch.tensor(shares).std().item()
    assert spread == pytest.approx(2.0 / 4, rel=0.15)
