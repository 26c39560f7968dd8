"""``fedpeft privacy audit``: canaries through the mechanism that a run would use, and what they prove."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from federated.aggregation.cohorts import planned_cohort
from federated.cli.apps import enter_app
from federated.cli.compose import compose
from federated.config import ExperimentConfig
from federated.errors import ConfigError, PrivacyError
from federated.privacy.accounting import GaussianSteps, epsilon
from federated.privacy.canaries import Audit, Canaries, ClientLevelPath, audit_mechanism
from federated.privacy.chance import noise_source
from federated.privacy.cohorts import PoissonCohorts
from federated.privacy.server_budget import ServerBudget

__all__ = ["audit", "run", "show"]

_LAYERS = 8


def run(overrides: list[str], *, app_dir: Path, canaries: int, steps: int, seed: int, console: Console) -> None:
    """Audit what the overrides configure, and print it.

    Args:
        overrides: Hydra overrides.
        app_dir: app folder.
        canaries: how many.
        steps: most releases that are looked at.
        seed: of the coins that put canaries in.
        console: to print on.

    Raises:
        ConfigError: if no mechanism is configured.
        PrivacyError: if the bound is above the accounted epsilon.
    """
    found = audit(compose(enter_app(app_dir), overrides), canaries=canaries, steps=steps, seed=seed)
    show(found, console)
    broken = [one for one in found if not one.passed]
    if broken:
        raise PrivacyError(
            f"the audit found epsilon >= {broken[0].bound.epsilon:.3g} where {broken[0].accounted:.3g} is accounted: "
            "clipping, sampling or noise do not do what the account assumes; do not publish from this installation"
        )


def audit(config: ExperimentConfig, *, canaries: int, steps: int, seed: int = 0) -> list[Audit]:
    """Audit client-level privacy as configured, for an adversary who sees the sum and for one who sees each step.

    Args:
        config: with ``privacy.client.enabled``.
        canaries: how many.
        steps: at most so many rounds; a run's own number if it has fewer.
        seed: of the coins.

    Raises:
        ConfigError: if no client-level privacy is configured.
        PrivacyError: if the noise cannot be solved for.
    """
    if not config.privacy.client.enabled:
        raise ConfigError("privacy.client.enabled = false: an audit needs a mechanism; add privacy=client_dp")
    budget, rounds = ServerBudget(config), min(steps, config.rounds)
    sampling = config.selection.fraction if config.privacy.client.sampling == "poisson" else 1.0
    target_delta = config.privacy.target_delta
    accounted = epsilon(
        [GaussianSteps(budget.noise_multiplier, sampling, rounds)], target_delta, accountant=config.privacy.accountant
    )
    return [
        audit_mechanism(
            _path(config, canaries, noise_multiplier=budget.noise_multiplier),
            canaries=canaries,
            steps=rounds,
            clip_norm=config.privacy.client.clip_norm,
            accounted=accounted,
            target_delta=target_delta,
            layers=_LAYERS,
            each_step=each_step,
            seed=seed,
        )
        for each_step in (False, True)
    ]


def _path(config: ExperimentConfig, canaries: int, *, noise_multiplier: float) -> ClientLevelPath:
    """Without sampling that is claimed everybody is in each round: the most that the account has to cover."""
    client = config.privacy.client
    names = Canaries.names(canaries)
    poisson = client.sampling == "poisson"
    fraction = config.selection.fraction if poisson else 1.0
    return ClientLevelPath(
        Canaries.shapes(canaries, _LAYERS),
        clip_norm=client.clip_norm,
        noise_multiplier=noise_multiplier,
        planned=planned_cohort(canaries, fraction, sampling=client.sampling),
        source=noise_source(),
        fraction=fraction,
        cohorts=PoissonCohorts(names) if poisson else None,
    )


def show(found: list[Audit], console: Console) -> None:
    """Print what was found, for whom, and what it could have found."""
    table = Table("adversary sees", "lower bound at 95 %", "accounted", "ceiling", "verdict")
    for one in found:
        table.add_row(
            "each release" if one.each_step else "the sum of releases",
            f"{one.bound.epsilon:.3g}",
            f"{one.accounted:.3g}",
            f"{one.ceiling:.3g}",
            "nothing found" if one.passed else "BROKEN",
        )
    console.print(table)
    first = found[0]
    say = f"{first.canaries} canaries over {first.steps} steps, unit client, target_delta {first.target_delta:g}."
    console.print(say, soft_wrap=True, highlight=False)
    for one in found:
        console.print(f"Threat model: {one.threat_model}.", soft_wrap=True, highlight=False)
    if all(one.ceiling < one.accounted for one in found):
        console.print(
            "The ceiling is below the accounted epsilon: so few canaries cannot speak against it; use more, or fewer "
            "steps.",
            soft_wrap=True,
        )
