"""What a run would promise and what that would cost in noise, from numbers alone: nothing is read, drawn or trained.

For the example unit, of a client with n examples: sampling q = B / n and steps as `private_schedule` has them, the
noise multiplier, epsilon over the rounds, and the noise on the mean gradient, noise_multiplier / B clipping norms in
each coordinate. For the client unit, of a cohort of m: the server's budget likewise, and the length of the noise on the
mean update,

    sqrt(parameters) * noise_multiplier / m      clipping norms,

beside updates of at most one; where noise goes on from round to round, also what is left of it in the sum of all of
them (`federated.privacy.plan_banded`). Verdicts are rules of thumb from measurements, and are said to be. The `fedpeft
privacy plan` command prints all this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from federated.config import ExperimentConfig
from federated.errors import ConfigError, PrivacyError
from federated.privacy.account import too_likely
from federated.privacy.accounting import GaussianSteps, epsilon, noise_for, steps_within
from federated.privacy.adaptive import count_noise, multiplier_of_updates
from federated.privacy.dp_sgd import PrivateSchedule, check_private_training, private_schedule
from federated.privacy.plan_banded import BandedPlan, plan_banded
from federated.privacy.server_budget import ServerBudget

__all__ = ["ClientPlan", "ExamplePlan", "Landmark", "epsilon_marks", "landmarks", "plan_clients", "plan_examples"]

_EDGES = (1, 2, 5)
_FEW_SIZES = 8
_WEAK = 10.0
_USEFUL_STD, _DOUBTFUL_STD = 0.05, 0.1
_USEFUL_SHARE, _DOUBTFUL_SHARE = 0.3, 1.0
_LANDMARKS = ((10, 10), (100, 100), (1_000, 100), (10_000, 100), (1_000_000, 1_000))
_USUAL_EPSILON = 8.0


@dataclass(frozen=True)
class ExamplePlan:
    """Clients of about one size under example-level privacy.

    Args:
        examples: training examples of the smallest of them, which has the most noise and the largest epsilon.
        clients: how many.
        sampling: probability of an example to be in a step's batch.
        steps: over all rounds, for a client that takes part in each.
        noise_multiplier: given, or the least that keeps the target; 0 where the client is refused.
        noise_std: standard deviation of the noise on the mean gradient, in clipping norms, per coordinate.
        epsilons: (rounds, epsilon) at the first rounds and at the last.
        verdict: in words.
    """

    examples: int
    clients: int
    sampling: float
    steps: int
    noise_multiplier: float
    noise_std: float
    epsilons: tuple[tuple[int, float], ...]
    verdict: str


@dataclass(frozen=True)
class ClientPlan:
    """A federation under client-level privacy.

    Args:
        population: clients that may take part.
        cohort: clients that are planned for a round; the expected number where each is drawn by itself.
        sampling: that the account claims; 1.0 claims none.
        rounds: of the run.
        noise_multiplier: given, or the least that keeps the target; what is accounted.
        parameters: numbers in an update; None where they are not known.
        noise_length: length of the noise on the mean update, in clipping norms; None likewise.
        epsilons: (rounds, epsilon) at the first rounds and at the last.
        verdict: in words.
        banded: with ``mechanism=banded``, what becomes of the noise; ``noise_length`` is then of one round.
    """

    population: int
    cohort: float
    sampling: float
    rounds: int
    noise_multiplier: float
    parameters: int | None
    noise_length: float | None
    epsilons: tuple[tuple[int, float], ...]
    verdict: str
    banded: BandedPlan | None = None


@dataclass(frozen=True)
class Landmark:
    """How the noise on the mean update falls with the population, the rest being as planned."""

    population: int
    cohort: int
    noise_multiplier: float
    noise_length: float | None


def plan_examples(config: ExperimentConfig, sizes: Sequence[int]) -> tuple[ExamplePlan, ...]:
    """Example-level privacy for clients of these sizes, smallest first; many sizes are put into classes.

    Args:
        config: the experiment.
        sizes: training examples of each client.

    Raises:
        ConfigError: if no client can train like that, or the target cannot be kept.
    """
    try:
        check_private_training(config.train)
    except PrivacyError as error:
        raise ConfigError(str(error)) from None
    if not sizes or min(sizes) < 1:
        raise ConfigError("a privacy plan needs the number of training examples of each client, each at least 1")
    refusals = {size: _refusal(config, size) for size in sizes}
    if all(refusals.values()):
        raise ConfigError(refusals[max(sizes)])
    plans = []
    for smallest, clients in _classes(sizes, refusals):
        plans.append(
            ExamplePlan(smallest, clients, 0.0, 0, 0.0, 0.0, (), f"refused: {refusals[smallest]}")
            if refusals[smallest]
            else _example_plan(config, smallest, clients)
        )
    return tuple(plans)


def _refusal(config: ExperimentConfig, examples: int) -> str:
    """Why a client of that size cannot train privately; empty where it can."""
    try:
        private_schedule(examples, config.train)
    except PrivacyError as error:
        return f"{examples} training example{'s' if examples > 1 else ''}: {error}"
    if config.privacy.target_delta * examples >= 1:
        return (
            f"privacy.target_delta = {config.privacy.target_delta:g} is not below 1 / {examples} examples: handing out "
            "one of them whole would keep it; set a smaller one"
        )
    return ""


def _classes(sizes: Sequence[int], refusals: dict[int, str]) -> list[tuple[int, int]]:
    """(smallest size, clients) of each class: each size by itself while they are few, else 1, 2, 5, 10, 20 ..."""
    if len(set(sizes)) <= _FEW_SIZES:
        return [(size, sizes.count(size)) for size in sorted(set(sizes))]
    groups: dict[tuple[int, bool], list[int]] = {}
    for size in sorted(sizes):
        power = 10 ** (len(str(size)) - 1)
        edge = power * max(step for step in _EDGES if step * power <= size)
        groups.setdefault((edge, bool(refusals[size])), []).append(size)
    return [(members[0], len(members)) for members in groups.values()]


def _example_plan(config: ExperimentConfig, examples: int, clients: int) -> ExamplePlan:
    schedule = private_schedule(examples, config.train)
    noise = config.privacy.example.noise_multiplier or _solved(config, schedule)
    marks = epsilon_marks(config, noise, sampling=schedule.sampling, steps_per_round=schedule.steps)
    std = noise / schedule.expected_batch
    grade = 0 if std <= _USEFUL_STD else 1 if std <= _DOUBTFUL_STD else 2
    stops = _stops(config, marks[-1][1], GaussianSteps(noise, schedule.sampling, schedule.steps))
    steps = schedule.steps * config.rounds
    return ExamplePlan(
        examples, clients, schedule.sampling, steps, noise, std, marks, stops or _verdict(marks[-1][1], grade)
    )


def _solved(config: ExperimentConfig, schedule: PrivateSchedule) -> float:
    privacy = config.privacy
    try:
        return noise_for(
            privacy.target_epsilon,
            privacy.target_delta,
            sampling=schedule.sampling,
            steps=schedule.steps * config.rounds,
            accountant=privacy.accountant,
        )
    except PrivacyError as error:
        raise ConfigError(str(error)) from None


def plan_clients(
    config: ExperimentConfig, population: int, *, cohort: float, parameters: int | None = None
) -> ClientPlan:
    """Client-level privacy for so many clients.

    Args:
        config: the experiment.
        population: clients that may take part.
        cohort: what a round divides by, the planned cohort.
        parameters: numbers in an update, where known.

    Raises:
        ConfigError: if the population is too small, or the target cannot be kept.
    """
    _check_population(config, population)
    part = config.privacy.client
    sampling = config.selection.fraction if part.sampling == "poisson" else 1.0
    budget, on_updates = _client_noise(config, cohort=cohort)
    noise, banded = budget.noise_multiplier, plan_banded(budget, config.rounds)
    marks = epsilon_marks(config, noise, sampling=sampling, steps_per_round=1, groups=budget.groups)
    length = _length(banded.noise_of_a_round if banded else on_updates, cohort=cohort, parameters=parameters)
    in_all = banded.noise_of_the_last_sum if banded else on_updates * math.sqrt(config.rounds)
    share = _length(in_all / config.rounds, cohort=cohort, parameters=parameters)  # updates that agree grow with rounds
    grade = None if share is None else 0 if share <= _USEFUL_SHARE else 1 if share <= _DOUBTFUL_SHARE else 2
    one_round = GaussianSteps(noise, sampling, 1)
    verdict = _stops(config, marks[-1][1], one_round, groups=budget.groups) or _verdict(marks[-1][1], grade)
    return ClientPlan(population, cohort, sampling, config.rounds, noise, parameters, length, marks, verdict, banded)


def _check_population(config: ExperimentConfig, population: int) -> None:
    target_delta = config.privacy.target_delta
    if population < 2:
        raise ConfigError(f"{population} client cannot hide among others; expected at least two clients")
    if target_delta * population >= 1:
        raise ConfigError(too_likely(target_delta, population))


def _client_noise(config: ExperimentConfig, *, cohort: float) -> tuple[ServerBudget, float]:
    """The server's budget, and what of its noise is on the updates: a count of unclipped ones has its share."""
    part = config.privacy.client
    try:
        budget = ServerBudget(config)
        if part.clipping == "fixed":
            return budget, budget.noise_multiplier
        return budget, multiplier_of_updates(budget.noise_multiplier, count_noise(part.quantile_noise, cohort))
    except PrivacyError as error:
        raise ConfigError(str(error)) from None


def landmarks(config: ExperimentConfig, *, parameters: int | None = None) -> tuple[Landmark, ...]:
    """The same rounds and epsilon (8 where none is set) for 10 to a million clients; by ``rdp``, which is quick.

    Cohorts of more than a hundred clients are drawn by Poisson sampling, which is what helps large populations.
    """
    privacy = config.privacy
    found = []
    for population, cohort in _LANDMARKS:
        try:
            noise = noise_for(
                privacy.target_epsilon or _USUAL_EPSILON,
                min(privacy.target_delta, 0.1 / population),
                sampling=cohort / population,
                steps=config.rounds,
            )
        except PrivacyError:
            continue  # the plan itself says that its own target cannot be kept
        found.append(Landmark(population, cohort, noise, _length(noise, cohort=cohort, parameters=parameters)))
    return tuple(found)


def epsilon_marks(
    config: ExperimentConfig, noise: float, *, sampling: float, steps_per_round: int, groups: int = 1
) -> tuple[tuple[int, float], ...]:
    """(rounds, epsilon) after 1 and 10 rounds, as far as there are so many, and after all.

    Args:
        config: the experiment.
        noise: noise multiplier.
        sampling: of each step.
        steps_per_round: of a unit that takes part in a round.
        groups: of which each round asks one.
    """
    privacy = config.privacy

    def spent(rounds: int) -> float:
        events = [GaussianSteps(noise, sampling, steps_per_round * math.ceil(rounds / groups))]
        return epsilon(events, privacy.target_delta, accountant=privacy.accountant)

    return tuple((rounds, spent(rounds)) for rounds in sorted({1, min(10, config.rounds), config.rounds}))


def _length(noise: float, *, cohort: float, parameters: int | None) -> float | None:
    return None if parameters is None else math.sqrt(parameters) * noise / cohort


def _stops(config: ExperimentConfig, spent: float, one_round: GaussianSteps, *, groups: int = 1) -> str:
    """That noise which was given ends the run early; empty where all rounds fit, or nothing bounds them."""
    privacy = config.privacy
    if not privacy.target_epsilon or spent <= privacy.target_epsilon:
        return ""
    steps = steps_within(
        privacy.target_epsilon,
        privacy.target_delta,
        noise_multiplier=one_round.noise_multiplier,
        sampling=one_round.sampling,
        accountant=privacy.accountant,
    )
    rounds = groups * (steps // one_round.steps)
    return f"stops after {rounds} of {config.rounds} rounds: the noise given is too little for more"


def _verdict(spent: float, grade: int | None) -> str:
    """Whether a plan protects, and whether something can be learnt under it."""
    if spent > _WEAK:
        return "weak: an epsilon above 10 promises little"
    words = ("can be useful", "doubtful: much noise", "too noisy to be useful")
    return "protects; parameters unknown, noise not judged" if grade is None else words[grade]
