"""Audits of correlated noise: what an adversary gains who undoes it is what is accounted, and planted faults show."""

import math
from typing import Any

import numpy as np
import pytest

from federated.privacy.accounting import GaussianSteps, epsilon
from federated.privacy.audit import Bound, lower_bound
from federated.privacy.banded import column_norm
from federated.privacy.canaries import Canaries, audit_mechanism, sign_of
from federated.privacy.canaries_banded import BandedPath
from federated.privacy.chance import noise_source

COUNT, DELTA = 300, 1e-5


def path(noise: float, *, groups: int, band: int, layers: int = 1, seed: int = 3, count: int = COUNT) -> BandedPath:
    parts: dict[str, Any] = {"clip_norm": 1.0, "noise_multiplier": noise, "planned": 1.0, "source": noise_source(seed)}
    return BandedPath(Canaries.shapes(count, layers), **parts, groups=groups, band=band)


def looked_at(made: BandedPath, steps: int, *, count: int = COUNT, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The score of each canary to whom undoes the correlation, and which canaries were in."""
    included = np.random.default_rng(seed).random(count) < 0.5
    scores = []
    for step in range(steps):
        released = made(Canaries(included, layers=1, clip_norm=1.0, sign=sign_of(step)))
        scores.append(sign_of(step) * released["layer-00"].double().numpy())
    (view,) = made.views(np.stack(scores)).values()
    return view, included


def separation(view: np.ndarray, included: np.ndarray) -> float:
    """How many standard deviations apart those that were in are from those that were not."""
    inside, outside = view[included], view[~included]
    return float((inside.mean() - outside.mean()) / math.sqrt((inside.var() + outside.var()) / 2))


def bound(view: np.ndarray, included: np.ndarray) -> Bound:
    return lower_bound({"correlation undone": view}, included, target_delta=DELTA)


@pytest.mark.parametrize(("noise", "groups", "band", "steps"), [(2.0, 4, 4, 12), (1.0, 3, 3, 9), (1.0, 5, 2, 6)])
def test_the_best_look_separates_as_far_as_is_accounted(noise: float, groups: int, band: int, steps: int):
    """sqrt(k) / z for k participations: what k unsampled Gaussians give, neither more nor less. 2,000 canaries: 5 %."""
    whole = steps + band - 1  # the columns of the last participation end within the run
    found = separation(*looked_at(path(noise, groups=groups, band=band, count=2000), whole, count=2000))
    accounted = math.sqrt(math.ceil(whole / groups)) / noise
    assert abs(found / accounted - 1) < 4 * math.sqrt(4 / 2000) / accounted


def test_noise_that_is_not_raised_by_the_column_norm_shows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("federated.privacy.client_level.column_norm", lambda band: 1.0)
    found = separation(*looked_at(path(2.0, groups=8, band=8, count=2000), 24, count=2000))
    accounted = math.sqrt(3) / 2.0
    assert found == pytest.approx(accounted * column_norm(8), rel=0.1)
    assert found > 1.15 * accounted


def test_a_band_wider_than_the_groups_shows():
    found = separation(*looked_at(path(4.0, groups=2, band=16, count=800), 24, count=800))
    assert found > 1.4 * math.sqrt(12) / 4.0


@pytest.mark.parametrize("each_step", [False, True])
def test_the_right_mechanism_stays_below_what_is_accounted(each_step: bool):
    made = path(1.0, groups=3, band=3, layers=4)
    found = audit_mechanism(
        made,
        canaries=COUNT,
        steps=7,
        clip_norm=1.0,
        accounted=epsilon([GaussianSteps(1.0, 1.0, 3)], DELTA),
        target_delta=DELTA,
        layers=4,
        each_step=each_step,
        further=made.views,
        seed=1,
    )
    assert found.passed
    if each_step:  # it is the one that sees most
        assert found.bound.view == "all steps together, correlation undone"
        assert found.bound.epsilon > 0.5


def test_both_faults_together_are_proven_by_the_bound(monkeypatch: pytest.MonkeyPatch):
    accounted = epsilon([GaussianSteps(11.3, 1.0, 32)], DELTA)
    monkeypatch.setattr("federated.privacy.client_level.column_norm", lambda band: 1.0)
    assert bound(*looked_at(path(11.3, groups=2, band=64), 64)).epsilon > accounted
