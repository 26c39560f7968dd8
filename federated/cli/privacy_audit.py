"""``fedpeft privacy audit``: canaries through the mechanism that a run would use, and what they prove."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from federated.aggregation.cohorts import planned_cohort
from federated.cli.apps import enter_app
from federated.cli.compose import compose
from federated.config import ExperimentConfig
from federated.errors import ConfigError, PrivacyError
from federated.privacy.accounting import GaussianSteps, epsilon, noise_for
from federated.privacy.canaries import Audit, Canaries, ClientLevelPath, Mechanism, audit_mechanism
from federated.privacy.canaries_banded import BandedPath
from federated.privacy.canaries_example import ExampleLevelPath
from federated.privacy.chance import noise_source
from federated.privacy.cohorts import PoissonCohorts
from federated.privacy.server_budget import ServerBudget

__all__ = ["audit", "run", "show"]

_LAYERS = 8
_SAMPLING = 0.5
"""Of the canaries that are examples: with which probability each is in a batch."""


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
    broken = [one for _, one in found if not one.passed]
    if broken:
        raise PrivacyError(
            f"the audit found epsilon >= {broken[0].bound.epsilon:.3g} where {broken[0].accounted:.3g} is accounted: "
            "clipping, sampling or noise do not do what the account assumes; do not publish from this installation"
        )


def audit(config: ExperimentConfig, *, canaries: int, steps: int, seed: int = 0) -> list[tuple[str, Audit]]:
    """Audit each enabled unit, for an adversary who sees the sum and for one who sees each step.

    Args:
        config: with ``privacy.client`` or ``privacy.example`` enabled.
        canaries: how many.
        steps: at most so many releases; a run's own number of rounds if it has fewer.
        seed: of the coins.

    Returns:
        Unit and finding.

    Raises:
        ConfigError: if no mechanism is configured.
        PrivacyError: if the noise cannot be solved for.
    """
    privacy = config.privacy
    if not privacy.enabled:
        raise ConfigError("privacy.client.enabled = false: an audit needs a mechanism; add privacy=client_dp")
    rounds, found = min(steps, config.rounds), []
    for part in _parts(config, canaries, rounds):
        events = [GaussianSteps(part.noise_multiplier, part.sampling, math.ceil(rounds / part.groups))]
        for each_step in (False, True):
            path = part.make()
            one = audit_mechanism(
                path,
                canaries=canaries,
                steps=rounds,
                clip_norm=part.clip_norm,
                accounted=epsilon(events, privacy.target_delta, accountant=privacy.accountant),
                target_delta=privacy.target_delta,
                layers=_LAYERS,
                each_step=each_step,
                further=path.views if isinstance(path, BandedPath) else None,
                seed=seed,
            )
            found.append((part.unit, one))
    return found


@dataclass(frozen=True)
class _Part:
    """A unit's mechanism, made anew for each adversary, and what a step of it is accounted as."""

    unit: str
    make: Callable[[], Mechanism]
    clip_norm: float
    noise_multiplier: float
    sampling: float = 1.0
    groups: int = 1


def _parts(config: ExperimentConfig, canaries: int, rounds: int) -> Iterator[_Part]:
    client, example = config.privacy.client, config.privacy.example
    if client.enabled:
        budget = ServerBudget(config)
        sampling = config.selection.fraction if client.sampling == "poisson" else 1.0
        noise, groups = budget.noise_multiplier, budget.groups
        yield _Part("client", lambda: _client_path(config, canaries, budget), client.clip_norm, noise, sampling, groups)
    if example.enabled:
        noise = example.noise_multiplier or _solved(config, rounds)
        yield _Part("example", lambda: _example_path(config, canaries, noise), example.clip_norm, noise, _SAMPLING)


def _solved(config: ExperimentConfig, steps: int) -> float:
    """What a client with so many examples, half of them in each batch, would solve for over the audited steps."""
    target, accountant = (config.privacy.target_epsilon, config.privacy.target_delta), config.privacy.accountant
    return noise_for(*target, sampling=_SAMPLING, steps=steps, accountant=accountant)


def _example_path(config: ExperimentConfig, canaries: int, noise: float) -> ExampleLevelPath:
    example, shapes = config.privacy.example, Canaries.shapes(canaries, _LAYERS)
    parts = {"clip_norm": example.clip_norm, "noise_multiplier": noise, "sampling": _SAMPLING}
    return ExampleLevelPath(shapes, **parts, expected_batch=max(1, canaries // 2), source=noise_source())


def _client_path(config: ExperimentConfig, canaries: int, budget: ServerBudget) -> Mechanism:
    """The most that the account has to cover: without sampling that is claimed, everybody in each round of a group."""
    client, shapes = config.privacy.client, Canaries.shapes(canaries, _LAYERS)
    parts = {"clip_norm": client.clip_norm, "noise_multiplier": budget.noise_multiplier}
    if budget.band > 1:
        alike = {**parts, "planned": float(canaries)}
        return BandedPath(shapes, **alike, source=noise_source(), groups=budget.groups, band=budget.band)
    poisson = client.sampling == "poisson"
    fraction = config.selection.fraction if poisson else 1.0
    return ClientLevelPath(
        shapes,
        **parts,
        planned=planned_cohort(canaries, fraction, client),
        source=noise_source(),
        fraction=fraction,
        cohorts=PoissonCohorts(Canaries.names(canaries)) if poisson else None,
    )


def show(found: list[tuple[str, Audit]], console: Console) -> None:
    """Print what was found, for whom, and what it could have found."""
    table = Table("unit", "adversary sees", "lower bound at 95 %", "accounted", "ceiling", "verdict")
    for unit, one in found:
        table.add_row(
            unit,
            "each release" if one.each_step else "the sum of releases",
            f"{one.bound.epsilon:.3g}",
            f"{one.accounted:.3g}",
            f"{one.ceiling:.3g}",
            "nothing found" if one.passed else "BROKEN",
        )
    console.print(table)
    first = found[0][1]
    say = f"{first.canaries} canaries over {first.steps} steps, target_delta {first.target_delta:g}."
    console.print(say, soft_wrap=True, highlight=False)
    for words in dict.fromkeys(one.threat_model for _, one in found):
        console.print(f"Threat model: {words}.", soft_wrap=True, highlight=False)
    if any(one.ceiling < one.accounted for _, one in found):
        console.print(
            "Where the ceiling is below the accounted epsilon, so few canaries cannot speak against it; use more, or "
            "fewer steps.",
            soft_wrap=True,
        )
