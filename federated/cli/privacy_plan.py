"""``fedpeft privacy plan``: the numbers of `federated.privacy.plan` for a composed experiment, with what they mean."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from federated.aggregation import Rule, make_rule
from federated.aggregation.cohorts import planned_cohort
from federated.aggregation.combine_privacy import check_client_privacy
from federated.cli.apps import enter_app
from federated.cli.compose import compose
from federated.config import ExperimentConfig
from federated.errors import ConfigError, DataError, ModelError
from federated.privacy.account import NEIGHBOURING, NOT_PROTECTED, POISSON, client_sampling
from federated.privacy.plan import ClientPlan, ExamplePlan, Landmark, landmarks, plan_clients, plan_examples
from federated.privacy.plan_banded import BandedPlan

__all__ = ["Given", "run"]

TRUST = {
    "example": "the server, and whoever reads what a client sends, need not be trusted: noise is added on the client",
    "client": (
        "the server is trusted: without secure aggregation it sees each client's delta, and a delta can be read; what "
        "it publishes is protected"
    ),
}
NOTHING = "nothing is protected: the server sees each client's delta, a delta can be read, and so can a version"
ABOUT_EXAMPLES = (
    "Of each client size: q = batch / examples; a client that takes part in every round; std is of the noise on the "
    "mean gradient, per coordinate, in clipping norms. Above 0.1 little is learnt: at a batch of 16 and epsilon 8, "
    "clients of fewer than about 100 examples are there."
)
ABOUT_CLIENTS = (
    "Length is of the noise on the mean update, in clipping norms, beside updates of at most 1: over T rounds it grows "
    "with sqrt(T), and what the clients agree on with T. Fewer than about 1,000 clients: use privacy=example_dp."
)
ABOUT_TURNS = (
    "Length is of the noise on one round's mean update, in clipping norms, beside updates of at most 1; what is left "
    "of it in the sum of all rounds is below, and the verdict is on that."
)
ABOUT_BANDED = (
    "Noise of a round takes back part of that of the rounds before: each client is in one of the groups, which take "
    "turns. Noise is its standard deviation on each value of a sum of updates, in clipping norms: of a round, of the "
    "sum of all rounds, and the root of the mean square (rms) over the sums of the first 1, 2, 3 ... rounds, beside "
    "that of independent noise of the same epsilon, in the same groups and where anybody may be in any round."
)
ORIENTATION = (
    "For orientation, other populations with the same rounds and epsilon (8 where none is set), by rdp; cohorts that "
    "are smaller than their population are drawn by chance, and that is claimed:"
)
RULE_OF_THUMB = "Verdicts are rules of thumb; what a run really learns is only known from running it."


@dataclass(frozen=True)
class Given:
    """Numbers from the command line in place of the data's and the model's own."""

    examples: tuple[int, ...] = ()
    clients: int | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class _Found:
    """All that is printed."""

    config: ExperimentConfig
    examples: tuple[ExamplePlan, ...] = ()
    clients: ClientPlan | None = None
    landmarks: tuple[Landmark, ...] = ()


def run(overrides: Sequence[str], *, app_dir: Path, given: Given, as_json: bool, console: Console) -> None:
    """Compose, plan and print.

    Raises:
        ConfigError: if the plan cannot be kept, or a number is out of range.
        DataError: if the clients' sizes are wanted and the data is not there.
    """
    numbers = {
        "--examples": min(given.examples, default=1),
        "--clients": given.clients,
        "--parameters": given.parameters,
    }
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ConfigError(f"{name} {number}: expected at least 1")
    folder = enter_app(app_dir)
    found = _plan(compose(folder, overrides), folder, given)
    if as_json:
        print(json.dumps(_plain(found), allow_nan=False))
    else:
        _show(found, console)


def _plan(config: ExperimentConfig, folder: Path, given: Given) -> _Found:
    privacy = config.privacy
    sizes = given.examples
    if (privacy.example.enabled and not sizes) or (privacy.client.enabled and given.clients is None):
        counted = _sizes(config, folder, rows=privacy.example.enabled and not sizes)
        population, sizes = len(counted), sizes or counted
    population = given.clients or (population if privacy.client.enabled else 0)
    examples = plan_examples(config, sizes) if privacy.example.enabled else ()
    if not privacy.client.enabled:
        return _Found(config, examples)
    rule = make_rule(config.strategy.rule, config.strategy.options)
    check_client_privacy(rule, config, clients=population)
    cohort = planned_cohort(population, config.selection.fraction, privacy.client)
    parameters = given.parameters or _parameters(config, folder, rule)
    clients = plan_clients(config, population, cohort=cohort, parameters=parameters)
    return _Found(config, examples, clients, landmarks(config, parameters=parameters))


def _sizes(config: ExperimentConfig, folder: Path, *, rows: bool) -> tuple[int, ...]:
    """Training examples of each client of the data; ones where only their number is wanted."""
    from federated.data import open_source

    source = open_source(config.data, config.task, app_dir=folder)
    return tuple(len(source.load(name).train) if rows else 1 for name in source.client_ids)


def _parameters(config: ExperimentConfig, folder: Path, rule: Rule) -> int | None:
    """Numbers in an update, as the rule has them in its first round; None where the model is not on this machine."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # a plan downloads nothing
    from federated.adapters import attach, load_base
    from federated.aggregation import ClientView
    from federated.global_state import GlobalState
    from federated.uploads import layout

    try:
        adapter = attach(load_base(config.model, app_dir=folder), config.adapter, config.task, seed=config.seed)
    except (ModelError, DataError):
        return None
    state = GlobalState(adapter.read(), rule_state=rule.init(adapter.spec))
    plan, payload = rule.plan(state, ClientView("anybody"), 1)
    return sum(math.prod(entry.shape) for entry in layout(plan, payload))


# ---- printed ---------------------------------------------------------------------------------------------------------


def _show(found: _Found, console: Console) -> None:
    config = found.config
    if not config.privacy.enabled:
        console.print(f"privacy=none: {NOTHING}", highlight=False, soft_wrap=True)
        return
    if found.examples:
        _show_examples(found.examples, console)
    if found.clients:
        _show_clients(found.clients, console)
        _show_landmarks(found.landmarks, console)
    _say(console, RULE_OF_THUMB)
    for unit, sampling in _sampling(config).items():
        _say(console, f"{unit}: adding or removing one {unit} is hidden ({NEIGHBOURING}); sampling: {sampling}")
        _say(console, f"{unit}: {TRUST[unit]}")
    _say(console, f"accountant: {config.privacy.accountant}; target_delta: {config.privacy.target_delta:g}")
    _say(console, f"not protected: {'; '.join(NOT_PROTECTED)}")
    if config.privacy.test_seed >= 0:
        _say(console, "privacy.test_seed is set: the noise can be made again, and NOTHING of this run is private")


def _show_examples(plans: Sequence[ExamplePlan], console: Console) -> None:
    heads = _heads(next(plan.epsilons for plan in plans if plan.steps))
    table = Table("examples", "clients", "q", "steps", "noise", "std", *heads, "verdict", title="Example-level privacy")
    for plan in plans:
        cells: list[object] = [f"{plan.examples}", f"{plan.clients}"]
        if not plan.steps:
            table.add_row(*map(str, cells), *["-"] * (4 + len(heads)), Text(plan.verdict))
            continue
        cells += [_number(plan.sampling), plan.steps, _number(plan.noise_multiplier), _number(plan.noise_std)]
        cells += [_number(spent) for _, spent in plan.epsilons]
        table.add_row(*map(str, cells), Text(plan.verdict))
    console.print(table)
    _say(console, ABOUT_EXAMPLES)


def _heads(epsilons: Sequence[tuple[int, float]]) -> list[str]:
    return [f"epsilon, {rounds} round{'s' if rounds > 1 else ''}" for rounds, _ in epsilons]


def _show_clients(plan: ClientPlan, console: Console) -> None:
    columns = ("clients", "cohort", "q claimed", "noise", "parameters", "length", *_heads(plan.epsilons), "verdict")
    table = Table(*columns, title="Client-level privacy")
    table.add_row(
        str(plan.population),
        f"{plan.cohort:g}",
        _number(plan.sampling),
        _number(plan.noise_multiplier),
        "unknown" if plan.parameters is None else f"{plan.parameters:,}",
        _number(plan.noise_length),
        *[_number(spent) for _, spent in plan.epsilons],
        Text(plan.verdict),
    )
    console.print(table)
    if plan.parameters is None:
        _say(console, "The model is not on this machine, so its parameters are not known; say --parameters N.")
    _say(console, ABOUT_TURNS if plan.banded else ABOUT_CLIENTS)
    if plan.banded:
        _show_banded(plan.banded, console)


def _show_banded(plan: BandedPlan, console: Console) -> None:
    columns = ("groups", "times each", "band", "column norm", "of a round", "of all rounds", "rms of sums")
    table = Table(*columns, "rms, same groups", "rms, anybody", title="Correlated noise")
    whole = (plan.groups, plan.participations, plan.band)
    noises = (plan.column_norm, plan.noise_of_a_round, plan.noise_of_the_last_sum, plan.noise_of_the_sums)
    others = (plan.independent, plan.everybody)
    table.add_row(*map(str, whole), *map(_number, (*noises, *others)))
    console.print(table)
    _say(console, ABOUT_BANDED)


def _show_landmarks(marks: Sequence[Landmark], console: Console) -> None:
    table = Table("clients", "cohort", "noise", "length")
    for mark in marks:
        table.add_row(
            f"{mark.population:,}", f"{mark.cohort:,}", _number(mark.noise_multiplier), _number(mark.noise_length)
        )
    _say(console, ORIENTATION)
    console.print(table)


def _sampling(config: ExperimentConfig) -> dict[str, str]:
    """What is assumed about sampling, of each unit that is protected."""
    privacy = config.privacy
    assumed = {"example": POISSON} if privacy.example.enabled else {}
    if privacy.client.enabled:
        assumed["client"] = client_sampling(config)
    return assumed


def _number(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:.3g}" if math.isfinite(value) else "no bound"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _plain(found: _Found) -> dict[str, Any]:
    """One JSON object; an infinite epsilon is null, as in a manifest."""
    config = found.config
    privacy = config.privacy
    about = {
        "neighbouring": NEIGHBOURING,
        "accountant": privacy.accountant,
        "target_epsilon": privacy.target_epsilon or None,
        "target_delta": privacy.target_delta,
        "rounds": config.rounds,
        "private": privacy.enabled and privacy.test_seed < 0,
        "sampling": _sampling(config),
        "trusted": {unit: TRUST[unit] for unit in _sampling(config)} or NOTHING,
        "not_protected": list(NOT_PROTECTED) if privacy.enabled else ["everything"],
    }
    plans = {
        "example": [_finite(asdict(plan)) for plan in found.examples],
        "client": _finite(asdict(found.clients)) if found.clients else None,
        "landmarks": [asdict(mark) for mark in found.landmarks],
    }
    return {**about, **plans}


def _finite(plan: dict[str, Any]) -> dict[str, Any]:
    epsilons = {str(rounds): spent if math.isfinite(spent) else None for rounds, spent in plan["epsilons"]}
    return plan | {"epsilons": epsilons}
