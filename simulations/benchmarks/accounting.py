"""Accounted epsilon against Opacus, dp-accounting and Flower's accountant, on a grid where all apply.

    python simulations/benchmarks/accounting.py [--quick] [--seed N]

Each row is a run of equal steps at target_delta 1e-5. ``rdp``, ``prv`` and ``pld`` are `federated.privacy.accounting`;
beside them stand the others' own accountants with their own lists of orders: Opacus' RDP and PRV, dp-accounting's RDP
and PLD, and Flower's ``RdpAccountant`` (Poisson where the row is sampled, else no amplification). Differences are
relative, ours over theirs less one: below zero is a tighter bound from more orders, above zero a looser one. What must
never be is a bound below dp-accounting's PLD with its finest grid: ``least_over_pld`` is the smallest quotient.

Nothing here is random; ``--seed`` is taken, as by every benchmark, and changes nothing. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from federated.privacy.accounting import ACCOUNTANTS, GaussianSteps, epsilon

__all__ = ["main"]

TARGET_DELTA = 1e-5
QUICK = ((0.8, 2.0), (1.0, 0.1), (10, 100))
FULL = ((0.6, 1.0, 4.0), (1.0, 0.2, 0.01), (1, 30, 1000))
LARGEST = 200.0
"""Rows of a larger epsilon are left out: it says nothing, and dp-accounting's finest grid of it fills the memory."""
SAME = {"opacus_rdp": "rdp", "dp_rdp": "rdp", "flower": "rdp", "opacus_prv": "prv", "dp_pld": "pld"}
"""Which of ours each of the others is compared with."""


@dataclass(frozen=True)
class Row:
    """One run of equal steps: epsilon and seconds of each accountant, by name."""

    event: GaussianSteps
    epsilons: dict[str, float]
    seconds: dict[str, float]

    def difference(self, other: str) -> float:
        """Ours over theirs, less one."""
        return self.epsilons[SAME[other]] / self.epsilons[other] - 1


def opacus(name: str, event: GaussianSteps) -> float:
    """Opacus' accountant of that name, as it comes."""
    from opacus.accountants import create_accountant

    accountant = create_accountant(name)
    accountant.history = [(event.noise_multiplier, event.sampling, event.steps)]
    return float(accountant.get_epsilon(TARGET_DELTA))


def google(name: str, event: GaussianSteps) -> float:
    """dp-accounting's accountant of that name, as it comes."""
    import dp_accounting
    from dp_accounting import pld, rdp

    accountant: Any = {"rdp": rdp.RdpAccountant, "pld": pld.PLDAccountant}[name]()
    gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
    sampled = gaussian if event.sampling == 1 else dp_accounting.PoissonSampledDpEvent(event.sampling, gaussian)
    accountant.compose(sampled, event.steps)
    return float(accountant.get_epsilon(TARGET_DELTA))


def flower(event: GaussianSteps) -> float:
    """Flower's accountant, of a population of a thousand."""
    from flwr.serverapp import GaussianPrivacyEvent, PrivacyConfig, RdpAccountant
    from flwr.supercore.privacy_accounting import NeighboringRelation, SamplingMethod

    method = SamplingMethod.NO_AMPLIFICATION if event.sampling == 1 else SamplingMethod.POISSON
    relation = NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = RdpAccountant(PrivacyConfig(TARGET_DELTA, 1000, relation, method))
    cohort = round(1000 * event.sampling)
    accountant.compose(GaussianPrivacyEvent(event.noise_multiplier, cohort, 1000), event.steps)
    return float(accountant.get_epsilon(TARGET_DELTA))


def measure(event: GaussianSteps) -> Row:
    """All accountants on one run of steps."""
    ways: dict[str, Callable[[], float]] = {name: _ours(name, event) for name in ACCOUNTANTS}
    ways |= {"opacus_rdp": lambda: opacus("rdp", event), "dp_rdp": lambda: google("rdp", event)}
    ways |= {"flower": lambda: flower(event), "dp_pld": lambda: google("pld", event)}
    if event.sampling < 1:  # Opacus' PRV divides by zero without sampling
        ways["opacus_prv"] = lambda: opacus("prv", event)
    epsilons, seconds = {}, {}
    for name, way in ways.items():
        began = time.perf_counter()
        epsilons[name] = way()
        seconds[name] = time.perf_counter() - began
    return Row(event, epsilons, seconds)


def _ours(name: str, event: GaussianSteps) -> Callable[[], float]:
    return lambda: epsilon([event], TARGET_DELTA, accountant=name)


def show(rows: Sequence[Row]) -> None:
    """The grid, with the largest difference to each of the others."""
    names = (*ACCOUNTANTS, *SAME)
    table = Table("noise", "q", "steps", *names, title=f"epsilon at target_delta {TARGET_DELTA:g}")
    for row in rows:
        cells = [f"{row.epsilons[name]:.4g}" if name in row.epsilons else "-" for name in names]
        table.add_row(f"{row.event.noise_multiplier:g}", f"{row.event.sampling:g}", str(row.event.steps), *cells)
    Console(width=140).print(table)


def result_of(rows: Sequence[Row]) -> dict[str, Any]:
    """The last line."""
    found = {name: [row.difference(name) for row in rows if name in row.epsilons] for name in SAME}
    every = [one for name in found for one in found[name]]
    return {
        "largest_difference": max(map(abs, every)),
        "largest_above": max(every),
        "largest_difference_to": {name: max(ones, key=abs) for name, ones in found.items()},
        "least_over_pld": min(row.epsilons[ours] / row.epsilons["dp_pld"] for row in rows for ours in ACCOUNTANTS),
        "prv_seconds_over_opacus": _seconds(rows, "prv") / _seconds(rows, "opacus_prv"),
        "rows": len(rows),
    }


def _seconds(rows: Sequence[Row], name: str) -> float:
    return sum(row.seconds[name] for row in rows if "opacus_prv" in row.seconds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: eight rows")
    parser.add_argument("--seed", type=int, default=0, help="changes nothing: no chance is in it")
    options = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)  # dp-accounting's RDP floods it
    warnings.simplefilter("ignore")  # Opacus' orders and divisions
    measure(GaussianSteps(1.0, 0.5, 1))  # loads the libraries
    grid = itertools.product(*(QUICK if options.quick else FULL))
    events = [GaussianSteps(*event) for event in grid]
    rows = []
    for event in (event for event in events if epsilon([event], TARGET_DELTA) < LARGEST):
        rows.append(measure(event))
        print(f"{event}: {sum(rows[-1].seconds.values()):.1f} s", file=sys.stderr)
    show(rows)
    print(json.dumps(result_of(rows)))


if __name__ == "__main__":
    main()
