"""Buffered rounds with fake clients that arrive by a script: who shares a buffer, what is stale, what is refused."""

import logging
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from federated.aggregation import NextPhase, make_rule
from federated.config import RoundConfig
from federated.errors import AggregationError, RunInterrupted
from federated.flower import InProcessGrid
from federated.flower.buffer import staleness_weight
from federated.flower.buffered import BufferedRounds
from federated.flower.publisher import RegistryPublisher, TrainingState
from federated.flower.records import Assignment
from federated.registry import Registry
from federated.state import group_of
from federated.tracking import MemoryTracker

Make = Callable[..., Any]
Answer = Callable[[Message, Assignment], Message]


class Arrivals(InProcessGrid):
    """Answers are made and arrive one by one by a script: a client's number, or a call to make; then as they come."""

    def __init__(self, app: ClientApp, clients: int, script: Iterable[int | Callable[[], None]]) -> None:
        super().__init__(app, clients)
        self.script = deque(script)
        self.abandoned: list[int] = []

    def _at_work(self, message_ids: Iterable[str]) -> dict[int, Any]:
        """Number of a client to its job, of those messages."""
        ids = set(message_ids)
        jobs = [job for job in self._mail.waiting if job.message.metadata.message_id in ids]
        return {job.message.metadata.dst_node_id - 1: job for job in jobs}

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        jobs = self._at_work(message_ids)
        if not self.script or any(job.message.metadata.message_type == "query" for job in jobs.values()):
            return super().pull_messages(message_ids)
        step = self.script.popleft()
        if not isinstance(step, int):
            step()
            return []
        job = jobs[step]  # else the script names one who is not at work
        self._mail.waiting.remove(job)
        self._mail.waiting.appendleft(job)
        return super().pull_messages({job.message.metadata.message_id})

    def abandon(self, message_ids: Iterable[str]) -> None:
        ids = list(message_ids)
        self.abandoned += self._at_work(ids)
        super().abandon(ids)


@pytest.fixture
def run(federation: Make, fake_app: Make) -> Make:
    """Run a buffered federation whose clients arrive by the script; gives the federation, with its grid."""

    def make(
        *script: int | Callable[[], None],
        clients: int = 3,
        answers: dict[int, Answer] | None = None,
        parts: dict[str, Any] | None = None,
        start: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Any:
        policy = {"mode": "buffered", "buffer": 2, "concurrency": 3, **changes.pop("round", {})}
        made = federation(parts, **{"rounds": 2, **changes}, round=policy)
        named = {f"client-{number:03d}": answer for number, answer in (answers or {}).items()}
        with Arrivals(fake_app(named), clients, script) as grid:
            made.grid = grid
            made.result = made.strategy.start(grid, **(start or {}))
        return made

    return make


def outcomes(made: Any) -> list[tuple[int, int, str]]:
    """Of each client event: round, client's number, status or the reason of a refusal."""
    return [
        (event["round_number"], int(event["client_id"][-3:]), event["reason"] or event["status"])
        for event in made.events("client")
    ]


def digests(made: Any) -> list[str | None]:
    return [event["weights_digest"] for event in made.events("round")]


def close_to(made: Any, value: float) -> bool:
    """Whether factor A is where it should be; it starts at 0.25, and client n moves it by (n + 1) / 7."""
    return bool(torch.allclose(torch.tensor(made.tensors["q.factor_a"]), torch.tensor(value), rtol=1e-6))


class TestBuffers:
    def test_a_version_for_every_two_updates_and_nobody_is_waited_for(self, run: Make):
        made = run(0, 1, 0, 1, 2, 0, rounds=3)
        assert outcomes(made) == [(1, 0, "ok"), (1, 1, "ok"), (2, 0, "ok"), (2, 1, "ok"), (3, 2, "ok"), (3, 0, "ok")]
        assert [event["participants"] for event in made.events("round")] == [2, 2, 2]
        assert [event["staleness"] for event in made.events("client")] == [0, 0, 0, 0, 2, 0]
        parents = [event["parent"] for event in made.events("round")]
        assert parents[1:] == [event["version_id"] for event in made.events("round")[:-1]]

    def test_a_client_is_sent_the_newest_version_when_it_is_free(self, run: Make, honest: Make):
        sent: list[tuple[str, int, str]] = []

        def note(message: Message, task: Assignment) -> Message:
            if task.plan.mode == "train":
                sent.append((task.client_id[-1], task.round_number, task.parent_version))
            return honest(message, task)

        made = run(0, 1, 0, 2, answers=dict.fromkeys(range(3), note))
        first, second = (event["version_id"] for event in made.events("round_start"))
        assert sent == [("0", 1, first), ("1", 1, first), ("0", 2, second), ("2", 1, first)]

    @pytest.mark.parametrize(
        ("policy", "share"),
        [
            ({}, 2**-0.5),
            ({"staleness_exponent": 2.0}, 0.25),
            ({"staleness_exponent": 0.0}, 1.0),
            ({"staleness": "constant"}, 1.0),
        ],
    )
    @pytest.mark.parametrize("weighted", [True, False])
    def test_a_stale_update_weighs_less_by_the_formula(
        self, run: Make, policy: dict[str, Any], share: float, weighted: bool
    ):
        """Round 2 takes client 0 (10 examples, fresh) and client 2 (30 examples, one version old)."""
        made = run(0, 1, 0, 2, round=policy, strategy={"weighted": weighted})
        n0, n1, n2 = (10, 20, 30) if weighted else (1, 1, 1)
        first = (n0 * 1 / 7 + n1 * 2 / 7) / (n0 + n1)
        second = (n0 * 1 / 7 + n2 * share * 3 / 7) / (n0 + n2)
        assert close_to(made, 0.25 + first + second)
        assert [event["rule"] for event in made.events("round")] == [
            {"staleness_mean": 0.0, "staleness_max": 0.0},
            {"staleness_mean": 0.5, "staleness_max": 1.0},
        ]

    @pytest.mark.parametrize(
        ("tau", "exponent", "weight"), [(0, 3.0, 1.0), (1, 1.0, 0.5), (3, 0.5, 0.5), (7, 0.0, 1.0)]
    )
    def test_the_weight_itself(self, tau: int, exponent: float, weight: float):
        assert staleness_weight(RoundConfig(staleness_exponent=exponent), tau) == weight
        assert staleness_weight(RoundConfig(staleness="constant", staleness_exponent=exponent), tau) == 1.0

    def test_the_order_within_a_buffer_leaves_no_trace(self, run: Make):
        one = run(0, 1, 3, 0, 2, 1, clients=4, rounds=2, round={"buffer": 3, "concurrency": 4})
        other = run(3, 1, 0, 2, 0, 1, clients=4, rounds=2, round={"buffer": 3, "concurrency": 4})
        assert digests(one) == digests(other)
        assert outcomes(one) != outcomes(other)
        different = run(0, 2, 3, 0, 1, 2, clients=4, rounds=2, round={"buffer": 3, "concurrency": 4})
        assert digests(different)[0] != digests(one)[0]

    def test_a_client_has_one_turn_in_a_round(self, run: Make):
        """Client 0 is back at once, and waits: with two of two more at work it may not fill the buffer alone."""
        made = run(0, 1, 2, rounds=1, round={"buffer": 3})
        assert outcomes(made) == [(1, 0, "ok"), (1, 1, "ok"), (1, 2, "ok")]

    def test_at_most_so_many_train_at_once(self, run: Make):
        made = run(clients=6, rounds=3, round={"concurrency": 2, "buffer": 3})
        assert all(len(event["cohort"]) == 2 for event in made.events("round_start"))

    def test_a_buffer_that_cannot_fill_is_closed_when_all_had_their_turn(self, run: Make):
        made = run(rounds=2, round={"buffer": 5})
        assert [event["participants"] for event in made.events("round")] == [3, 3]
        assert close_to(made, 0.25 + 2 / 3)

    def test_the_policy_of_selection_decides_who_is_next(self, run: Make):
        changes: dict[str, Any] = {"selection": {"policy": "round_robin"}, "round": {"buffer": 2, "concurrency": 1}}
        made = run(clients=6, rounds=3, **changes)
        assert sorted(number for _, number, _ in outcomes(made)) == list(range(6))

    def test_only_who_measured_the_version_speaks_for_it(self, run: Make):
        """Client 2 of round 2 measured an older version; client 0 the one that the round started from."""
        made = run(0, 1, 0, 2)
        second = made.events("round")[1]
        assert second["evaluation"] == {
            "loss": 2.0,
            "accuracy": 0.5,
            "num_examples": 4.0,
            "version_id": second["parent"],
        }

    def test_what_it_says_of_a_round(self, run: Make):
        made = run(0, 1, 0, 2)
        start = made.events("round_start")[0]
        assert (start["buffer"], start["cohort"]) == (2, ["client-000", "client-001", "client-002"])
        assert list(made.result.train_metrics_clientapp) == [1, 2]
        assert list(made.result.evaluate_metrics_clientapp) == [2]
        assert made.strategy.server.counters == {"client-000": 2, "client-001": 1, "client-002": 1}

    def test_a_rule_of_several_exchanges_misses_the_round(self, run: Make):
        class Endless(type(make_rule("fedit"))):  # type: ignore[misc]
            def start(self, state: Any, phase: int) -> Any:
                inner = super().start(state, 1)
                inner.finish = lambda: NextPhase(state, 2)
                return inner

        made = run(rounds=1, parts={"rule": Endless()})
        assert made.events("round")[0]["message"].startswith("the rule asks for phase 2, and a buffer has one phase")


class TestRefusals:
    def test_an_update_of_too_many_versions_ago(self, run: Make):
        """Client 2 trains through two versions, where one is allowed; it is sent the newest and goes on."""
        made = run(0, 1, 0, 1, 2, 0, 1, 2, 0, rounds=4, round={"max_staleness": 1})
        assert outcomes(made)[4:] == [(3, 2, "too_stale"), (3, 0, "ok"), (3, 1, "ok"), (4, 2, "ok"), (4, 0, "ok")]
        (refusal,) = made.events("round")[2]["refused"]
        assert (refusal["client_id"], refusal["reason"]) == ("client-002", "too_stale")
        assert refusal["message"] == (
            "trained from a version 2 versions back: at most 1 are accepted (round.max_staleness)"
        )

    def test_an_update_of_another_basis(self, run: Make, honest: Make, honest_delta: Make):
        """RoLoRA's turn has passed for client 2: its B is no step in A's round."""

        def by_plan(message: Message, task: Assignment) -> Message:
            delta = honest_delta(task.client_id)
            sent = {name: tensor for name, tensor in delta.items() if group_of(name) in task.plan.trainable}
            return honest(message, task, delta=sent)

        made = run(
            0,
            1,
            2,
            *(0, 1),
            rounds=2,
            answers=dict.fromkeys(range(3), by_plan),
            strategy={"rule": "rolora"},
            round={"buffer": 2, "concurrency": 2},
        )
        assert outcomes(made)[2][2] == "stale_basis"
        assert [event["participants"] for event in made.events("round")] == [2, 2]
        refusal = made.events("round")[1]["refused"][0]
        assert "what that version held still, or let train, is no longer the same" in refusal["message"]

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"delta": {"q.factor_a": torch.full((2, 3), torch.nan), "q.factor_b": torch.ones(2, 2)}}, "not_finite"),
            ({"delta": {"q.factor_a": torch.ones(3, 3), "q.factor_b": torch.ones(2, 2)}}, "layout_mismatch"),
            ({"task_token": "0" * 64}, "bad_token"),
            ({"client_id": "client-001"}, "wrong_client"),
            ({"num_examples": 10**9}, "bad_num_examples"),
            ({"parent_version": "f" * 64}, "wrong_parent"),
        ],
    )
    def test_a_hostile_client_is_named_and_changes_nothing(
        self, run: Make, honest: Make, changes: dict[str, Any], reason: str
    ):
        script, others = (2, 0, 1, 2, 0, 1), {"rounds": 2}
        made = run(*script, answers={2: partial(honest, **changes)}, **others)
        assert outcomes(made) == [
            (1, 2, reason), (1, 0, "ok"), (1, 1, "ok"), (2, 2, reason), (2, 0, "ok"), (2, 1, "ok")
        ]  # fmt: skip
        without = run(0, 1, 0, 1, clients=2, **others)
        assert digests(made) == digests(without)

    def test_a_client_may_not_claim_a_newer_version_than_it_was_sent(self, run: Make, honest: Make):
        newest: list[str] = []

        def notes(message: Message, task: Assignment) -> Message:
            newest.append(task.parent_version)
            return honest(message, task)

        def lies(message: Message, task: Assignment) -> Message:
            return honest(message, task, parent_version=newest[-1])

        made = run(0, 1, 0, 2, 1, answers={0: notes, 2: lies})
        assert newest[1] == made.events("round_start")[1]["version_id"] != newest[0]
        assert outcomes(made)[2:] == [(2, 0, "ok"), (2, 2, "wrong_parent"), (2, 1, "ok")]
        told = run(0, 1, 0, 2, answers={0: notes})
        assert outcomes(told)[2:] == [(2, 0, "ok"), (2, 2, "ok")]  # the older one, which it was sent

    def test_a_client_that_fails_has_had_its_turn(self, run: Make):
        def fails(message: Message, task: Assignment) -> Message:
            raise RuntimeError("no")

        made = run(1, 0, 2, 1, 0, 2, answers={1: fails}, round={"buffer": 3})
        assert [(number, status[:5]) for _, number, status in outcomes(made)] == 2 * [
            (1, "error"),
            (0, "ok"),
            (2, "ok"),
        ]
        assert [event["participants"] for event in made.events("round")] == [2, 2]

    def test_when_all_fail_the_version_stays_and_the_run_goes_on(self, run: Make, honest: Make):
        def in_round_two(message: Message, task: Assignment) -> Message:
            return honest(message, task) if task.round_number > 1 else Message(RecordDict(), reply_to=message)

        made = run(answers=dict.fromkeys(range(3), in_round_two))
        assert [event["published"] for event in made.events("round")] == [False, True]
        assert made.events("round")[0]["message"] == "no good update: the global adapter stays as it was"
        assert made.events("round")[1]["rule"]["staleness_max"] == 0.0

    def test_what_the_rule_refuses_is_a_refusal(self, run: Make):
        class Picky(type(make_rule("fedit"))):  # type: ignore[misc]
            def start(self, state: Any, phase: int) -> Any:
                inner = super().start(state, phase)
                accept = inner.add

                def add(update: Any, weight: float) -> None:
                    if update.client_id == "client-001":
                        raise AggregationError("not this one")
                    accept(update, weight)

                inner.add = add
                return inner

        made = run(1, 0, 2, rounds=1, parts={"rule": Picky()})
        assert outcomes(made) == [(1, 1, "not_combinable"), (1, 0, "ok"), (1, 2, "ok")]

    def test_who_is_late_is_named_forgotten_and_asked_again(self, run: Make, monkeypatch: pytest.MonkeyPatch):
        now = [0.0]

        def a_minute_later() -> None:
            now[0] += 61.0

        monkeypatch.setattr("federated.flower.strategy.BufferedRounds", partial(BufferedRounds, clock=lambda: now[0]))
        made = run(0, a_minute_later, 0, 1, clients=2, round={"buffer": 2})
        assert outcomes(made) == [(1, 0, "ok"), (1, 1, "deadline"), (2, 0, "ok"), (2, 1, "ok")]
        assert made.grid.abandoned == [1]
        assert [event["status"] for event in made.events("client")][1] == "late"

    def test_what_is_there_is_taken_however_late_the_look(self, run: Make, monkeypatch: pytest.MonkeyPatch):
        now = [0.0]

        def clock() -> float:
            now[0] += 100.0
            return now[0]

        monkeypatch.setattr("federated.flower.strategy.BufferedRounds", partial(BufferedRounds, clock=clock))
        made = run(clients=1, rounds=2, round={"buffer": 1})
        assert [status for _, _, status in outcomes(made)] == ["ok", "ok"]

    def test_a_message_that_is_not_taken_is_a_failure_and_the_next_client_is_asked(
        self, federation: Make, fake_app: Make
    ):
        class Choosy(InProcessGrid):
            def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
                sent = list(messages)
                train = [message.metadata.message_type == "train" for message in sent]
                if any(train) and len(sent) == 1 and sent[0].metadata.dst_node_id == 1:
                    return [None]  # type: ignore[list-item]
                return super().push_messages(sent)

        made = federation(rounds=2, round={"mode": "buffered", "buffer": 2, "concurrency": 1})
        with Choosy(fake_app(), 3) as grid:
            made.strategy.start(grid)
        failed = [event for event in made.events("client") if event["status"] == "failed"]
        assert {event["client_id"] for event in failed} <= {"client-000"}
        assert all(event["participants"] == 2 for event in made.events("round"))

    def test_a_second_answer_and_a_stranger_s_are_dropped(
        self, federation: Make, fake_app: Make, caplog: pytest.LogCaptureFixture
    ):
        class Echo(InProcessGrid):
            def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
                found = list(super().pull_messages(message_ids))
                return [*found, *found]

        plain = federation(rounds=2, round={"mode": "buffered", "buffer": 3, "concurrency": 3})
        made = federation(rounds=2, round={"mode": "buffered", "buffer": 3, "concurrency": 3})
        plain.run()
        with Echo(fake_app(), 3) as grid:
            made.strategy.start(grid)
        assert digests(made) == digests(plain)
        assert "dropped a reply that nobody waits for, or a second one" in caplog.text


class TestSameAsSync:
    """Where nothing is ever stale, a buffered run is the synchronous one, bit for bit."""

    @pytest.mark.parametrize("optimizer", ["sgd", "adam"])
    @pytest.mark.parametrize("shuffle", [None, 3])
    def test_when_the_buffer_is_everybody(self, federation: Make, optimizer: str, shuffle: int | None):
        changes = {"rounds": 4, "strategy": {"server_optimizer": {"name": optimizer, "learning_rate": 0.5}}}
        sync = federation(**changes)
        buffered = federation(**changes, round={"mode": "buffered", "buffer": 5, "concurrency": 5})
        sync.run(clients=5)
        buffered.run(clients=5, grid={"shuffle": shuffle})
        self.assert_same(sync, buffered)

    @pytest.mark.parametrize("policy", ["uniform", "by_examples", "round_robin", "availability"])
    def test_when_one_client_trains_at_a_time(self, federation: Make, policy: str):
        sync = federation(rounds=5, selection={"fraction": 0.4, "policy": policy})
        buffered = federation(
            rounds=5, selection={"policy": policy}, round={"mode": "buffered", "buffer": 3, "concurrency": 1}
        )
        sync.run(clients=7)
        buffered.run(clients=7)
        self.assert_same(sync, buffered)
        assert buffered.strategy.server.standings == sync.strategy.server.standings

    @staticmethod
    def assert_same(sync: Any, buffered: Any) -> None:
        assert digests(buffered) == digests(sync)
        assert [event["version_id"] for event in buffered.events("round")] == [
            event["version_id"] for event in sync.events("round")
        ]
        states = [made.strategy.server.training_state(9).to_bytes() for made in (buffered, sync)]
        assert states[0] == states[1]


def publisher(registry: Registry, config: Any) -> RegistryPublisher:
    return RegistryPublisher(registry, config, run_id="run", base_digest="b" * 64, method="fedit + sgd")


class TestStopping:
    def test_ctrl_c_keeps_finished_versions_and_names_who_was_at_work(
        self, run: Make, federation: Make, fake_app: Make, caplog: pytest.LogCaptureFixture, tmp_path: Path
    ):
        def interrupt() -> None:
            raise KeyboardInterrupt

        policy = {"mode": "buffered", "buffer": 2, "concurrency": 3}
        with Registry.open(tmp_path / "registry") as registry:
            registry.require_base("b" * 64)
            parts = {"publisher": publisher(registry, federation().strategy.config)}
            made = federation(parts, rounds=4, round=policy)
            with Arrivals(fake_app(), 3, [0, 1, 0, interrupt]) as grid:
                with pytest.raises(RunInterrupted, match="stopped in round 2 of 4; finished rounds are published"):
                    made.strategy.start(grid)
                assert sorted(grid.abandoned) == [1, 2]
            assert [record.manifest.round_number for record in registry.versions("run")] == [0, 1]
            version = made.strategy.version_id
            saved = TrainingState.from_bytes(registry.training_state(version) or b"")
        (dropped,) = made.events("dropped")
        assert (dropped["round_number"], dropped["clients"]) == (1, ["client-001", "client-002"])
        assert "dropped the work of client-001, client-002" in caplog.text
        assert saved.at_work == ("client-002",)

        resumed = run(2, 0, 1, 2, 0, 1, rounds=4, parts={"resume": (saved, version)})
        (lost,) = resumed.events("dropped")[:1]
        assert (lost["round_number"], lost["clients"]) == (1, ["client-002"])
        assert "goes on from its last version" in lost["message"]
        assert outcomes(resumed)[:2] == [(2, 2, "ok"), (2, 0, "ok")]
        assert all(event["staleness"] == 0 for event in resumed.events("client")[:2])
        assert resumed.events("round")[0]["parent"] == version

    @pytest.mark.parametrize("stop", [1, 2, 4])
    def test_one_at_a_time_it_goes_on_as_if_it_was_never_stopped(self, run: Make, stop: int):
        changes: dict[str, Any] = {
            "clients": 5,
            "round": {"buffer": 2, "concurrency": 1},
            "selection": {"policy": "availability"},
            "strategy": {"server_optimizer": {"name": "adam", "learning_rate": 0.5}},
        }
        whole, first = run(rounds=6, **changes), run(rounds=stop, **changes)
        saved = TrainingState.from_bytes(first.strategy.server.training_state(stop).to_bytes())
        resumed = run(rounds=6, parts={"resume": (saved, first.strategy.version_id)}, **changes)
        assert digests(first) + digests(resumed) == digests(whole)
        assert resumed.events("dropped") == []

    def test_a_run_may_go_on_in_the_other_mode(self, run: Make, federation: Make):
        first = run(0, 1, rounds=1)
        state = first.strategy.server.training_state(1)
        assert state.at_work == ("client-002",)
        resumed = federation({"resume": (state, first.strategy.version_id)}, rounds=2)
        resumed.run()
        assert [event["clients"] for event in resumed.events("dropped")] == [["client-002"]]
        assert resumed.strategy.server.training_state(2).at_work == ()
        assert resumed.events("round")[0]["participants"] == 3

    def test_who_still_trains_when_the_run_is_done_is_named_too(self, run: Make, caplog: pytest.LogCaptureFixture):
        made = run(0, 1, rounds=1)
        assert [event["clients"] for event in made.events("dropped")] == [["client-002"]]
        assert [record for record in caplog.records if record.levelno > logging.INFO] == []
        assert [event["event"] for event in made.tracker.events][-2:] == ["dropped", "final"]


def test_a_slow_client_of_a_real_worker_joins_a_later_buffer(federation: Make, fake_app: Make, honest: Make) -> None:
    """Client 2 answers when two versions are out, client 1 in round 3 when client 2 was taken: both wait for events."""
    second, taken = (multiprocessing.get_context("fork").Event() for _ in range(2))

    def slow(message: Message, task: Assignment) -> Message:
        assert task.plan.mode == "evaluate" or second.wait(60)
        return honest(message, task)

    def polite(message: Message, task: Assignment) -> Message:
        assert task.plan.mode == "evaluate" or task.round_number < 3 or taken.wait(60)
        return honest(message, task)

    class Watching(MemoryTracker):
        def emit(self, event: Any) -> None:
            super().emit(event)
            if (event["event"], event.get("client_id")) == ("client", "client-002"):
                taken.set()

    policy = {"mode": "buffered", "buffer": 2, "concurrency": 3}
    tracker = Watching(clock=lambda: 0.0)
    made = federation({"tracker": tracker}, rounds=3, round=policy)
    app = fake_app({"client-001": polite, "client-002": slow})
    with InProcessGrid(app, 3, workers=3) as grid:
        made.strategy.start(grid, evaluate_fn=lambda number, _: second.set() if number == 2 else None)
    found = [(event["round_number"], event["client_id"], event["staleness"]) for event in tracker.of("client")]
    first, last = sorted(found)[:4], sorted(found)[4:]
    assert first == [(number, client, 0) for number in (1, 2) for client in ("client-000", "client-001")]
    assert last[1] == (3, "client-002", 2)
    assert last[0] in [(3, "client-000", 0), (3, "client-001", 0)]  # whichever was quicker
