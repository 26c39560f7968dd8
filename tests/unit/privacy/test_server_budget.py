"""The server's budget: solved, charged, refused."""

from pathlib import Path
from typing import Any

import pytest

from federated.config import ExperimentConfig, experiment_from
from federated.errors import BudgetExhausted, PrivacyError
from federated.privacy.account import NO_AMPLIFICATION, POISSON, client_sampling
from federated.privacy.accounting import GaussianSteps, epsilon
from federated.privacy.ledger import ChargeKey, Ledger
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


def test_a_round_that_is_charged_again_is_known_by_a_ledger_alone(tmp_path: Path):
    ledger = Ledger.open(tmp_path / "ledger", subject="server of run", data_digest="d")
    kept, lost = (ServerBudget(config({"noise_multiplier": 1.0}), run_id="run", ledger=one) for one in (ledger, None))
    for budget in (kept, lost):
        for number in (1, 2, 2):
            budget.charge(number)
    assert [kept.times_charged(number) for number in (1, 2, 3)] == [1, 2, 0]
    assert [lost.times_charged(number) for number in (1, 2, 3)] == [0, 0, 0]
    kept.close()


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


# ---- groups that take turns ------------------------------------------------------------------------------------------

BANDED = {"mechanism": "banded", "noise_multiplier": 1.0}
PARTS = {"subject": "server of run", "data_digest": "d"}


def cost(times: int, noise: float = 1.0) -> float:
    """Of so many unsampled Gaussian mechanisms."""
    return epsilon([GaussianSteps(noise, 1.0, times)], 1e-5)


@pytest.mark.parametrize("where", ["memory", "ledger"])
def test_a_round_costs_one_unsampled_gaussian_for_the_group_that_it_asks(where: str, tmp_path: Path):
    ledger = Ledger.open(tmp_path / "ledger", **PARTS) if where == "ledger" else None
    budget = ServerBudget(config(BANDED, fraction=0.25), run_id="run", ledger=ledger)
    assert (budget.groups, budget.band) == (4, 4)
    spent = []
    for number in range(1, 10):
        budget.charge(number)
        spent.append(budget.epsilon)
    assert spent == pytest.approx([cost(times) for times in (1, 1, 1, 1, 2, 2, 2, 2, 3)])
    budget.charge(9)  # run again after a crash: this group's, and no other one's
    budget.charge(10)
    assert budget.epsilon == pytest.approx(cost(4))
    budget.close()


def test_noise_is_solved_for_the_times_that_one_client_takes_part():
    banded = ServerBudget(config({"mechanism": "banded"}, target_epsilon=4.0, fraction=0.25, rounds=10))
    three = ServerBudget(config({}, target_epsilon=4.0, fraction=0.25, rounds=3))
    assert banded.noise_multiplier == three.noise_multiplier
    for number in range(1, 11):
        banded.charge(number)
    assert 3.95 < banded.epsilon <= 4.0
    banded.charge(11)
    banded.charge(12)
    with pytest.raises(BudgetExhausted, match=r"3 rounds of group 1 took epsilon 3\.99.*round 13 does not fit"):
        banded.charge(13)
    assert banded.would_exceed(14)


def test_a_band_is_no_longer_than_the_run():
    assert ServerBudget(config(BANDED, fraction=0.1, rounds=4)).band == 4
    assert ServerBudget(config(BANDED, fraction=0.1, rounds=40)).band == 10


def test_one_group_is_everybody():
    banded, plain = (ServerBudget(config(one, target_epsilon=8.0)) for one in ({"mechanism": "banded"}, {}))
    assert (banded.groups, banded.band) == (1, 1)
    assert banded.noise_multiplier == plain.noise_multiplier
    banded.charge(1)
    plain.charge(1)
    assert banded.account() == plain.account()


def test_what_names_no_group_is_charged_to_all(tmp_path: Path):
    """Charges of another mechanism or division, which a later version of a configuration may leave behind."""
    ledger = Ledger.open(tmp_path / "ledger", **PARTS)
    for name in ("client-level", "client-level, group 1 of 7"):
        ledger.charge(GaussianSteps(1.0, 1.0, 1), key=ChargeKey("run", 1, 1, name))
    budget = ServerBudget(config(BANDED, fraction=0.5), run_id="run", ledger=ledger)
    assert budget.epsilon == pytest.approx(cost(2))
    budget.charge(1)
    budget.charge(2)
    assert budget.epsilon == pytest.approx(cost(3))
    plain = ServerBudget(config({"noise_multiplier": 1.0}), run_id="run", ledger=ledger)
    assert plain.epsilon == pytest.approx(cost(4))
    budget.close()


def test_groups_of_unequal_noise_are_compared_by_what_they_spent(tmp_path: Path):
    ledger = Ledger.open(tmp_path / "ledger", **PARTS)
    ServerBudget(config({**BANDED, "noise_multiplier": 0.5}, fraction=0.5), run_id="run", ledger=ledger).charge(1)
    budget = ServerBudget(config({**BANDED, "noise_multiplier": 2.0}, fraction=0.5), run_id="run", ledger=ledger)
    for _ in range(3):
        budget.charge(2)
    assert budget.epsilon == pytest.approx(cost(1, 0.5))
    budget.close()


def test_the_account_names_the_turns():
    words = "none: each client at most once in 4 rounds, by a fixed division"
    assert ServerBudget(config(BANDED, fraction=0.25)).account().sampling == words
    assert client_sampling(config(BANDED)) == NO_AMPLIFICATION


def test_marks_change_with_each_charge(tmp_path: Path):
    ledger = Ledger.open(tmp_path / "ledger", **PARTS)
    for budget in (ServerBudget(config(BANDED)), ServerBudget(config(BANDED), run_id="run", ledger=ledger)):
        marks = [budget.mark]
        for _ in range(3):
            budget.charge(1)
            marks.append(budget.mark)
        assert len(set(marks)) == 4
        assert budget.mark == marks[-1]
        budget.close()
