"""What one client, one node or one Ctrl-C may not do to the others."""

import threading

import pytest
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from federated.errors import DataError, ModelError
from federated.flower.exchange import exchange
from federated.flower.inprocess import InProcessGrid
from federated.flower.records import refusal_content
from federated.flower.stoppable import StoppableGrid


def _echo() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, _: object) -> Message:
        return Message(RecordDict(), reply_to=message)

    return app


def _messages(*nodes: int) -> list[Message]:
    return [Message(RecordDict(), node, "train") for node in nodes]


class _Choosy(InProcessGrid):
    """Takes messages for node 1 only, as SuperLink does with what it refuses."""

    def push_messages(self, messages):
        sent = list(messages)
        taken = iter(super().push_messages([one for one in sent if one.metadata.dst_node_id == 1]))
        return [next(taken) if one.metadata.dst_node_id == 1 else None for one in sent]


def test_a_message_that_is_not_taken_is_a_failure_of_that_client_alone() -> None:
    with _Choosy(_echo(), 2) as grid:
        replies = list(exchange(grid, _messages(2, 1), deadline=10, poll_interval=0.01))
    assert {reply.metadata.src_node_id: reply.has_error() for reply in replies} == {1: False, 2: True}


class _Full(InProcessGrid):
    """Takes nothing and says so with an empty list."""

    def push_messages(self, messages):
        list(messages)
        return []


def test_a_grid_that_takes_nothing_ends_the_round_at_once() -> None:
    with _Full(_echo(), 2) as grid:
        replies = list(exchange(grid, _messages(1, 2), deadline=10, poll_interval=0.01))
    assert [reply.error.reason for reply in replies] == ["the message was not delivered"] * 2


def test_a_stopped_grid_interrupts_whoever_uses_it() -> None:
    stop = threading.Event()
    with InProcessGrid(_echo(), 1) as grid:
        stoppable = StoppableGrid(grid, stop)
        assert list(stoppable.get_node_ids()) == [1]
        assert len(list(stoppable.send_and_receive(_messages(1), timeout=5))) == 1
        stop.set()
        for call in (
            stoppable.get_node_ids,
            lambda: stoppable.push_messages([]),
            lambda: stoppable.pull_messages([]),
            lambda: stoppable.send_and_receive([]),
        ):
            with pytest.raises(KeyboardInterrupt):
                call()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ModelError("model folder /home/alice/secret/m holds no config.json"), "model folder m holds no config.json"),
        (DataError("ward/a.csv: row 3: unknown label"), "ward/a.csv: row 3: unknown label"),
        (ModelError("not on the hub: https://example.org/a/b"), "not on the hub: https://example.org/a/b"),
        (ValueError("patient 17"), "unexpected error on the client; its own log has the details"),
    ],
)
def test_a_refusal_tells_no_folder_and_no_foreign_text(error: Exception, expected: str) -> None:
    assert refusal_content("a", error)["reply"]["message"] == expected
