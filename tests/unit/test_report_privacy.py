"""Epsilon in a run's report: with its unit and its terms, over accuracy, and only where it was accounted."""

from typing import Any

from federated.report_privacy import not_protected, privacy_cards, privacy_plots
from federated.run_history import History


def event(epsilon: float | None, **changes: Any) -> dict[str, Any]:
    account = {
        "unit": "client",
        "epsilon": epsilon,
        "target_delta": 1e-5,
        "neighbouring": "add or remove one",
        "not_protected": ["metrics"],
        "private": True,
        **changes,
    }
    return {"privacy": {"accounts": [account]}}


def history(*rounds: dict[str, Any]) -> History:
    made = History(rounds=dict(enumerate(rounds, 1)))
    made.held_out = {number: {"loss": 1.0, "accuracy": number / 10} for number in range(len(rounds))}
    return made


def test_a_card_says_whose_epsilon_it_is_and_on_which_terms() -> None:
    ((value, label, remark),) = privacy_cards(history(event(1.0), event(2.345)))
    assert (value, label) == ("2.35", "epsilon, each client")
    assert remark == "target_delta 1e-05; add or remove one"
    assert not_protected(history(event(1.0))) == ["metrics"]


def test_a_test_run_is_stamped() -> None:
    ((_, _, remark),) = privacy_cards(history(event(1.0, private=False, not_protected=[])))
    assert remark.startswith("NOT PRIVATE: repeatable noise of a test; target_delta")


def test_without_an_account_there_is_nothing() -> None:
    for made in (History(), history({})):
        assert privacy_cards(made) == []
        assert not_protected(made) == []
        assert privacy_plots(made, ["accuracy"]) == []


def test_an_epsilon_without_a_bound_is_said_and_not_drawn() -> None:
    ((value, _, _),) = privacy_cards(history(event(None)))
    assert value == "no bound"
    assert privacy_plots(history(event(None)), ["accuracy"]) == []


def test_accuracy_stands_over_the_epsilon_spent_by_then() -> None:
    ((title, svg),) = privacy_plots(history(event(1.0), event(2.0), event(3.0)), ["accuracy"])
    assert title == "Accuracy and epsilon"
    assert "epsilon spent" in svg
    assert "each client" in svg


def test_loss_where_there_is_no_other_metric() -> None:
    ((title, svg),) = privacy_plots(history(event(1.0), event(2.0)), [])
    assert title == "Loss and epsilon"
    assert svg.startswith("<svg")
