"""Opacus' RDP curves and PRV accountant: the one importer of Opacus' accounting.

It asks for single orders of the RDP curve, which are cheap, remembers them, and looks for the best order itself: the
accountant's own list ends at 63 and starts at 1.1, it warns where the best one is outside, and it sums a slow series
for a hundred fractional orders of which one is used. Any order gives a bound, so a shorter list is never less safe.

Sources: Mironov, Talwar and Zhang, "Renyi Differential Privacy of the Sampled Gaussian Mechanism", 2019, section 3.3
(the curve); Balle et al., "Hypothesis testing interpretations and Renyi differential privacy", 2020, theorem 21 (the
conversion); Gopi, Lee and Wutschitz, "Numerical Composition of Differential Privacy", 2021 (PRV). Opacus computes PRV
for the removal of one; no case is known in which the addition of one costs more.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np

from federated.errors import PrivacyError

__all__ = ["Gaussians", "prv_epsilon", "rdp_epsilon"]

Gaussians = Sequence[tuple[float, float, int]]
"""(noise multiplier, sampling, steps) of each run of equal steps; noise above 0, sampling in (0, 1]."""

_WHOLE = (*range(2, 65), 72, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024)
_LARGE = tuple(2**power for power in range(11, 31))
_LARGEST_SAMPLED = 1024  # beyond it Opacus' binomials overflow; the curve without sampling is a bound there too
_TENTHS = 10
_LOWEST = (1.005, 1.01, 1.02, 1.05)
_MESH_POINTS = 1_000_000
_WARNINGS = threading.Lock()


def rdp_epsilon(events: Gaussians, target_delta: float) -> float:
    """Epsilon by Renyi DP: the least that any of the orders proves; 0 at the least.

    Args:
        events: composed, in any order.
        target_delta: in (0, 1).

    Raises:
        PrivacyError: if Opacus is not installed.
    """

    def bound(order: float) -> float:
        total = math.fsum(steps * _renyi(noise, sampling, order) for noise, sampling, steps in events)
        return total + _conversion(order, target_delta)

    best = _lowest(bound, (*_WHOLE, *_LARGE))
    return max(0.0, min(bound(best), bound(_lowest(bound, _broken(best)))))


def _lowest(bound: Callable[[float], float], orders: Sequence[float]) -> float:
    """The order with the least bound: along them it falls, then rises. Were it not so, another is a bound as well."""
    low, high = 0, len(orders) - 1
    while low < high:
        middle = (low + high) // 2
        if bound(orders[middle]) <= bound(orders[middle + 1]):
            high = middle
        else:
            low = middle + 1
    return orders[low]


def _broken(best: float) -> Sequence[float]:
    """Orders in tenths around a whole one; itself where the curve is flat, and where Opacus has no tenths either."""
    if best > _TENTHS:
        return (best,)
    orders = [step / _TENTHS for step in range(int(_TENTHS * (best - 1)) + 1, int(_TENTHS * (best + 1)))]
    return [*_LOWEST, *orders] if best == _WHOLE[0] else orders


def _conversion(order: float, target_delta: float) -> float:
    """What is added to a Renyi divergence of that order; Balle et al. 2020, theorem 21."""
    return math.log1p(-1 / order) - (math.log(target_delta) + math.log(order)) / (order - 1)


@lru_cache(maxsize=100_000)
def _renyi(noise: float, sampling: float, order: float) -> float:
    """Renyi divergence of one step at one order."""
    if sampling == 1.0 or order > _LARGEST_SAMPLED:
        return order / (2 * noise**2)
    with np.errstate(all="ignore"):
        try:
            found = float(_opacus().curve(q=sampling, noise_multiplier=noise, steps=1, orders=float(order)))
        except (ValueError, OverflowError, ZeroDivisionError):  # its series cancels out: this order proves nothing
            return math.inf
    return found if found >= 0 else math.inf


def prv_epsilon(events: Gaussians, target_delta: float, *, rough: float) -> float:
    """Epsilon by composing the privacy loss itself: the upper bound of Opacus' PRV accountant.

    It is put together from the accountant's own parts, with the domain that it would take; but bounded by `rdp_epsilon`
    and not by its list of orders, which takes ten times as long as the rest.

    Args:
        events: composed, in any order.
        target_delta: in (0, 1).
        rough: a bound on epsilon from `rdp_epsilon`, which sets the mesh.

    Raises:
        PrivacyError: if Opacus is not installed, or finds no answer.
    """
    prv = _opacus().prv
    total, slack = sum(steps for _, _, steps in events), target_delta / 1000
    per_error = math.sqrt(total * math.log(12 / slack) / 2)
    error = min(1.0, max(5e-3, rough / 200, 2 * (rough + 3) * per_error / _MESH_POINTS))
    single = (rdp_epsilon([(noise, sampling, 1)], slack / (8 * total)) for noise, sampling, _ in events)
    edge = max(rdp_epsilon(events, slack / 4), *single, error) + 3  # Gopi et al., remark 5.6
    with _WARNINGS, warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of integrals over parts where there is nothing
        try:
            domain = prv.Domain.create_aligned(-edge, edge, error / per_error)
            losses = [_loss(prv, domain, noise, sampling=sampling) for noise, sampling, _ in events]
            composed = prv.compose_heterogeneous(losses, [steps for _, _, steps in events])
            found = float(composed.compute_epsilon(target_delta, slack, error)[2])
        except (RuntimeError, ValueError, OverflowError) as problem:
            raise _no_answer(problem) from None
    if not math.isfinite(found):
        raise _no_answer(f"it found {found}")
    return max(0.0, found)


def _loss(prv: Any, domain: Any, noise: float, *, sampling: float) -> Any:
    """The discrete privacy loss of one step."""
    whole = prv.PoissonSubsampledGaussianPRV(sampling, noise)
    return prv.discretize(prv.TruncatedPrivacyRandomVariable(whole, domain.t_min, domain.t_max), domain)


def _no_answer(problem: object) -> PrivacyError:
    return PrivacyError(f"the prv accountant finds no epsilon here ({problem}); set privacy.accountant=rdp or pld")


class _Opacus:
    """What is used of it."""

    def __init__(self, curve: Callable[..., Any], prv: Any) -> None:
        self.curve, self.prv = curve, prv


@cache
def _opacus() -> _Opacus:
    try:
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from opacus.accountants.analysis import prv
            from opacus.accountants.analysis.rdp import compute_rdp
    except ImportError:
        raise PrivacyError(
            "epsilon is computed by Opacus, which is not installed; pip install federated-peft[privacy]"
        ) from None
    return _Opacus(compute_rdp, prv)
