"""What private steps cost: epsilon of a list of events, the noise for an epsilon, and how many steps still fit.

An event is a run of equal steps of the Poisson-subsampled Gaussian mechanism between data sets that differ by one unit,
added or removed. Events compose whatever their noise and sampling. Three accountants give an upper bound on the same
epsilon: ``rdp`` (fast, 3 to 40 % loose, far more where the sampling is rare), ``prv`` and ``pld`` (tight, slower).
Gaussian DP's central limit is not among them: it says less than is spent where sampling is claimed.

Nothing here is private data, and nothing is remembered: `federated.privacy.ledger` does that.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Self

from federated.errors import PrivacyError
from federated.privacy.opacus_accountants import Gaussians, prv_epsilon, rdp_epsilon
from federated.privacy.pld import pld_epsilon

__all__ = ["ACCOUNTANTS", "GaussianSteps", "epsilon", "noise_for", "steps_within"]

ACCOUNTANTS = ("rdp", "prv", "pld")
_KIND = "gaussian_steps"
_CLOSE = 1.001
_MOST_STEPS = 10**9
_BEYOND_USE = 1000.0


@dataclass(frozen=True)
class GaussianSteps:
    """Steps of one mechanism: a sum over Poisson-sampled units, each bounded by a clipping norm, plus Gaussian noise.

    Args:
        noise_multiplier: standard deviation of the noise on the sum, in units of the clipping norm; 0 is no privacy.
        sampling: probability in (0, 1] that a unit takes part in a step; 1.0 claims no amplification.
        steps: how many such steps; none costs nothing.

    Raises:
        PrivacyError: if a value is out of range.
    """

    noise_multiplier: float
    sampling: float
    steps: int

    def __post_init__(self) -> None:
        for name, least in (("noise_multiplier", "at least 0"), ("sampling", "above 0 and at most 1")):
            found = getattr(self, name)
            if not _is_number(found) or found < 0 or (name == "sampling" and not 0 < found <= 1):
                raise PrivacyError(f"{name} = {found!r}: expected a number, {least}")
            object.__setattr__(self, name, float(found))
        if type(self.steps) is not int or not 0 <= self.steps <= _MOST_STEPS:
            raise PrivacyError(f"steps = {self.steps!r}: expected a whole number from 0 to {_MOST_STEPS:.0e}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a ledger's record."""
        return {"kind": _KIND, **asdict(self)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Rebuild from `to_dict`.

        Raises:
            PrivacyError: for another kind of event, missing or unknown keys, or values out of range.
        """
        expected = {"kind", "noise_multiplier", "sampling", "steps"}
        if not isinstance(value, Mapping) or set(value) != expected or value["kind"] != _KIND:
            raise PrivacyError(f"not an event of kind {_KIND}: expected the keys {', '.join(sorted(expected))}")
        return cls(value["noise_multiplier"], value["sampling"], value["steps"])


def epsilon(events: Iterable[GaussianSteps], target_delta: float, *, accountant: str = "rdp") -> float:
    """An upper bound on the epsilon that the events spend together.

    Args:
        events: in any order; none, or none with steps, spend 0.
        target_delta: the probability beside epsilon, in (0, 1).
        accountant: ``rdp``, ``prv`` or ``pld``. The tighter two are never above ``rdp``; past 1,000, where epsilon
            says nothing of use, they hand back its bound.

    Returns:
        Epsilon; infinity where a step has no noise.

    Raises:
        PrivacyError: for a value out of range, an unknown accountant, or one that is not installed.

    >>> epsilon([GaussianSteps(1.0, 0.0, 0)], 1e-5)
    Traceback (most recent call last):
    federated.errors.PrivacyError: sampling = 0.0: expected a number, above 0 and at most 1
    >>> round(epsilon([GaussianSteps(1.0, 1.0, 1)], 1e-5), 2)
    4.73
    """
    _check_target_delta(target_delta)
    compute = _accountant(accountant)
    merged = _merged(events)
    if merged is None:
        return math.inf
    return _computed(compute, tuple(merged), target_delta) if merged else 0.0


@lru_cache(maxsize=4096)
def _computed(compute: Callable[[Gaussians, float], float], merged: Gaussians, target_delta: float) -> float:
    """A run asks for the same sum before a round, beside its version and in its record; clients of a size likewise."""
    return compute(merged, target_delta)


def noise_for(
    target_epsilon: float,
    target_delta: float,
    *,
    sampling: float,
    steps: int,
    spent: Iterable[GaussianSteps] = (),
    accountant: str = "rdp",
    most: float = 1e4,
) -> float:
    """The least noise multiplier with which the steps, after what is spent, stay within the target.

    Args:
        target_epsilon: above 0.
        target_delta: in (0, 1).
        sampling: of each step, in (0, 1].
        steps: how many.
        spent: events before them.
        accountant: see `epsilon`.
        most: largest noise multiplier that is tried.

    Returns:
        A noise multiplier that keeps the target, at most 0.1 % above the least one; 0 for no steps.

    Raises:
        PrivacyError: if even ``most`` does not keep it, or a value is out of range.
    """
    _check_target_epsilon(target_epsilon)
    before = tuple(spent)

    def cost(noise: float, by: str = accountant) -> float:
        return epsilon((*before, GaussianSteps(noise, sampling, steps)), target_delta, accountant=by)

    least = cost(most)
    if least > target_epsilon:
        raise PrivacyError(
            f"epsilon {target_epsilon:g} at target_delta {target_delta:g} cannot be kept over {steps} steps with "
            f"sampling {sampling:g}: with the most noise ({most:g}) it is {least:.4g}"
            f"{_of_it_spent(before, target_delta, accountant=accountant)}; ask for a larger epsilon or fewer steps"
        )
    if steps == 0:
        return 0.0
    start = _first_power(lambda noise: cost(noise, "rdp") <= target_epsilon, most)
    start = _least(lambda noise: cost(noise, "rdp"), target_epsilon, start)
    return start if accountant == "rdp" else _least(cost, target_epsilon, start)


def steps_within(
    target_epsilon: float,
    target_delta: float,
    *,
    noise_multiplier: float,
    sampling: float,
    spent: Iterable[GaussianSteps] = (),
    accountant: str = "rdp",
    most: int = 10_000_000,
) -> int:
    """How many more steps fit, after what is spent; at most ``most``.

    Raises:
        PrivacyError: if a value is out of range.
    """
    _check_target_epsilon(target_epsilon)
    before = tuple(spent)

    def fits(steps: int) -> bool:
        events = (*before, GaussianSteps(noise_multiplier, sampling, steps))
        return epsilon(events, target_delta, accountant=accountant) <= target_epsilon

    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _first_power(keeps: Callable[[float], bool], most: float) -> float:
    """Noise that keeps a target, within a factor of two of the least: cheap, and never far below where epsilon is."""
    while keeps(most / 2):
        most /= 2
    return most


def _least(cost: Callable[[float], float], target: float, high: float) -> float:
    """The least noise whose cost keeps a target, from some that does.

    Epsilon is close to a power of the noise, so the answer is looked for on both sides of where that power would be,
    and in the middle where it is not: a tight accountant is asked five or six times.
    """
    known = {high: cost(high)}
    step = 1.25
    low = high / step
    while known.setdefault(low, cost(low)) <= target:
        step = min(8.0, step * 1.25)
        low, high = low / step, low
    while high > low * _CLOSE:
        guess = _crossing(low, high, known=known, target=target)
        for point in (guess * _CLOSE**0.4, guess / _CLOSE**0.4):
            if low < point < high:
                known[point] = cost(point)
                low, high = (low, point) if known[point] <= target else (point, high)
    return high


def _crossing(low: float, high: float, *, known: Mapping[float, float], target: float) -> float:
    """Where a power law through both ends has the target; the middle where there is none."""
    above, below = known[low], known[high]
    share = 0.5
    if math.isfinite(above) and below > 0 and above > below:
        share = min(0.95, max(0.05, math.log(above / target) / math.log(above / below)))
    return float(low * (high / low) ** share)


def _of_it_spent(before: tuple[GaussianSteps, ...], target_delta: float, *, accountant: str) -> str:
    return f", of which {epsilon(before, target_delta, accountant=accountant):.4g} was spent before" if before else ""


def _merged(events: Iterable[GaussianSteps]) -> Gaussians | None:
    """Equal steps counted together, those without sampling as one Gaussian, which is exact; None without noise."""
    counts: Counter[tuple[float, float]] = Counter()
    precision = 0.0
    for event in events:
        if event.steps and not event.noise_multiplier:
            return None
        if event.sampling == 1.0 and event.steps:
            precision += event.steps / event.noise_multiplier / event.noise_multiplier
        elif event.steps:
            counts[event.noise_multiplier, event.sampling] += event.steps
    if math.isinf(precision):
        return None
    whole = [(1 / math.sqrt(precision), 1.0, 1)] if precision else []
    return [*whole, *((*key, steps) for key, steps in sorted(counts.items()))]


def _rdp(events: Gaussians, target_delta: float) -> float:
    return rdp_epsilon(events, target_delta)


def _prv(events: Gaussians, target_delta: float) -> float:
    rough = rdp_epsilon(events, target_delta)
    return rough if rough > _BEYOND_USE else min(rough, prv_epsilon(events, target_delta, rough=rough))


def _pld(events: Gaussians, target_delta: float) -> float:
    rough = rdp_epsilon(events, target_delta)
    return rough if rough > _BEYOND_USE else min(rough, pld_epsilon(events, target_delta, rough=rough))


def _accountant(name: str) -> Callable[[Gaussians, float], float]:
    known = {"rdp": _rdp, "prv": _prv, "pld": _pld}
    if name not in known:
        why = "; it is a limit, not a bound, and says less than is spent" if name == "gdp" else ""
        raise PrivacyError(f"privacy.accountant = {name!r}{why}: expected one of {', '.join(ACCOUNTANTS)}")
    return known[name]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_target_delta(target_delta: float) -> None:
    if not _is_number(target_delta) or not 0 < target_delta < 1:
        raise PrivacyError(f"target_delta = {target_delta!r}: expected a probability above 0 and below 1")


def _check_target_epsilon(target_epsilon: float) -> None:
    if not _is_number(target_epsilon) or target_epsilon <= 0:
        raise PrivacyError(f"target_epsilon = {target_epsilon!r}: expected a number above 0")
