"""Noise that goes on from round to round and takes itself back in part: DP-FTRL, where nobody has to trust a sampling.

What moves the adapter is the sum of all rounds so far, so what hurts is the noise on prefix sums. The lower triangle of
ones has as its square root the Toeplitz matrix of the numbers below; L keeps the first p of them, its band:

    c_0 = 1,   c_i = c_{i-1} (2i - 1) / (2i)
    release    y_t = x_t + n_t,    n_t = z_t - sum_{0<i<p} c_i n_{t-i},    z_t ~ N(0, (s z C)^2 I)
    s          = sqrt(sum_{i<p} c_i^2), the norm of L's columns

with the sum x_t of clipped updates, the clipping norm C and the accounted noise multiplier z. The clients are divided
into b >= p fixed groups (`federated.privacy.fixed_groups`), and round t asks group (t - 1) mod b.

**Each participation is one Gaussian mechanism of multiplier z, without amplification.** In matrices n = L^-1 z; L is a
triangle with ones on its diagonal, so the rows of y and of L y = L x + z tell the same, row for row. Given all that was
released before, row t of the latter is Gaussian with deviation s z C, and taking a client away moves its mean by
sum_{i<p} c_i u_{t-i}, where u_t, of length at most C, is what that client added in round t: nothing where it was not
asked. It is asked at most once in b >= p rounds, so of each such sum at most one term is not zero. A participation in
round t moves the rows t .. t+p-1 by c_0 u_t .. c_{p-1} u_t, s |u_t| in all, and no other one moves any of these. The
shifts are fixed as soon as u_t is, whatever the later x are made to be: that x depends on what was released before
costs nothing. So it is one mechanism of sensitivity s C and deviation s z C, and a client's k participations, which
come one after the other, compose to k of them.

**Blocks.** That holds for rounds that follow each other. As soon as one was charged and not published, or the scale of
the noise is another one, the noise starts anew, from no history (`federated.privacy.noise_chain`). The whole is then a
matrix of blocks, one L in each: a row belongs to one block, so participations in different blocks move different rows,
and within a block rounds and rows are the same. Each charge still pays for one column, whoever saw what. In particular:

- A round is run again after a crash, and its lost release had been seen. It was the last row of the old block, where
  the other groups' shifts were paid for like those of any row, and its repetition is the first row of a new one: its
  group pays twice, and was charged twice. Repeating it on the old history would not do. The row t then comes twice,
  each time with c_i u_{t-i} of the groups of the last p - 1 rounds, who would lose (c_i / s)^2 of a participation more
  than they were charged for: 1/4 / s^2 for the group just before.
- A round that gave out nothing (too few answered, the rule refused) was charged and is left out. Going on across the
  gap would bring a group's rounds nearer to each other than b rows, where their columns overlap.

Source: Kalinin and Lampert, "Banded Square Root Matrix Factorization for Differentially Private Model Training",
NeurIPS 2024 (the factorisation); Choquette-Choo et al., "(Amplified) Banded Matrix Factorization", NeurIPS 2023 (banded
columns of participations that are apart do not add up); Denisov et al., "Improved Differential Privacy for SGD via
Optimal Private Linear Operators on Adaptive Streams", NeurIPS 2022, theorem 2.1 (adaptive inputs); Fichtenberger,
Henzinger and Upadhyay, "Constant Matters", ICML 2023 (the square root); Kairouz et al., "Practical and Private (Deep)
Learning without Sampling or Shuffling", ICML 2021 (DP-FTRL). Where we differ: blocks.

This module has the numbers; nothing here is drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from federated.errors import PrivacyError

__all__ = ["PrefixNoise", "coefficients", "column_norm", "inverse_column", "prefix_noise"]


def coefficients(band: int) -> tuple[float, ...]:
    """``c_0 .. c_{band-1}``, the first column of L.

    >>> coefficients(4)
    (1.0, 0.5, 0.375, 0.3125)

    Raises:
        PrivacyError: for a band below 1.
    """
    if band < 1:
        raise PrivacyError(f"a band of {band}: expected at least 1, which is independent noise")
    return tuple(accumulate(range(1, band), lambda before, i: before * (2 * i - 1) / (2 * i), initial=1.0))


def column_norm(band: int) -> float:
    """``s``: by how much more noise each round gets than is accounted for.

    >>> column_norm(1), round(column_norm(10), 3)
    (1.0, 1.338)
    """
    return math.sqrt(math.fsum(one * one for one in coefficients(band)))


def inverse_column(band: int, rounds: int) -> tuple[float, ...]:
    """The first column of ``L^-1`` over so many rounds: how much of z_1 is in n_1, n_2, ...

    Args:
        band: p, at least 1.
        rounds: rows, at least 1.
    """
    kept = np.asarray(coefficients(min(band, rounds))[1:])
    column = np.zeros(rounds)
    column[0] = 1.0
    for row in range(1, rounds):
        reach = min(row, len(kept))
        column[row] = -kept[:reach] @ column[row - reach : row][::-1]
    return tuple(map(float, column))


@dataclass(frozen=True)
class PrefixNoise:
    """Standard deviations of the noise of a block, on each value, in units of the accounted one of a round (z C).

    Args:
        one_round: on the sum of one round, the largest.
        last_sum: on the sum of all rounds.
        all_sums: root of the mean square over the sums of the first 1, 2, 3 ... rounds.
    """

    one_round: float
    last_sum: float
    all_sums: float


def prefix_noise(band: int, rounds: int) -> PrefixNoise:
    """What a band does to noise: with 1 it is independent, and grows with the root of the rounds.

    >>> prefix_noise(1, 100).last_sum, round(prefix_noise(10, 100).last_sum, 2)
    (10.0, 4.05)

    Args:
        band: p, at least 1.
        rounds: of the block, at least 1.
    """
    column, scale = inverse_column(band, rounds), column_norm(band)
    sums = list(accumulate(one * one for one in accumulate(column)))
    alone = math.fsum(one * one for one in column)
    return PrefixNoise(
        scale * math.sqrt(alone), scale * math.sqrt(sums[-1]), scale * math.sqrt(math.fsum(sums) / rounds)
    )
