"""One outcome for every member of the cohort, whatever comes back; and what is said about a round."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Error, Message, RecordDict

from federated.errors import AggregationError, DataError
from federated.flower.adapter_packets import parse_adapter_packet
from federated.flower.messages import TaskWriter
from federated.flower.records import assignment_of, packet_of, refusal_content, reply_content
from federated.flower.round_book import Outcome, RoundBook, evaluation_of, pooled_evaluation
from federated.flower.round_report import round_event, train_metrics
from federated.flower.server_state import ServerState

Make = Callable[..., Any]
NODES = {"client-000": 1, "client-001": 2, "client-002": 3}


@pytest.fixture
def opened(config: Make, adapter: Make) -> Make:
    """Messages by client, and the book of a first round."""

    def make(mode: str = "train", *, round_number: int = 1, **changes: Any) -> tuple[dict[str, Message], RoundBook]:
        from federated.aggregation import FedIT

        plain = config(**changes)
        server = ServerState(adapter(), rule=FedIT(), optimizer=plain.strategy.server_optimizer)
        writer = TaskWriter(plain, rule=FedIT(), run_id="run", base_digest="b" * 64, secret=b"key")
        sent, book = writer.write(server.global_state, NODES, round_number=round_number, mode=mode, version_id="v" * 64)
        return {assignment_of(message).client_id: message for message in sent}, book

    return make


def status(book: RoundBook) -> dict[str, tuple[str, str | None]]:
    return {outcome.client_id: (outcome.status, outcome.reason) for outcome in book.close()}


def test_every_client_gets_its_own_task_and_the_same_adapter(opened: Make) -> None:
    sent, book = opened()
    tasks = {name: assignment_of(message) for name, message in sent.items()}
    assert {name: (task.client_id, task.round_number, task.parent_version) for name, task in tasks.items()} == {
        name: (name, 1, "v" * 64) for name in NODES
    }
    assert len({task.task_token for task in tasks.values()}) == 3
    assert {message.metadata.dst_node_id for message in sent.values()} == {1, 2, 3}
    assert len({bytes(message.content["packet"]["packet"].data) for message in sent.values()}) == 1
    assert book.cohort == sorted(NODES)


def test_the_config_s_wishes_are_in_the_plan(opened: Make) -> None:
    sent, _ = opened(train={"proximal_mu": 0.25, "evaluate_after": True})
    plan = assignment_of(sent["client-000"]).plan
    assert (plan.proximal_mu, plan.evaluate_after, plan.rank, plan.mode) == (0.25, True, 2, "train")


@pytest.mark.parametrize(("every", "rounds"), [(1, [1, 2, 3, 4, 5]), (2, [1, 3, 5]), (4, [1, 5]), (0, [])])
def test_clients_measure_what_they_received_in_the_rounds_that_the_config_says(
    opened: Make, every: int, rounds: list[int]
) -> None:
    found = []
    for number in range(1, 6):
        sent, _ = opened(round={"evaluate_every": every}, round_number=number)
        if assignment_of(sent["client-000"]).plan.evaluate_before:
            found.append(number)
    assert found == rounds


def test_a_rule_s_own_proximal_term_comes_before_the_config_s(config: Make, adapter: Make) -> None:
    from federated.aggregation import FedProx

    found = []
    for mu in (0.5, 0.0):
        plain, rule = config(train={"proximal_mu": 0.25}), FedProx(mu=mu)
        server = ServerState(adapter(), rule=rule, optimizer=plain.strategy.server_optimizer)
        writer = TaskWriter(plain, rule=rule, run_id="run", base_digest="b" * 64, secret=b"key")
        sent, _ = writer.write(server.global_state, NODES, round_number=1, mode="train")
        found.append({assignment_of(message).plan.proximal_mu for message in sent})
    assert found == [{0.5}, {0.25}]


def test_what_only_helps_to_train_is_not_sent_to_be_evaluated(config: Make, adapter: Make) -> None:
    from federated.aggregation import Scaffold

    plain, rule, sizes = config(), Scaffold(), {}
    server = ServerState(adapter(), rule=rule, optimizer=plain.strategy.server_optimizer)
    writer = TaskWriter(plain, rule=rule, run_id="run", base_digest="b" * 64, secret=b"key")
    for mode in ("train", "evaluate"):
        sent, _ = writer.write(server.global_state, NODES, round_number=1, mode=mode)
        packets = [parse_adapter_packet(packet_of(message.content)) for message in sent]
        sizes[mode] = {len(packet.extra) for packet in packets}
    assert sizes == {"train": {2}, "evaluate": {0}}


@pytest.mark.parametrize(("train", "steps"), [({"steps": 7}, 7), ({"batch_size": 4, "epochs": 2.0}, 6)], ids=str)
def test_an_update_s_steps_follow_from_the_plan_and_not_from_the_message(
    opened: Make, honest: Make, train: dict[str, Any], steps: int
) -> None:
    sent, book = opened(train=train)
    message = sent["client-000"]
    update = book.receive(honest(message, assignment_of(message), metrics={"steps": 1e6}))
    assert (update.num_examples, update.steps) == (10, steps)


def test_a_good_reply_is_an_update(opened: Make, honest: Make, honest_delta: Make) -> None:
    sent, book = opened()
    message = sent["client-001"]
    update = book.receive(honest(message, assignment_of(message)))
    assert update is not None
    assert (update.client_id, update.num_examples, update.round_number) == ("client-001", 20, 1)
    assert all(torch.equal(update.delta[name], tensor) for name, tensor in honest_delta("client-001").items())
    (outcome,) = book.outcomes
    assert (outcome.status, outcome.reason, outcome.counter) == ("ok", None, 1)
    assert outcome.update_norm == pytest.approx(
        sum(t.double().square().sum().item() for t in update.delta.values()) ** 0.5
    )
    assert outcome.bytes_up > 100
    assert outcome.bytes_down == len(bytes(message.content["packet"]["packet"].data))


def test_who_does_not_answer_is_late_and_closing_twice_changes_nothing(opened: Make, honest: Make) -> None:
    sent, book = opened()
    book.receive(honest(sent["client-001"], assignment_of(sent["client-001"])))
    expected = {"client-000": ("late", "deadline"), "client-001": ("ok", None), "client-002": ("late", "deadline")}
    assert status(book) == expected
    assert status(book) == expected


def test_a_second_reply_is_dropped(opened: Make, honest: Make) -> None:
    sent, book = opened()
    message = sent["client-001"]
    assert book.receive(honest(message, assignment_of(message))) is not None
    assert book.receive(honest(message, assignment_of(message))) is None
    assert [outcome.client_id for outcome in book.outcomes] == ["client-001"]


def test_a_good_reply_does_not_heal_a_refused_one(opened: Make, honest: Make) -> None:
    sent, book = opened()
    message = sent["client-001"]
    assert book.receive(Message(RecordDict(), reply_to=message)) is None
    assert book.receive(honest(message, assignment_of(message))) is None
    assert status(book)["client-001"] == ("refused", "bad_encoding")


def test_a_reply_of_nobody_who_was_asked_is_dropped(opened: Make) -> None:
    _, book = opened()
    stranger = Message(RecordDict(), 99, "train")
    assert book.receive(Message(reply_content("client-001", "", {}), reply_to=stranger)) is None
    assert book.outcomes == []


def test_an_error_reply_is_a_failure_with_its_code(opened: Make) -> None:
    sent, book = opened()
    long = "line one\nline two " + "x" * 1000
    book.receive(Message(Error(code=2, reason=long), reply_to=sent["client-000"]))
    book.receive(Message(Error(code=5), reply_to=sent["client-001"]))
    first, second = book.outcomes
    assert (first.status, first.reason) == ("failed", "error_2")
    assert first.message.startswith("line one line two xxx")
    assert len(first.message) == 300
    assert (second.reason, second.message) == ("error_5", "")


def test_a_client_that_says_why_not_is_a_failure_with_its_reason(opened: Make) -> None:
    sent, book = opened()
    content = refusal_content("client-000", DataError("no rows here"))
    assert book.receive(Message(content, reply_to=sent["client-000"])) is None
    assert (book.outcomes[0].status, book.outcomes[0].reason) == ("failed", "DataError")
    assert book.outcomes[0].message == "no rows here"


def test_a_refusal_does_not_say_its_reason_twice(opened: Make, honest: Make) -> None:
    sent, book = opened()
    message = sent["client-000"]
    book.receive(honest(message, assignment_of(message), base_digest="c" * 64))
    (outcome,) = book.outcomes
    assert (outcome.status, outcome.reason) == ("refused", "base_mismatch")
    assert not outcome.message.startswith("base_mismatch")
    assert outcome.as_refusal() == {"client_id": "client-000", "reason": "base_mismatch", "message": outcome.message}


def test_what_the_rule_cannot_combine_is_taken_back(opened: Make, honest: Make) -> None:
    sent, book = opened()
    message = sent["client-000"]
    book.receive(honest(message, assignment_of(message)))
    book.reject("client-000", AggregationError("does not fit"))
    assert status(book)["client-000"] == ("refused", "not_combinable")
    assert len(book.outcomes) == 3


def test_an_evaluation_needs_the_task_s_token(opened: Make, honest: Make) -> None:
    sent, book = opened("evaluate")
    first, second = sent["client-000"], sent["client-001"]
    assert book.receive(honest(first, assignment_of(first))) is None
    book.receive(honest(second, replace(assignment_of(second), task_token="f" * 64)))
    assert status(book)["client-000"] == ("ok", None)
    assert status(book)["client-001"] == ("refused", "bad_token")


def test_a_training_token_does_not_open_the_evaluation(opened: Make, honest: Make) -> None:
    train, _ = opened()
    sent, book = opened("evaluate")
    message = sent["client-000"]
    token = assignment_of(train["client-000"]).task_token
    book.receive(Message(reply_content("client-000", token, {}), reply_to=message))
    assert status(book)["client-000"] == ("refused", "bad_token")


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_a_claim_of_more_evaluated_examples_than_allowed_is_refused(opened: Make, honest: Make, mode: str) -> None:
    sent, book = opened(mode, round={"max_examples": 100})
    for name, count in (("client-000", 100.0), ("client-001", 101.0)):
        metrics = {"eval_before_loss": 0.1, "eval_before_num_examples": count}
        book.receive(honest(sent[name], assignment_of(sent[name]), metrics=metrics))
    assert status(book)["client-000"] == ("ok", None)
    assert status(book)["client-001"] == ("refused", "bad_num_examples")


class TestEvaluation:
    def test_is_read_from_the_metrics(self):
        metrics = {"eval_before_loss": 0.5, "eval_before_num_examples": 4.0, "train_loss": 9.0, "eval_after_loss": 7.0}
        assert evaluation_of(metrics) == {"loss": 0.5, "num_examples": 4.0}

    @pytest.mark.parametrize(
        "metrics", [{}, {"eval_before_loss": 0.5}, {"eval_before_num_examples": 0.0}, {"eval_before_num_examples": 9.0}]
    )
    def test_of_nothing_is_none(self, metrics: dict[str, float]):
        assert evaluation_of(metrics) is None

    def test_pools_by_examples_over_the_good_clients(self):
        assert pooled_evaluation([
            outcome("a", loss=1.0, num_examples=30), outcome("b", loss=5.0, num_examples=10),
            outcome("c", "refused", loss=99.0, num_examples=1000), outcome("d"),
        ]) == {"loss": 2.0, "num_examples": 40}  # fmt: skip

    def test_pools_what_all_report(self):
        both = [outcome("a", loss=1.0, extra=1.0, num_examples=1), outcome("b", loss=3.0, num_examples=1)]
        assert pooled_evaluation(both) == {"loss": 2.0, "num_examples": 2}

    def test_of_nobody_is_none(self):
        assert pooled_evaluation([]) is None
        assert pooled_evaluation([outcome("a", "late")]) is None


def outcome(client_id: str, status: str = "ok", **evaluation: float) -> Outcome:
    return Outcome(client_id, status, metrics={f"eval_before_{key}": value for key, value in evaluation.items()})


class TestTrainMetrics:
    def test_weights_losses_by_examples(self):
        good = [Outcome("a", "ok", metrics={"train_loss": 1.0}, num_examples=30)]
        good.append(Outcome("b", "ok", metrics={"train_loss": 5.0}, num_examples=10))
        assert train_metrics(good) == {"num_examples": 40.0, "train_loss": 2.0}

    def test_leaves_out_who_reports_no_loss(self):
        good = [Outcome("a", "ok", num_examples=30), Outcome("b", "ok", metrics={"train_loss": 5.0}, num_examples=10)]
        assert train_metrics(good) == {"num_examples": 40.0, "train_loss": 5.0}

    def test_of_nobody(self):
        assert train_metrics([]) == {"num_examples": 0.0}


def test_the_client_event_says_all(opened: Make, honest: Make) -> None:
    sent, book = opened()
    message = sent["client-001"]
    book.receive(honest(message, assignment_of(message)))
    event = book.outcomes[0].as_event(1)
    assert event.pop("seconds") >= 0
    assert event.pop("update_norm") > 0
    assert event.pop("bytes_up") > 0
    assert event.pop("bytes_down") > 0
    assert event == {
        "event": "client",
        "round_number": 1,
        "client_id": "client-001",
        "status": "ok",
        "reason": None,
        "message": None,
        "num_examples": 20,
        "train_loss": 2.0,
        "evaluation": {"loss": 3.0, "accuracy": 0.5, "num_examples": 5.0},
    }


def test_the_event_of_a_missed_round_says_so(opened: Make) -> None:
    _, book = opened()
    event = round_event(
        book.close(), round_number=2, seconds=0.5, version_id="v" * 64, missed="0 good updates of 3, the quorum is 2"
    )
    assert (event["published"], event["participants"], event["cohort"]) == (False, 0, 3)
    assert event["message"] == "0 good updates of 3, the quorum is 2: the global adapter stays as it was"
    assert event["version_id"] == event["parent"] == "v" * 64
    assert (event["evaluation"], event["train_loss"], event["weights_digest"]) == (None, None, None)
    assert [refusal["reason"] for refusal in event["refused"]] == ["deadline"] * 3


@pytest.mark.parametrize("told", [{"epsilon": 5.0}, {}])
def test_a_refused_client_s_charge_is_kept_and_nothing_else_that_it_says(opened: Make, told: dict[str, float]) -> None:
    sent, book = opened()
    message = sent["client-000"]
    head, token = "a" * 64, assignment_of(message).task_token
    metrics = {**told, "train_loss": 0.5, "eval_before_loss": 1.0, "eval_before_num_examples": 3.0}
    content = reply_content("client-000", token, metrics, b"no packet of ours", ledger_head=head)
    assert book.receive(Message(content, reply_to=message)) is None
    found = next(one for one in book.close() if one.client_id == "client-000")
    assert (found.status, found.reason, found.ledger_head) == ("refused", "bad_encoding", head)
    assert dict(found.metrics) == told
