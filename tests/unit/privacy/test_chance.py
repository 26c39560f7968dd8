"""Noise and batches: their distribution, where they come from, and what they leave alone."""

import math
import random

import numpy as np
import pytest
import torch

from federated.privacy.chance import NoiseSource, noise_source, poisson_batches


def fixed(*words, dtype):
    raw = np.array(words, dtype=dtype).tobytes()
    return NoiseSource(lambda count: raw[:count], private=False)


def test_normal_numbers_are_normal():
    drawn = noise_source(3).normal(400_000).double()
    assert drawn.dtype == torch.float64
    assert abs(float(drawn.mean())) < 5 / math.sqrt(400_000)
    assert float(drawn.var()) == pytest.approx(1.0, abs=0.01)
    assert float((drawn**4).mean()) == pytest.approx(3.0, abs=0.06)
    for bound in (-2.0, -1.0, 0.0, 0.5, 1.5, 3.0):
        share = float((drawn < bound).double().mean())
        assert share == pytest.approx(0.5 * (1 + math.erf(bound / math.sqrt(2))), abs=0.004)
    half = len(drawn) // 2  # the two halves come from the same words
    assert abs(float((drawn[:half] * drawn[half:]).mean())) < 0.01
    assert abs(float((drawn[:half] ** 2 * drawn[half:] ** 2).mean()) - 1) < 0.03


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_as_many_as_asked_for(count):
    source = noise_source(0)
    assert source.normal(count).shape == source.uniform(count).shape == (count,)
    assert source.normal(count).dtype == torch.float32


def test_the_extreme_words_are_finite_and_reach_where_hardly_anything_is():
    """What noise cannot reach, only a neighbour can have given out: 9.4 deviations leave less than any target_delta."""
    farthest = 0.0
    for word in (0, 1, -1, 2**63 - 1, -(2**63)):
        drawn = fixed(word, dtype="<i8").normal(2)
        assert drawn.isfinite().all()
        farthest = max(farthest, float(drawn.norm()))
    assert 9.3 < farthest < 9.5
    assert math.erfc(farthest / math.sqrt(2)) < 1e-19


def test_uniform_numbers_have_their_ends():
    assert fixed(0, -1, 2**63 - 1, -(2**63), dtype="<i8").uniform(4).tolist() == [
        0.0,
        1 - 2.0**-53,
        0.5 - 2.0**-53,
        0.5,
    ]


def test_sources_differ_and_a_test_seed_repeats():
    assert not torch.equal(noise_source().normal(8), noise_source().normal(8))
    assert torch.equal(noise_source(5).normal(8), noise_source(5).normal(8))
    assert not torch.equal(noise_source(5).normal(8), noise_source(6).normal(8))
    repeatable = noise_source(5)
    assert not torch.equal(repeatable.normal(8), repeatable.normal(8))
    assert noise_source().private
    assert not noise_source(0).private


def test_torch_s_own_generator_would_keep_32_bits():
    """Why there is none in between; when this fails, the reason is gone."""
    first, second = (torch.Generator().manual_seed(seed) for seed in (9, 9 + 2**32))
    assert torch.equal(torch.randn(64, generator=first), torch.randn(64, generator=second))


def test_global_states_are_neither_read_nor_moved():
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    drawn = []
    for seed in (1, 1):
        torch.manual_seed(seed)
        drawn.append(noise_source().normal(8))
    torch.set_rng_state(torch.tensor(before[0], dtype=torch.uint8))
    list(poisson_batches(20, 0.5, steps=3, source=noise_source()))
    assert states() == before
    assert not torch.equal(*drawn)


class TestPoisson:
    def test_sizes_and_pairs_are_independent(self):
        count, sampling, steps = 40, 0.15, 6000
        taken = torch.zeros(steps, count, dtype=torch.float64)
        for step, batch in enumerate(poisson_batches(count, sampling, steps=steps, source=noise_source(1))):
            taken[step, batch] = 1.0
        error = math.sqrt(sampling * (1 - sampling) / steps)
        assert (taken.mean(0) - sampling).abs().max() < 5 * error
        sizes = taken.sum(1)
        assert float(sizes.mean()) == pytest.approx(sampling * count, rel=0.02)
        assert float(sizes.var()) == pytest.approx(count * sampling * (1 - sampling), rel=0.08)
        together = (taken.T @ taken / steps - sampling**2)[~torch.eye(count, dtype=torch.bool)]
        assert together.abs().max() < 6 * sampling / math.sqrt(steps)
        after = ((taken[1:].T @ taken[:-1]) / (steps - 1) - sampling**2).abs().max()
        assert after < 6 * sampling / math.sqrt(steps)

    def test_empty_batches_are_given(self):
        batches = list(poisson_batches(5, 0.2, steps=200, source=noise_source(1)))
        assert len(batches) == 200
        assert sum(not batch for batch in batches) == pytest.approx(200 * 0.8**5, abs=30)

    def test_everything_at_one(self):
        assert list(poisson_batches(4, 1.0, steps=2, source=noise_source())) == [[0, 1, 2, 3]] * 2

    def test_each_batch_is_drawn_when_it_is_asked_for(self):
        assert not list(poisson_batches(4, 0.5, steps=0, source=noise_source()))
        drawn = poisson_batches(4, 1.0, steps=10**9, source=noise_source())
        assert next(drawn) == [0, 1, 2, 3]
