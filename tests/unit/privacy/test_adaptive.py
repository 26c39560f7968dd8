"""Adaptive clipping: the budget of the count, and where the norm goes."""

import math

import pytest

from federated.errors import PrivacyError
from federated.privacy.accounting import GaussianSteps, epsilon
from federated.privacy.adaptive import count_noise, following_clip_norm, multiplier_of_updates


def test_updates_and_count_together_are_the_accounted_mechanism():
    """Two Gaussian mechanisms on one cohort add their inverse squares."""
    z, on_count = 1.0, 5.0
    updates = multiplier_of_updates(z, on_count)
    assert updates > z
    assert updates**-2 + (2 * on_count) ** -2 == pytest.approx(z**-2)
    both = epsilon([GaussianSteps(updates, 1.0, 1), GaussianSteps(2 * on_count, 1.0, 1)], 1e-5)
    assert both == pytest.approx(epsilon([GaussianSteps(z, 1.0, 1)], 1e-5), rel=1e-6)


@pytest.mark.parametrize("on_count", [0.5, 0.25])
def test_a_count_that_spends_all_is_refused(on_count: float):
    with pytest.raises(PrivacyError, match="nothing is left for the updates"):
        multiplier_of_updates(1.0, on_count)


def test_the_count_s_noise_is_a_twentieth_of_the_cohort_unless_given():
    assert count_noise(0.0, 100.0) == 5.0
    assert count_noise(7.0, 100.0) == 7.0


def test_the_norm_follows_the_quantile():
    assert following_clip_norm(2.0, 0.5, quantile=0.5, rate=0.2) == 2.0
    assert following_clip_norm(2.0, 1.0, quantile=0.5, rate=0.2) == pytest.approx(2.0 * math.exp(-0.1))
    assert following_clip_norm(2.0, 0.0, quantile=0.5, rate=0.2) == pytest.approx(2.0 * math.exp(0.1))


def test_it_settles_at_the_quantile():
    norms, found = [number / 100 for number in range(1, 101)], 50.0
    for _ in range(300):
        unclipped = sum(one <= found for one in norms) / len(norms)
        found = following_clip_norm(found, unclipped, quantile=0.7, rate=0.2)
    assert found == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize("unclipped", [1e300, -1e300])
def test_no_noise_takes_it_out_of_use(unclipped: float):
    assert 1e-9 <= following_clip_norm(1.0, unclipped, quantile=0.5, rate=10.0) <= 1e9
