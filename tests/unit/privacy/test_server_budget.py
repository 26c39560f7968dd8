"""The server's budget: solved, charged, refused."""

from pathlib import Path
from typing import Any

import pytest

from federated.config import ExperimentConfig, experiment_from
from federated.errors import BudgetExhausted, PrivacyError
from federated.privacy.account import NO_AMPLIFICATION, POISSON
from federated.privacy.accounting import GaussianSteps, epsilon
from federated.privacy.ledger import Ledger
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
    assert len(sampled.events) == 10


def test_given_noise_is_reported_without_a_bound():
    budget = ServerBudget(config({"noise_multiplier": 1.0}))
    assert budget.epsilon == 0.0
    for number in range(30):
        budget.charge(number)
    assert budget.epsilon == pytest.approx(epsilon([GaussianSteps(1.0, 1.0, 30)], 1e-5))


def test_what_was_spent_counts_in_the_next_process(tmp_path: Path):
    wanted = config({"noise_multiplier": 1.0}, target_epsilon=7.5)
    parts = {"subject": "server of run", "data_digest": "d"}
    budget = ServerBudget(wanted, run_id="run", ledger=Ledger.open(tmp_path / "ledger", **parts))
    budget.charge(1)
    budget.charge(2)
    head = budget.head
    budget.close()
    again = ServerBudget(wanted, run_id="run", ledger=Ledger.open(tmp_path / "ledger", **parts, create=False))
    assert again.head == head
    assert again.would_exceed()
    with pytest.raises(BudgetExhausted):
        again.charge(2)
    assert len(again.events) == 2
    again.close()


def test_the_account_says_what_is_assumed():
    assert ServerBudget(config({"noise_multiplier": 1.0, "sampling": "poisson"})).account().sampling == POISSON
    account = ServerBudget(config({"noise_multiplier": 1.0}, test_seed=0)).account()
    assert (account.unit, account.sampling, account.private) == ("client", NO_AMPLIFICATION, False)
    budget = ServerBudget(config({"noise_multiplier": 1.0}))
    assert budget.head == ""
    budget.close()


def test_not_even_one_round_is_an_error_before_anything_starts():
    with pytest.raises(PrivacyError, match="one round alone costs epsilon"):
        ServerBudget(config({"noise_multiplier": 0.3}, target_epsilon=1.0))
