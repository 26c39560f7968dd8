"""Correlated noise against dense float64 matrices: the factor, its inverse, what is left in sums, what it costs."""

import itertools
import math

import numpy as np
import pytest
import torch

from federated.errors import PrivacyError
from federated.privacy.banded import coefficients, column_norm, inverse_column, prefix_noise
from federated.privacy.chance import noise_source
from federated.privacy.client_level import NoisySum
from federated.privacy.noise_chain import NoiseChain, NoiseHistory, Place

BANDS = range(1, 9)


def sums(rounds: int) -> np.ndarray:
    """All prefix sums."""
    return np.tril(np.ones((rounds, rounds)))


def factor(band: int, rounds: int) -> np.ndarray:
    """L by its definition: the band of the square root of the prefix sums, found numerically, not by its formula."""
    root = np.eye(rounds)
    ones = sums(rounds)
    for row in range(rounds):  # a triangular square root, column by column of the recursion (R R)_ij = 1
        for column in range(row - 1, -1, -1):
            inner = sum(root[row, k] * root[k, column] for k in range(column + 1, row))
            root[row, column] = (ones[row, column] - inner) / (root[row, row] + root[column, column])
    assert np.allclose(root @ root, ones)
    return np.where(np.subtract.outer(np.arange(rounds), np.arange(rounds)) < band, root, 0.0)


@pytest.mark.parametrize("rounds", [1, 2, 7, 64])
@pytest.mark.parametrize("band", BANDS)
def test_the_numbers_are_those_of_the_dense_matrices(band: int, rounds: int):
    dense = factor(band, rounds)
    known = np.asarray(coefficients(band))[:rounds]
    assert np.allclose(dense[: len(known), 0], known, rtol=1e-12)
    inverse = np.linalg.inv(dense)
    assert np.allclose(inverse[:, 0], inverse_column(band, rounds), rtol=1e-9, atol=1e-12)
    if rounds >= band:
        assert column_norm(band) == pytest.approx(float(np.linalg.norm(dense, axis=0).max()), rel=1e-12)
    left = column_norm(band) * np.linalg.norm(sums(rounds) @ inverse, axis=1)
    found = prefix_noise(band, rounds)
    assert found.one_round == pytest.approx(column_norm(band) * np.linalg.norm(inverse, axis=1).max(), rel=1e-9)
    assert found.last_sum == pytest.approx(left[-1], rel=1e-9)
    assert found.all_sums == pytest.approx(math.sqrt(np.mean(left**2)), rel=1e-9)


@pytest.mark.parametrize("band", [2, 5, 8])
def test_it_is_less_noise_on_the_sums_than_independent_noise_of_equal_epsilon(band: int):
    found, alone = prefix_noise(band, 64), prefix_noise(1, 64)
    assert (alone.one_round, alone.last_sum) == (1.0, 8.0)
    assert found.one_round > 1.1
    assert found.all_sums < 0.8 * alone.all_sums


def patterns(rounds: int, separation: int) -> list[tuple[int, ...]]:
    """All sets of rounds of which any two are at least so far apart."""
    every = (rest for count in range(1, rounds + 1) for rest in itertools.combinations(range(rounds), count))
    return [one for one in every if all(b - a >= separation for a, b in itertools.pairwise(one))]


def largest_shift(dense: np.ndarray, rounds: tuple[int, ...]) -> float:
    """Squared, over all that a client can add in these rounds: the coefficients are not negative, so all alike."""
    return float(np.abs(dense[:, rounds].T @ dense[:, rounds]).sum())


@pytest.mark.parametrize("rounds", [4, 9])
@pytest.mark.parametrize("separation", BANDS)
def test_no_pattern_of_rounds_that_are_apart_shifts_more_than_its_participations_pay_for(separation: int, rounds: int):
    for band in range(1, separation + 1):
        dense = factor(band, rounds)
        for one in patterns(rounds, separation):
            paid = len(one) * column_norm(band) ** 2
            assert largest_shift(dense, one) <= paid * (1 + 1e-12)
            if one[-1] + band <= rounds:
                assert largest_shift(dense, one) == pytest.approx(paid)


@pytest.mark.parametrize("separation", [1, 2, 3])
def test_a_band_wider_than_the_separation_is_not_paid_for(separation: int):
    dense, rounds = factor(separation + 1, 9), tuple(range(0, 9, separation))
    assert largest_shift(dense, rounds) > 1.1 * len(rounds) * column_norm(separation + 1) ** 2


def test_a_band_of_nothing_is_refused():
    with pytest.raises(PrivacyError, match="at least 1"):
        coefficients(0)


# ---- drawn -----------------------------------------------------------------------------------------------------------


def place(number: int, band: int = 3, std: float = 1.0) -> Place:
    return Place(number, f"mark {number - 1}", f"mark {number}", std, band)


def chained(fresh: torch.Tensor, band: int) -> torch.Tensor:
    """The noise of all rounds, from a row of fresh noise for each."""
    history: NoiseHistory | None = None
    rows = []
    for number, one in enumerate(fresh, start=1):
        chain = NoiseChain(place(number, band), history)
        rows.append(chain.draw("w", one))
        history = chain.history()
        assert history.rows == number
        assert history.tensors["w"].shape == (min(number, band - 1), *one.shape)
    return torch.stack(rows)


@pytest.mark.parametrize("band", [2, 3, 8, 20])
def test_what_is_drawn_is_the_inverse_times_fresh_noise(band: int):
    fresh = torch.randn(17, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truth = np.linalg.inv(factor(band, 17)) @ fresh.reshape(17, 12).numpy()
    assert np.allclose(chained(fresh, band).reshape(17, 12).numpy(), truth, rtol=1e-5, atol=1e-5)


def test_what_is_kept_is_what_was_released_to_the_last_bit():
    fresh = torch.randn(3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    history = None
    for number in (1, 2, 3):
        chain = NoiseChain(place(number), history)
        drawn = chain.draw("w", fresh[number - 1])
        history = chain.history()
        assert torch.equal(history.tensors["w"][0].double(), drawn)


def released(rounds: int, band: int, *, noise: float, clip_norm: float, width: int) -> tuple[np.ndarray, list[float]]:
    """What rounds of nobody give out: noise alone, and what each says its standard deviation is."""
    history: NoiseHistory | None = None
    rows, said = [], []
    for number in range(1, rounds + 1):
        chain = NoiseChain(place(number, band, noise * clip_norm), history)
        made = NoisySum(
            {"w": (width,)},
            clip_norm=clip_norm,
            noise_multiplier=noise,
            planned=4.0,
            source=noise_source(100 + number),
            chain=chain,
        ).release()
        history = chain.history()
        rows.append(4.0 * made.mean["w"].numpy())
        said.append(4.0 * made.noise_std)
    return np.stack(rows), said


@pytest.mark.parametrize("band", [1, 3, 6])
def test_the_covariance_of_released_noise_is_the_mechanism_s(band: int):
    """s^2 z^2 C^2 L^-1 L^-T over ten rounds, from 60,000 values of each: entries are known to 0.6 % or so."""
    rounds, noise, clip_norm, width = 10, 1.5, 0.4, 60_000
    rows, said = released(rounds, band, noise=noise, clip_norm=clip_norm, width=width)
    inverse = np.linalg.inv(factor(band, rounds)) * column_norm(band) * noise * clip_norm
    truth = inverse @ inverse.T
    scale = np.sqrt(np.outer(np.diag(truth), np.diag(truth)))
    assert np.abs((rows @ rows.T / width - truth) / scale).max() < 5 * math.sqrt(2 / width)
    assert np.allclose(said, np.sqrt(np.diag(truth)))


def test_a_band_of_one_is_independent_noise_bit_for_bit():
    rows, _ = released(2, 1, noise=1.0, clip_norm=1.0, width=9)
    alone = [noise_source(100 + number).normal(9).double().numpy() for number in (1, 2)]
    assert np.array_equal(rows, np.stack(alone))


@pytest.mark.parametrize(
    ("following", "why"),
    [
        (place(4), ""),
        (place(3), "that of round 3"),
        (place(5), "that of round 3"),
        (Place(4, "another", "mark 4", 1.0, 3), "charged before, and not published"),
        (place(4, std=2.0), "scale"),
        (place(4, band=2), "scale"),
    ],
)
def test_noise_goes_on_only_in_the_next_round_with_nothing_in_between(following: Place, why: str):
    history = NoiseHistory(place(3), 3, {"w": torch.zeros(2, 5)})
    assert why in history.broken_by(following)
    assert bool(why) == bool(history.broken_by(following))
    if why:
        with pytest.raises(PrivacyError, match="cannot go on"):
            NoiseChain(following, history)


@pytest.mark.parametrize("tensors", [{}, {"w": torch.zeros(2, 4)}, {"w": torch.zeros(1, 5)}])
def test_a_history_of_other_tensors_is_refused(tensors: dict[str, torch.Tensor]):
    chain = NoiseChain(place(4), NoiseHistory(place(3), 3, tensors))
    with pytest.raises(PrivacyError, match="does not fit the tensor w"):
        chain.draw("w", torch.zeros(5))


def test_noise_is_not_shown():
    history = NoiseHistory(place(1), 1, {"w": torch.full((1, 1), 0.123)})
    assert "0.123" not in repr(history)
