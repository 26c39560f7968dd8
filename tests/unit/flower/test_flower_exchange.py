"""Push, poll and who is who, on a scripted Grid with a scripted clock."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.clientapp import ClientApp

from federated.errors import DataError, NotEnoughUpdates
from federated.flower import InProcessGrid
from federated.flower.directory import Directory
from federated.flower.exchange import exchange
from federated.flower.records import refusal_content, reply_content

Make = Callable[..., Any]


class Clock:
    """Moves by one second at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class Grid:
    """Hands out replies by a script: for each pull, which nodes have answered by then."""

    def __init__(self, batches: list[list[int]], answer: Callable[[Message], Message] | None = None) -> None:
        self.batches = batches
        self.sent: dict[str, Message] = {}
        self.pulls: list[set[str]] = []
        self.nodes: list[int] = []
        self.asked: list[int] = []
        self._answer = answer or (lambda message: Message(reply_content("x", "", {}), reply_to=message))

    def get_node_ids(self) -> Iterable[int]:
        return self.nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        keys = []
        for message in messages:
            keys.append(f"message-{len(self.sent)}")
            message.metadata.__dict__["_message_id"] = keys[-1]
            self.sent[keys[-1]] = message
            self.asked.append(message.metadata.dst_node_id)
        return keys

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        self.pulls.append(wanted)
        here = self.batches.pop(0) if self.batches else []
        found = [m for key, m in self.sent.items() if key in wanted and m.metadata.dst_node_id in here]
        return [self._answer(message) for message in found]


def messages(*nodes: int) -> list[Message]:
    return [Message(RecordDict(), node, "train") for node in nodes]


def collect(grid: Any, sent: list[Message], deadline: float = 100.0, poll_interval: float = 0.0) -> list[int]:
    replies = exchange(grid, sent, deadline=deadline, poll_interval=poll_interval, clock=Clock())
    return [reply.metadata.src_node_id for reply in replies]


def test_replies_come_in_the_order_of_arrival() -> None:
    assert collect(Grid([[2], [], [3], [1]]), messages(1, 2, 3)) == [2, 3, 1]


def test_only_what_is_missing_is_asked_for() -> None:
    grid = Grid([[2], [1, 3]])
    collect(grid, messages(1, 2, 3))
    assert [len(pull) for pull in grid.pulls] == [3, 2]


def test_each_reply_is_handed_on_before_the_next_look() -> None:
    """One update is in memory at a time."""
    grid = Grid([[1], [2]])
    replies = exchange(grid, messages(1, 2), deadline=100.0, poll_interval=0.0, clock=Clock())  # type: ignore[arg-type]
    next(replies)
    assert len(grid.pulls) == 1


def test_the_deadline_ends_the_wait_and_keeps_what_came() -> None:
    assert collect(Grid([[1]]), messages(1, 2), deadline=5.0) == [1]


def test_what_is_there_at_the_deadline_is_still_taken() -> None:
    assert collect(Grid([[1, 2]]), messages(1, 2), deadline=0.0) == [1, 2]


def test_nobody_to_ask_is_no_wait() -> None:
    grid = Grid([])
    assert collect(grid, []) == []
    assert grid.pulls == []


def test_it_sleeps_only_when_nothing_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    monkeypatch.setattr("federated.flower.exchange.time.sleep", naps.append)
    collect(Grid([[1], [], [], [2]]), messages(1, 2), poll_interval=0.5)
    assert naps == [0.5, 0.5]


def test_a_grid_that_can_forget_is_told_what_is_late() -> None:
    class Forgetful(Grid):
        def abandon(self, message_ids: Iterable[str]) -> None:
            self.abandoned = set(message_ids)

    grid = Forgetful([[1]])
    collect(grid, messages(1, 2), deadline=3.0)
    assert {grid.sent[key].metadata.dst_node_id for key in grid.abandoned} == {2}


class TestDirectory:
    def test_every_client_answers_with_its_name(self, config: Make, fake_app: Make):
        with InProcessGrid(fake_app(), 3) as grid:
            directory = Directory(config())
            directory.wait(grid)
        assert directory.nodes == {"client-000": 1, "client-001": 2, "client-002": 3}
        assert directory.problems == []

    def test_a_node_is_asked_once(self, config: Make):
        grid = naming(Grid([[1, 2], [3]]), {1: "a", 2: "b", 3: "c"})
        directory = Directory(config())
        grid.nodes = [1, 2]
        directory.refresh(grid)
        grid.nodes = [1, 2, 3]
        directory.refresh(grid)
        directory.refresh(grid)
        assert grid.asked == [1, 2, 3]
        assert directory.nodes == {"a": 1, "b": 2, "c": 3}

    def test_a_node_that_left_is_forgotten_and_asked_again_under_a_new_id(self, config: Make):
        grid = naming(Grid([[1, 2], [9]]), {1: "a", 2: "b", 9: "a"})
        directory = Directory(config())
        grid.nodes = [1, 2]
        directory.refresh(grid)
        grid.nodes = [2, 9]
        directory.refresh(grid)
        assert directory.nodes == {"a": 9, "b": 2}

    def test_a_name_that_is_taken_is_a_problem_of_the_second(self, config: Make):
        grid = naming(Grid([[1, 2]]), {1: "a", 2: "a"})
        grid.nodes = [1, 2]
        directory = Directory(config())
        directory.refresh(grid)
        assert directory.nodes == {"a": 1}
        assert directory.problems == [(2, "name_taken", "client id 'a' is taken by node 1")]

    @pytest.mark.parametrize("name", ["", "a\nb", "\ud800", "\x1b[2J", "x" * 201], ids=repr)
    def test_a_name_that_nothing_can_be_keyed_on_is_a_problem(self, config: Make, name: str):
        grid = naming(Grid([[1, 2]]), {1: name, 2: "good"})
        grid.nodes = [1, 2]
        directory = Directory(config())
        directory.refresh(grid)
        assert directory.nodes == {"good": 2}
        assert directory.problems == [(1, "no_name", "it gave no client id that can be used")]

    @pytest.mark.parametrize("name", ["x" * 200, "Klinik Nürnberg 病院", "../x"])
    def test_unusual_names_are_names(self, config: Make, name: str):
        grid = naming(Grid([[1]]), {1: name})
        grid.nodes = [1]
        directory = Directory(config())
        directory.refresh(grid)
        assert directory.nodes == {name: 1}

    def test_refusals_errors_and_nonsense_are_problems_with_their_reasons(self, config: Make):
        answers: dict[int, Callable[[Message], Message]] = {
            1: lambda m: Message(refusal_content("", DataError("no rows here")), reply_to=m),
            2: lambda m: Message(Error(code=2, reason="boom"), reply_to=m),
            3: lambda m: Message(RecordDict(), reply_to=m),
        }
        grid = Grid([[1, 2, 3]], lambda message: answers[message.metadata.dst_node_id](message))
        grid.nodes = [1, 2, 3]
        directory = Directory(config())
        directory.refresh(grid)  # type: ignore[arg-type]
        assert directory.nodes == {}
        causes = ["no rows here", "boom", "the reply has no 'reply' record"]
        assert directory.problems == [(node, "no_name", text) for node, text in enumerate(causes, 1)]

    def test_too_few_clients_end_the_wait_with_the_causes(self, config: Make):
        app = ClientApp()

        @app.query()
        def query(message: Message, _: Any) -> Message:
            return Message(refusal_content("", DataError("no rows here")), reply_to=message)

        directory = Directory(config(selection={"min_clients": 2, "wait": 0.05}))
        with (
            InProcessGrid(app, 1) as grid,
            pytest.raises(
                NotEnoughUpdates, match=r"0 clients answered within 0\.05 s, expected 2\. node 1: no rows here"
            ),
        ):
            directory.wait(grid)

    def test_who_takes_no_part_is_said_before_the_wait_is_over(self, config: Make, monkeypatch: pytest.MonkeyPatch):
        grid = naming(Grid([[1], [2]]), {1: "", 2: "b"})
        grid.nodes, told = [1], list[dict[str, Any]]()
        said_before: list[int] = []

        def come(_: float) -> None:
            said_before.append(len(told))
            grid.nodes = [1, 2]

        monkeypatch.setattr("federated.flower.directory.time.sleep", come)
        directory = Directory(config(selection={"min_clients": 1, "wait": 60}), tell=told.append)
        directory.gather(grid)
        assert said_before[0] == 1
        assert [event["event"] for event in told] == ["node_problem", "joined"]

    def test_no_node_at_all_has_no_cause(self, config: Make):
        directory = Directory(config(selection={"min_clients": 1, "wait": 0.01}))
        with pytest.raises(NotEnoughUpdates, match=r"0 clients answered within 0\.01 s, expected 1$"):
            directory.wait(Grid([]))  # type: ignore[arg-type]

    def test_a_silent_newcomer_does_not_hold_up_those_who_are_there(
        self, config: Make, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("federated.flower.directory._PATIENCE", 0.02)
        grid = naming(Grid([[1]]), {1: "a"})
        grid.nodes = [1]
        directory = Directory(config(selection={"wait": 600}))
        directory.refresh(grid)
        grid.nodes = [1, 2]
        for _ in range(3):  # asked at once, then again after ever more looks
            directory.refresh(grid)
        assert directory.nodes == {"a": 1}
        assert grid.asked == [1, 2, 2]

    def test_a_restarted_client_is_let_in_once_its_old_node_is_gone(self, config: Make):
        grid = naming(Grid([[1], [2], [2]]), {1: "a", 2: "a"})
        directory = Directory(config(selection={"wait": 600}))
        grid.nodes = [1]
        directory.refresh(grid)
        grid.nodes = [1, 2]
        directory.refresh(grid)
        assert directory.nodes == {"a": 1}
        grid.nodes = [2]
        for _ in range(3):
            directory.refresh(grid)
        assert directory.nodes == {"a": 2}

    def test_clients_that_come_later_are_waited_for(self, config: Make, monkeypatch: pytest.MonkeyPatch):
        grid = naming(Grid([[1], [2]]), {1: "a", 2: "b"})
        grid.nodes = [1]
        monkeypatch.setattr("federated.flower.exchange.time.sleep", lambda _: grid.nodes.append(2))
        directory = Directory(config(selection={"min_clients": 2, "wait": 30}))
        directory.wait(grid)
        assert sorted(directory.nodes) == ["a", "b"]


def naming(grid: Grid, names: dict[int, str]) -> Any:
    """The grid, with nodes that answer with these names."""
    grid._answer = lambda message: Message(reply_content(names[message.metadata.dst_node_id], "", {}), reply_to=message)
    return grid
