"""'Not now' from end to end: what a client says, and what a server makes of it: no failure, asked again, named."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from federated.config import ExperimentConfig
from federated.errors import NotEnoughUpdates, NotNow
from federated.flower import InProcessGrid, Session, handle_query, handle_train
from federated.flower.adapter_packets import adapter_packet
from federated.flower.declined import not_now_content
from federated.flower.records import Assignment, Reply, assignment_of, name_content, query_content, task_content
from federated.flower.server_privacy import ServerPrivacy
from federated.manifest import TrainPlan
from federated.report import write_report
from federated.run_history import history_of, result_warning
from federated.tracking import JsonlTracker

Make = Callable[..., Any]
SITE = """
client_id: clinic
store: {store}
data: {{name: synthetic}}
model: {{source: "tiny:bert"}}
conditions: {conditions}
"""


class TestClient:
    """The client's half, with a real file of its owner."""

    @pytest.fixture
    def node(self, tmp_path: Path) -> Make:
        def make(conditions: str) -> Context:
            path = tmp_path / "client.yaml"
            path.write_text(SITE.format(store=tmp_path / "store", conditions=conditions))
            return Context(1, 2, {"client-config": str(path)}, RecordDict(), {})

        return make

    def test_the_query_is_answered_with_name_rank_and_not_now(self, node: Make, real_config: ExperimentConfig):
        context = node("{free_disk_mb: 1.0e12, ask_again: 7}")
        reply = Reply.from_message(handle_query(Message(query_content(real_config), 2, "query"), context))
        assert (reply.client_id, reply.rank, reply.reason) == ("clinic", 1024, "not_now")
        assert reply.declined is not None
        assert (reply.declined.condition, reply.declined.seconds) == ("free_disk_mb", 7.0)
        assert reply.message == "its owner's condition 'free_disk_mb' does not hold"

    def test_so_is_a_task_and_nothing_is_read_or_written(
        self, node: Make, real_config: ExperimentConfig, real_session: Session, tmp_path: Path
    ):
        task = Assignment("run", "clinic", 1, "f" * 64, "", real_session.adapter.base.base_digest, TrainPlan(rank=2))
        content = task_content(task, real_config, adapter_packet(real_session.initial))
        reply = Reply.from_message(handle_train(Message(content, 2, "train"), node("{free_disk_mb: 1.0e12}")))
        assert (reply.reason, reply.packet, reply.metrics) == ("not_now", None, {})
        assert not (tmp_path / "store").exists()

    def test_when_they_hold_it_is_there(self, node: Make, real_config: ExperimentConfig):
        context = node("{free_disk_mb: 0.001, idle: 1.0e6}")
        reply = Reply.from_message(handle_query(Message(query_content(real_config), 2, "query"), context))
        assert (reply.client_id, reply.reason, reply.declined) == ("clinic", None, None)

    def test_what_cannot_be_read_is_an_error_and_not_a_yes(
        self, node: Make, real_config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("federated.flower.host.Host.route", lambda _: "tun7")
        monkeypatch.setattr("federated.flower.host.Host.nmcli", "no-such-command", raising=False)
        monkeypatch.setenv("PATH", "")
        context = node("{unmetered: true}")
        reply = Reply.from_message(handle_query(Message(query_content(real_config), 2, "query"), context))
        assert (reply.client_id, reply.reason, reply.declined) == ("", "ConfigError", None)
        assert "conditions.metered_interfaces" in (reply.message or "")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{chargin: true}", "conditions.chargin: unknown key"),
            ("{hours: 9-17}", "conditions.hours: "),
            ("always", "conditions: expected a mapping of keys to values"),
        ],
    )
    def test_a_condition_misspelt_is_refused(self, node: Make, real_config: ExperimentConfig, text: str, message: str):
        reply = Reply.from_message(handle_query(Message(query_content(real_config), 2, "query"), node(text)))
        assert reply.reason == "ConfigError"
        assert message in (reply.message or "")


@pytest.mark.parametrize(
    ("claim", "seconds"),
    [(5.0, 5.0), (0, 1.0), (-3.0, 1.0), (1e9, 3600.0), (float("nan"), 60.0), ("soon", 60.0), (None, 60.0)],
)
def test_when_to_ask_again_is_a_claim_within_bounds(claim: Any, seconds: float) -> None:
    head = ConfigRecord({"client_id": "a", "task_token": "", "reason": "not_now", "condition": "idle\n" + "x" * 99})
    if claim is not None:
        head["ask_again"] = claim
    query = Message(RecordDict(), 2, "query")
    declined = Reply.from_message(Message(RecordDict({"reply": head}), reply_to=query)).declined
    assert declined is not None
    assert declined.seconds == seconds
    assert declined.condition == "idle" + "x" * 59


class Moods:
    """Clients that say "not now" to the next so many queries or tasks.

    Args:
        honest: how a client answers a task otherwise.
        queries, tasks: client id to how often it says so.
        seconds: after which it may be asked again.
    """

    def __init__(
        self,
        honest: Make,
        *,
        queries: Mapping[str, int] | None = None,
        tasks: Mapping[str, int] | None = None,
        seconds: float = 1.0,
    ) -> None:
        self.queries, self.tasks = dict(queries or {}), dict(tasks or {})
        self.asked: list[tuple[str, str]] = []
        self.app = ClientApp()

        @self.app.query()
        def query(message: Message, context: Context) -> Message:
            name = f"client-{int(str(context.node_config['partition-id'])):03d}"
            return self._answer(self.queries, name, message, lambda: Message(name_content(name, 8), reply_to=message))

        @self.app.train()
        def train(message: Message, context: Context) -> Message:
            task = assignment_of(message)
            return self._answer(self.tasks, task.client_id, message, lambda: honest(message, task))

        self._seconds = seconds

    def _answer(self, left: dict[str, int], name: str, message: Message, answer: Make) -> Message:
        self.asked.append((message.metadata.message_type, name))
        if left.get(name, 0) < 1:
            return answer()
        left[name] -= 1
        return Message(not_now_content(name, 8, NotNow("charging", seconds=self._seconds)), reply_to=message)


@pytest.fixture
def run(federation: Make, honest: Make) -> Make:
    def go(moods: dict[str, Any], clients: int = 3, num_rounds: int | None = None, **changes: Any) -> Any:
        made = federation(**changes)
        made.moods = Moods(honest, **moods)
        with InProcessGrid(made.moods.app, clients) as grid:
            made.strategy.start(grid, num_rounds=num_rounds)
        return made

    return go


def statuses(made: Any) -> dict[tuple[int, str], str]:
    return {(one["round_number"], one["client_id"]): one["status"] for one in made.events("client")}


class TestAtTheQuery:
    def test_who_says_so_is_in_no_cohort_and_is_asked_again(self, run: Make):
        made = run({"queries": {"client-001": 1}}, rounds=3, round={"poll_interval": 0.4})
        cohorts = [event["cohort"] for event in made.events("round_start")]
        assert cohorts[0] == ["client-000", "client-002"]
        assert ("train", "client-001") not in made.moods.asked[:5]
        (said,) = made.events("not_now")
        assert {key: said[key] for key in ("client_id", "condition", "seconds")} == {
            "client_id": "client-001", "condition": "charging", "seconds": 1.0,
        }  # fmt: skip
        assert made.events("node_problem") == []
        assert made.events("round")[0]["refused"] == []

    def test_it_joins_when_its_time_has_come(self, federation: Make, honest: Make):
        """The clock is the test's."""
        moment = [0.0]
        made = federation(rounds=4)
        directory = made.strategy._directory
        directory._clock = lambda: moment[0]
        moods = Moods(honest, queries={"client-001": 2}, seconds=100.0)
        with InProcessGrid(moods.app, 3) as grid:
            for now, there, queries in ((0, 2, 1), (99, 2, 1), (100, 2, 2), (150, 2, 2), (200, 3, 3), (300, 3, 3)):
                moment[0] = now
                directory.refresh(grid)
                assert len(directory.nodes) == there
                assert moods.asked.count(("query", "client-001")) == queries
        assert directory.resting == {}
        assert len(made.events("not_now")) == 2

    def test_when_all_say_so_the_run_waits_and_says_so(self, run: Make):
        made = run({"queries": {f"client-{number:03d}": 1 for number in range(3)}}, rounds=1)
        (waiting,) = made.events("waiting")
        assert waiting["message"] == (
            "all clients that are there say not now: client-000 (charging), client-001 (charging), client-002 "
            "(charging): waiting up to 60 s (selection.wait)"
        )
        assert made.events("round")[0]["published"]

    def test_when_they_go_on_saying_so_the_run_ends_with_their_names(self, run: Make):
        never = {f"client-{number:03d}": 99 for number in range(7)}
        with pytest.raises(NotEnoughUpdates) as caught:
            run({"queries": never}, clients=7, selection={"wait": 0.3})
        assert "0 clients answered within 0.3 s, expected 1; all clients that are there say not now" in str(
            caught.value
        )
        assert "client-004 (charging), ..." in str(caught.value)
        assert "client-005" not in str(caught.value)

    def test_one_that_is_silent_when_asked_again_rests_no_more(self, federation: Make, honest: Make):
        made = federation()
        directory = made.strategy._directory
        directory._clock = lambda: moment[0]
        moment = [0.0]
        moods = Moods(honest, queries={"client-000": 1})
        with InProcessGrid(moods.app, 1) as grid:
            directory.refresh(grid)
            assert set(directory.resting) == {"client-000"}
            moods.queries = {"client-000": 1}
            moment[0] = 5.0
            grid.push_messages = lambda messages: [None for _ in messages]
            directory.refresh(grid)
        assert (directory.resting, directory.nodes) == ({}, {})
        assert directory.problems == [(1, "no_name", "the message was not delivered")]


class TestInARound:
    def test_it_is_named_with_its_condition_and_is_no_failure(self, run: Make):
        made = run({"tasks": {"client-001": 1}}, rounds=1)
        (event,) = [one for one in made.events("client") if one["client_id"] == "client-001"]
        assert (event["status"], event["reason"], event["condition"]) == ("not_now", "not_now", "charging")
        (closed,) = made.events("round")
        assert (closed["refused"], closed["not_now"]) == ([], {"client-001": "charging"})
        assert (closed["participants"], closed["cohort"], closed["published"]) == (2, 3, True)
        assert made.strategy.server.standings.keys() == {"client-000", "client-002"}
        assert "client-001" not in made.strategy.server.counters

    def test_it_counts_in_no_quorum(self, run: Make):
        """One good update of three that were asked is too few; of the one that could, it is all."""
        made = run({"tasks": {"client-001": 1, "client-002": 1}}, rounds=1, round={"quorum": 1.0})
        assert made.events("round")[0]["published"]

    def test_nobody_at_all_is_a_missed_round_that_says_so(self, run: Make):
        made = run({"tasks": {f"client-{number:03d}": 1 for number in range(3)}}, rounds=1)
        (closed,) = made.events("round")
        assert "0 good updates of 3, 3 said not now, the quorum is 1" in closed["message"]
        assert not closed["published"]

    def test_it_is_in_no_cohort_until_it_says_otherwise(self, run: Make):
        made = run({"tasks": {"client-001": 1}, "queries": {}, "seconds": 3600.0}, rounds=3)
        cohorts = [event["cohort"] for event in made.events("round_start")]
        assert cohorts == [["client-000", "client-001", "client-002"], *[["client-000", "client-002"]] * 2]

    def test_its_availability_is_what_it_was(self, run: Make):
        made = run({"tasks": {"client-001": 1}, "seconds": 1.0}, rounds=2, selection={"policy": "availability"})
        assert made.strategy.server.standings.get("client-001") is None
        assert made.strategy.server.standings["client-000"].availability == 1.0

    def test_an_evaluation_is_declined_too(self, run: Make):
        made = run({"tasks": {"client-001": 1}}, num_rounds=0)
        (final,) = made.events("final")
        assert (final["refused"], final["not_now"]) == ([], {"client-001": "charging"})

    def test_in_a_buffer_it_has_had_its_turn_and_rests(self, run: Make):
        buffered = {"mode": "buffered", "buffer": 2, "concurrency": 1}
        made = run({"tasks": {"client-001": 1}, "seconds": 3600.0}, rounds=2, round=buffered)
        found = statuses(made)
        assert sorted(found.values()) == ["not_now", "ok", "ok", "ok", "ok"]
        assert [name for (_, name), status in found.items() if status == "not_now"] == ["client-001"]
        assert made.moods.asked.count(("train", "client-001")) == 1


def test_a_last_adapter_that_nobody_measured_is_not_called_bad(run: Make) -> None:
    made = run({"tasks": {}}, rounds=1)
    assert made.events("round")[0]["evaluation"]
    events = [event for event in made.tracker.events if event["event"] != "final"]
    final = {"event": "final", "version_id": "x", "evaluation": None, "refused": []}
    everybody = dict.fromkeys(("client-000", "client-001", "client-002"), "hours")
    assert result_warning(history_of([*events, final | {"not_now": everybody}])) == ""
    assert result_warning(history_of([*events, final | {"not_now": {}}])) != ""


def test_a_population_that_is_drawn_from_holds_those_that_rest(federation: Make) -> None:
    """They may be drawn and not be there; left out when it is fixed, they could never take part."""
    privacy = {"client": {"enabled": True, "noise_multiplier": 1.0, "sampling": "poisson"}}
    config = federation(privacy=privacy, strategy={"weighted": False}).strategy
    made: ServerPrivacy = config._privacy
    made.plan(["a", "b"], ["c"])
    assert made._cohorts is not None
    assert made._cohorts.population == ("a", "b", "c")
    assert "c" not in {name for number in range(40) for name in made.draw(["a", "b"], number)}


def test_the_report_tells_them_from_trouble(run: Make, tmp_path: Path) -> None:
    made = run({"tasks": {"client-001": 1}, "queries": {"client-002": 1}, "seconds": 3600.0}, rounds=2)
    history = history_of(made.tracker.events)
    clients = {one.client_id: one for one in history.clients}
    assert {name: dict(one.not_now) for name, one in clients.items()} == {
        "client-000": {}, "client-001": {"charging": 1}, "client-002": {"charging": 1},
    }  # fmt: skip
    assert all(one.missed == {} for one in clients.values())
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    for event in made.tracker.events:
        tracker.emit({key: value for key, value in event.items() if key != "time"})
    tracker.close()
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "no update refused, 2 times not now" in text
    assert text.count("not now (charging): 1") == 2
