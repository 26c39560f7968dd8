"""A lower bound on what a mechanism really leaks, measured on the code that runs and not on its theory.

One run: each of m canaries is put in or left out by a coin; an adversary who sees what is released gives each a score,
and guesses "in" for the highest and "out" for the lowest scores. Under (epsilon, target_delta) privacy the number of
right guesses is hardly ever large:

    P[at least v of r guesses right]  <=  f(v) + 2 m target_delta max_i (f(v - i) - f(v)) / i
    f(v) = P[Binomial(r, e^epsilon / (1 + e^epsilon)) >= v]

The largest epsilon at which what was seen has a probability of at most 5 % is the bound: with 95 % confidence the
mechanism is not (epsilon, target_delta) private. It is a bound from one side. Far below the accounted epsilon it proves
nothing; above it, something is broken. It cannot pass a ceiling that the number of canaries sets.

Several ways of looking (how many guesses, which step) share the 5 % among them (Bonferroni).

Source: Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023, theorem 5.2.
`federated.privacy.canaries` drives the mechanism.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from federated.errors import PrivacyError

__all__ = ["Bound", "ceiling", "lower_bound", "p_value"]

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
_LARGEST = 30.0
"""Of the epsilons that are looked at: beyond it, the chance of a wrong guess is lost in rounding."""
_SHARES = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Of the canaries: how many are guessed."""


@dataclass(frozen=True)
class Bound:
    """What the guesses prove.

    Args:
        epsilon: at the given confidence the mechanism's is at least this.
        view: what was looked at, of the views given.
        guesses: how many were made there.
        correct: how many were right.
    """

    epsilon: float
    view: str
    guesses: int
    correct: int


def p_value(correct: int, guesses: int, *, epsilon: float, target_delta: float, canaries: int) -> float:
    """Largest probability of so many right guesses under (epsilon, target_delta) privacy.

    >>> round(p_value(10, 10, epsilon=0.0, target_delta=0.0, canaries=10), 6)
    0.000977

    Args:
        correct: right guesses, v.
        guesses: all guesses, r.
        epsilon: not negative.
        target_delta: in [0, 1).
        canaries: m, at least r.
    """
    tail = _tail(guesses, 1 / (1 + math.exp(-epsilon)))
    slack = 0.0
    if target_delta and correct:
        steps = np.arange(1, correct + 1)
        slack = float(np.max((tail[correct - steps] - tail[correct]) / steps)) * 2 * canaries * target_delta
    return min(1.0, float(tail[correct]) + slack)


def _tail(count: int, chance: float) -> Floats:
    """``P[Binomial(count, chance) >= v]`` for v from 0 to count; ``chance`` is in [1/2, 1)."""
    yes, no = math.log(chance), math.log1p(-chance)
    logs = [
        math.lgamma(count + 1) - math.lgamma(v + 1) - math.lgamma(count - v + 1) + v * yes + (count - v) * no
        for v in range(count + 1)
    ]
    tail: Floats = np.minimum(1.0, np.cumsum(np.exp(np.asarray(logs))[::-1])[::-1])
    return tail


def lower_bound(views: Mapping[str, Floats], included: Flags, *, target_delta: float, error: float = 0.05) -> Bound:
    """The best bound over all views and guess counts, valid for all of them together.

    Args:
        views: name to one score per canary: the higher, the likelier it was in.
        included: which canaries were in.
        target_delta: of the claim that is tested.
        error: probability that the bound is wrong, over the coins and the noise.

    Raises:
        PrivacyError: without views or canaries.
    """
    canaries = len(included)
    if not views or canaries < 2:
        raise PrivacyError(f"{len(views)} views of {canaries} canaries: an audit needs one view and two canaries")
    counts = guess_counts(canaries)
    share = error / (len(views) * len(counts))
    best = Bound(0.0, next(iter(views)), 0, 0)
    for name, scores in views.items():
        order = np.argsort(scores, kind="stable")
        for guesses in counts:
            half = guesses // 2
            correct = int((~included[order[:half]]).sum() + included[order[canaries - half :]].sum())
            found = _largest(correct, 2 * half, target_delta=target_delta, canaries=canaries, error=share)
            if found > best.epsilon or not best.guesses:
                best = Bound(found, name, 2 * half, correct)
    return best


def guess_counts(canaries: int) -> Sequence[int]:
    """Even numbers of guesses to look at, at least two."""
    return sorted({max(2, 2 * (int(share * canaries) // 2)) for share in _SHARES})


def ceiling(canaries: int, *, target_delta: float, views: int = 1, error: float = 0.05) -> float:
    """The bound if every guess were right: no audit of so many canaries can find more.

    Args:
        canaries: how many.
        target_delta: of the claim.
        views: how many ways of looking share the error.
        error: probability that the bound is wrong.
    """
    counts = guess_counts(canaries)
    share = error / (views * len(counts))
    return max(_largest(one, one, target_delta=target_delta, canaries=canaries, error=share) for one in counts)


def _largest(correct: int, guesses: int, *, target_delta: float, canaries: int, error: float) -> float:
    """The largest epsilon whose p-value is at most the error; 0 where there is none."""
    low, high = 0.0, _LARGEST
    if p_value(correct, guesses, epsilon=low, target_delta=target_delta, canaries=canaries) > error:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        value = p_value(correct, guesses, epsilon=middle, target_delta=target_delta, canaries=canaries)
        low, high = (middle, high) if value <= error else (low, middle)
    return low
