"""What a plan says, against the schedule and the budget that a run uses, and against known numbers."""

import math
from typing import Any

import pytest

from federated.config import ExperimentConfig, experiment_from
from federated.errors import ConfigError
from federated.privacy.accounting import GaussianSteps, epsilon
from federated.privacy.dp_sgd import private_schedule
from federated.privacy.plan import landmarks, plan_clients, plan_examples
from federated.privacy.plan_banded import plan_banded
from federated.privacy.server_budget import ServerBudget

NUMBERS = 73_728


def of_examples(
    noise: float = 0.0, *, target: float = 8.0, rounds: int = 50, privacy: Any = (), **train: Any
) -> ExperimentConfig:
    return experiment_from(
        {
            "rounds": rounds,
            "task": {"labels": ["a", "b"]},
            "train": {"batch_size": 16, "steps": 5, **train},
            "privacy": {
                "target_epsilon": target,
                "example": {"enabled": True, "noise_multiplier": noise},
                **dict(privacy),
            },
        }
    )


def of_clients(
    noise: float = 0.0,
    *,
    target: float = 8.0,
    fraction: float = 1.0,
    target_delta: float = 1e-5,
    rounds: int = 100,
    **client: Any,
) -> ExperimentConfig:
    return experiment_from(
        {
            "rounds": rounds,
            "task": {"labels": ["a", "b"]},
            "selection": {"fraction": fraction},
            "privacy": {
                "target_epsilon": target,
                "target_delta": target_delta,
                "client": {"enabled": True, "noise_multiplier": noise, **client},
            },
        }
    )


@pytest.mark.parametrize(
    ("examples", "tightest", "loosest", "noise", "std"),
    [
        (20, 140, 168, 8.10, 0.51),
        (50, 43.1, 49.8, 3.36, 0.21),
        (100, 19.0, 20.8, 1.82, 0.11),
        (500, 3.31, 3.77, 0.73, 0.046),
    ],
)
def test_known_costs_of_fifty_rounds_of_five_steps(
    examples: int, tightest: float, loosest: float, noise: float, std: float
) -> None:
    """Epsilon at a noise multiplier of 1 by PLD and by RDP with few orders, and the noise for epsilon 8."""
    (given,) = plan_examples(of_examples(1.0, target=0), [examples])
    (solved,) = plan_examples(of_examples(), [examples])
    assert given.epsilons[-1][0] == 50
    assert tightest <= given.epsilons[-1][1] <= 1.005 * loosest
    assert solved.noise_multiplier == pytest.approx(noise, rel=0.01)
    assert solved.noise_std == pytest.approx(std, rel=0.05)
    assert 7.9 < solved.epsilons[-1][1] <= 8


@pytest.mark.parametrize("train", [{}, {"steps": 0, "epochs": 0.6}, {"gradient_accumulation": 3}])
def test_what_is_planned_is_what_a_client_draws(train: dict[str, Any]) -> None:
    config = of_examples(rounds=4, **train)
    (plan,) = plan_examples(config, [333])
    schedule = private_schedule(333, config.train)
    assert (plan.sampling, plan.steps) == (schedule.sampling, 4 * schedule.steps)
    assert plan.noise_std == plan.noise_multiplier / schedule.expected_batch
    steps = GaussianSteps(plan.noise_multiplier, schedule.sampling, plan.steps)
    assert plan.epsilons[-1] == (4, epsilon([steps], 1e-5))


@pytest.mark.parametrize(("rounds", "marks"), [(1, [1]), (7, [1, 7]), (10, [1, 10]), (50, [1, 10, 50])])
def test_epsilon_at_the_first_rounds_and_at_the_last(rounds: int, marks: list[int]) -> None:
    (plan,) = plan_examples(of_examples(rounds=rounds), [500])
    assert [at for at, _ in plan.epsilons] == marks
    assert [spent for _, spent in plan.epsilons] == sorted(spent for _, spent in plan.epsilons)


def test_verdicts_say_which_sizes_can_learn() -> None:
    found = {plan.examples: plan.verdict for plan in plan_examples(of_examples(), [2000, 50, 90, 200, 50])}
    assert found == {
        50: "too noisy to be useful",
        90: "too noisy to be useful",
        200: "doubtful: much noise",
        2000: "can be useful",
    }


def test_an_epsilon_that_promises_little_is_called_weak() -> None:
    (plan,) = plan_examples(of_examples(1.0, target=0), [100])
    assert plan.verdict == "weak: an epsilon above 10 promises little"


def test_noise_that_was_given_may_end_a_run_early() -> None:
    (plan,) = plan_examples(of_examples(1.0), [100])
    assert plan.verdict.startswith("stops after ")
    fit = int(plan.verdict.split()[2])
    event = {number: epsilon([GaussianSteps(1.0, 0.16, 5 * number)], 1e-5) for number in (fit, fit + 1)}
    assert event[fit] <= 8 < event[fit + 1]


def test_few_sizes_each_have_a_row_and_many_are_put_in_classes() -> None:
    few = plan_examples(of_examples(), [100, 500, 100])
    assert [(plan.examples, plan.clients) for plan in few] == [(100, 2), (500, 1)]
    many = plan_examples(of_examples(), [10, 12, 13, 18, 19, 23, 40, 49, 51, 99, 120, 1900])
    assert [(plan.examples, plan.clients) for plan in many] == [(10, 3), (18, 2), (23, 3), (51, 2), (120, 1), (1900, 1)]
    assert [bool(plan.steps) for plan in many] == [False, True, True, True, True, True]


def test_a_client_that_is_refused_is_named_beside_others_that_are_not() -> None:
    refused, kept = plan_examples(of_examples(), [1, 500])
    assert refused.verdict.startswith("refused: 1 training example: ")
    assert (refused.steps, refused.noise_multiplier, refused.epsilons) == (0, 0.0, ())
    assert kept.verdict == "can be useful"


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ([], "each at least 1"),
        ([0, 100], "each at least 1"),
        ([1], "at least two training examples"),
        ([15], r"15 training examples: train\.batch_size \* train\.gradient_accumulation = 16 is more than"),
        ([100_000], r"privacy\.target_delta = 1e-05 is not below 1 / 100000 examples"),
    ],
)
def test_no_plan_where_no_client_can_train(sizes: list[int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_examples(of_examples(), sizes)


def test_no_plan_for_training_that_would_be_refused() -> None:
    with pytest.raises(ConfigError, match="ReduceLROnPlateau"):
        plan_examples(of_examples(scheduler="ReduceLROnPlateau"), [500])


def test_no_plan_for_an_epsilon_that_no_noise_keeps() -> None:
    with pytest.raises(ConfigError, match=r"epsilon 1e-05 .* cannot be kept"):
        plan_examples(of_examples(target=1e-5, rounds=1000), [20])


@pytest.mark.parametrize(
    ("population", "fraction", "length"), [(10, 1.0, 174), (100, 1.0, 17), (1_000, 0.1, 2.7), (10_000, 0.01, 1.4)]
)
def test_known_lengths_of_noise_on_the_mean_update(population: int, fraction: float, length: float) -> None:
    config = of_clients(fraction=fraction, sampling="none" if fraction == 1 else "poisson")
    plan = plan_clients(config, population, cohort=fraction * population, parameters=NUMBERS)
    assert plan.noise_length == pytest.approx(length, rel=0.03)
    assert plan.noise_length == math.sqrt(NUMBERS) * plan.noise_multiplier / plan.cohort
    assert plan.verdict == {174: "too noisy to be useful", 17: "too noisy to be useful"}.get(length, "can be useful")


@pytest.mark.parametrize("sampling", ["none", "poisson"])
def test_the_server_s_budget_is_what_is_planned(sampling: str) -> None:
    config = of_clients(fraction=0.1, rounds=10, sampling=sampling)
    plan, budget = plan_clients(config, 1000, cohort=100.0), ServerBudget(config)
    for number in range(10):
        budget.charge(number + 1)
    assert plan.noise_multiplier == budget.noise_multiplier
    assert plan.epsilons[-1] == (10, pytest.approx(budget.epsilon))
    assert plan.sampling == (0.1 if sampling == "poisson" else 1.0)


def test_without_parameters_the_noise_is_not_judged() -> None:
    plan = plan_clients(of_clients(), 1000, cohort=1000.0)
    assert (plan.parameters, plan.noise_length) == (None, None)
    assert plan.verdict == "protects; parameters unknown, noise not judged"


def test_between_useful_and_useless_a_plan_is_doubtful() -> None:
    assert plan_clients(of_clients(), 300, cohort=300.0, parameters=NUMBERS).verdict == "doubtful: much noise"


def test_rounds_that_do_not_fit_are_said() -> None:
    """One round at a noise multiplier of 1 costs epsilon 4.73, two 7.14."""
    plan = plan_clients(of_clients(1.0, target=5.0), 1000, cohort=1000.0)
    assert plan.verdict == "stops after 1 of 100 rounds: the noise given is too little for more"


def test_the_count_of_unclipped_clients_takes_its_share() -> None:
    config = of_clients(1.0, target=0, rounds=10, clipping="adaptive", quantile_noise=1.0)
    fixed = plan_clients(of_clients(1.0, target=0, rounds=10), 1000, cohort=1000.0, parameters=NUMBERS)
    adaptive = plan_clients(config, 1000, cohort=1000.0, parameters=NUMBERS)
    assert fixed.noise_length is not None
    assert adaptive.noise_length == pytest.approx(fixed.noise_length / math.sqrt(1 - 1 / 4))
    assert adaptive.epsilons == fixed.epsilons


@pytest.mark.parametrize(
    ("config", "population", "said"),
    [
        (of_clients(), 1, "at least two clients"),
        (of_clients(target_delta=0.02), 50, r"is not below 1 / 50 clients"),
        (of_clients(0.5, target=1.0), 50, "one round alone costs epsilon"),
        (of_clients(target=1e-5), 50, "cannot be kept"),
        (of_clients(4.0, clipping="adaptive", quantile_noise=1.0), 50, "nothing is left for the updates"),
    ],
)
def test_no_plan_for_what_a_server_would_refuse(config: ExperimentConfig, population: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_clients(config, population, cohort=float(population))


def test_landmarks_are_the_known_ones() -> None:
    found = landmarks(of_clients(), parameters=NUMBERS)
    assert [mark.population for mark in found] == [10, 100, 1_000, 10_000, 1_000_000]
    assert [mark.noise_length for mark in found] == [
        pytest.approx(one, rel=0.06) for one in (174, 17.3, 2.7, 1.4, 0.11)
    ]


def test_landmarks_without_a_bound_are_for_epsilon_eight_and_without_parameters_have_no_length() -> None:
    free, bound = landmarks(of_clients(1.0, target=0)), landmarks(of_clients())
    assert free == bound
    assert {mark.noise_length for mark in free} == {None}


def test_landmarks_that_cannot_be_kept_are_left_out() -> None:
    found = landmarks(of_clients(target=0.1, rounds=100_000))
    assert [mark.population for mark in found] == [1_000, 10_000, 1_000_000]


def test_correlated_noise_is_planned_beside_independent_noise_of_equal_epsilon() -> None:
    """Ten groups over 100 rounds: ten participations each; truth from dense matrices in tests of the mechanism."""
    config = of_clients(2.0, target=0, fraction=0.1, mechanism="banded")
    plan = plan_clients(config, 1000, cohort=100.0, parameters=NUMBERS)
    banded = plan.banded
    assert banded is not None
    assert (banded.groups, banded.participations, banded.band) == (10, 10, 10)
    assert banded.column_norm == pytest.approx(1.338, abs=1e-3)
    assert banded.noise_of_a_round == pytest.approx(2 * 1.527, rel=1e-3)
    assert banded.noise_of_the_last_sum == pytest.approx(2 * 4.047, rel=1e-3)
    assert banded.noise_of_the_sums == pytest.approx(2 * 3.039, rel=1e-3)
    assert banded.independent == pytest.approx(2 * math.sqrt(101 / 2))
    everybody = of_clients(2.0 * math.sqrt(10), target=0)  # charged in each round, at the same epsilon
    assert plan_clients(everybody, 1000, cohort=100.0).epsilons[-1] == pytest.approx(plan.epsilons[-1])
    assert banded.everybody == pytest.approx(2 * math.sqrt(10) * math.sqrt(101 / 2))
    assert plan.noise_length == pytest.approx(math.sqrt(NUMBERS) * banded.noise_of_a_round / 100)
    assert plan.epsilons == tuple(
        (at, epsilon([GaussianSteps(2.0, 1.0, of)], 1e-5)) for at, of in ((1, 1), (10, 1), (100, 10))
    )


def test_the_verdict_on_correlated_noise_is_by_what_is_left_of_it() -> None:
    """Independent noise in the same groups would be doubtful, at 0.42 of what the clients can agree on."""
    config = of_clients(2.0, target=0, fraction=0.1, mechanism="banded")
    plan = plan_clients(config, 1300, cohort=130.0, parameters=NUMBERS)
    assert plan.banded is not None
    left = math.sqrt(NUMBERS) * plan.banded.noise_of_the_last_sum / 130 / 100
    assert left < 0.3 < math.sqrt(NUMBERS) * 2.0 / 130 / math.sqrt(100)
    assert plan.verdict == "can be useful"


def test_turns_that_do_not_fit_are_said_in_rounds() -> None:
    """Two times at a noise multiplier of 1 cost 7.08, three 9.01: eight rounds of four groups."""
    plan = plan_clients(of_clients(1.0, fraction=0.25, mechanism="banded"), 1000, cohort=250.0)
    assert plan.verdict == "stops after 8 of 100 rounds: the noise given is too little for more"


def test_without_turns_there_is_no_such_plan() -> None:
    assert plan_clients(of_clients(mechanism="banded"), 1000, cohort=1000.0).banded is None
    assert plan_banded(ServerBudget(of_clients()), 100) is None
