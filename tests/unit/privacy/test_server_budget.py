"""The server's budget: solved, charged, refused."""

from typing import Any

import pytest

from federated.config import ExperimentConfig, experiment_from
from federated.errors import BudgetExhausted, PrivacyError
from federated.privacy.accounting import GaussianSteps, epsilon
from federated.privacy.server_budget import ServerBudget


def config(client: dict[str, Any], *, rounds: int = 10, fraction: float = 1.0, **privacy: Any) -> ExperimentConfig:
    return experiment_from(
        {
            "rounds": rounds,
            "task": {"labels": ["a", "b"]},
            "selection": {"fraction": fraction},
            "privacy": {"client": {"enabled": True, **client}, **privacy},
        }
    )


def test_noise_is_solved_for_all_rounds_at_the_claimed_sampling():
    plain = ServerBudget(config({}, target_epsilon=4.0, fraction=0.1))
    sampled = ServerBudget(config({"sampling": "poisson"}, target_epsilon=4.0, fraction=0.1))
    assert sampled.noise_multiplier < plain.noise_multiplier / 3
    for _ in range(10):
        sampled.charge(1)
    assert 3.95 < sampled.epsilon <= 4.0
    with pytest.raises(BudgetExhausted, match="and round 11 does not fit"):
        sampled.charge(11)
    assert sampled.steps == 10


def test_given_noise_is_reported_without_a_bound():
    budget = ServerBudget(config({"noise_multiplier": 1.0}))
    assert budget.epsilon == 0.0
    for number in range(30):
        budget.charge(number)
    assert budget.epsilon == pytest.approx(epsilon([GaussianSteps(1.0, 1.0, 30)], 1e-5))


def test_what_was_spent_counts():
    spent = [GaussianSteps(1.0, 1.0, 2)]
    budget = ServerBudget(config({"noise_multiplier": 1.0}, target_epsilon=7.0), spent=spent)
    assert budget.would_exceed()
    with pytest.raises(BudgetExhausted):
        budget.charge(3)
    assert budget.steps == 2


def test_not_even_one_round_is_an_error_before_anything_starts():
    with pytest.raises(PrivacyError, match="one round alone costs epsilon"):
        ServerBudget(config({"noise_multiplier": 0.3}, target_epsilon=1.0))
