"""Flower's own Grid, over a SuperLink that is played here: heads of replies whose parts come later, or never."""

from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.superlink.grid.http_grid import HttpGrid

from federated.flower import whole_replies as module
from federated.flower.exchange import exchange
from federated.flower.inprocess import InProcessGrid
from federated.flower.whole_replies import whole_replies

PLACE: dict[str, Any] = {
    "runtime_api_address": "127.0.0.1:1",
    "insecure": True,
    "root_certificates": None,
    "token": "t",
}


class SuperLink:
    """Hands out a reply's head once, and its parts when they are there."""

    def __init__(self) -> None:
        self.heads: list[tuple[Any, ObjectTree]] = []
        self.parts: dict[str, bytes] = {}
        self.late: set[str] = set()
        self.lost: set[str] = set()
        self.confirmed: list[str] = []
        self.pulled = 0

    def answer(self, question: str, text: str) -> str:
        """A reply whose parts are all there; its own id."""
        asked = Message(RecordDict({"c": ConfigRecord({"q": 1})}), dst_node_id=5, message_type="train")
        asked.metadata.__dict__["_message_id"] = question
        reply = Message(RecordDict({"c": ConfigRecord({"text": text})}), reply_to=asked)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        tree = get_object_tree(reply)
        head = message_to_proto(Message(RecordDict(), reply_to=asked))
        head.metadata.message_id = reply.object_id
        self._keep(reply)
        self.heads.append((head, tree))
        return reply.object_id

    def _keep(self, one: Any) -> None:
        self.parts[one.object_id] = one.deflate()
        for child in (one.children or {}).values():
            self._keep(child)

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:  # noqa: N802 - Flower's name
        here = [one for one in self.heads if one[0].metadata.reply_to_message_id in request.message_ids]
        self.heads = [one for one in self.heads if one not in here]
        return PullAppMessagesResponse(
            messages_list=[head for head, _ in here], message_object_trees=[tree for _, tree in here]
        )

    def PullObject(self, request: Any) -> PullObjectResponse:  # noqa: N802 - Flower's name
        self.pulled += 1
        found, there = request.object_id not in self.lost, request.object_id not in self.late
        content = self.parts[request.object_id] if found and there else b""
        return PullObjectResponse(object_found=found, object_available=found and there, object_content=content)

    def ConfirmMessageReceived(self, request: Any) -> None:  # noqa: N802 - Flower's name
        self.confirmed.append(request.message_object_id)


@pytest.fixture
def superlink() -> SuperLink:
    return SuperLink()


@pytest.fixture
def grid(superlink: SuperLink) -> Any:
    made: Any = HttpGrid(**PLACE)
    made._client = superlink
    made._run = type("Run", (), {"run_id": 7})()
    HttpGrid.run = property(lambda self: self._run)  # type: ignore[method-assign,assignment]
    return whole_replies(made)


@pytest.fixture(autouse=True)
def _run_as_it_was() -> Any:
    before = HttpGrid.run
    yield
    HttpGrid.run = before  # type: ignore[method-assign]


def texts(replies: list[Message]) -> list[str]:
    return [str(one.content.config_records["c"]["text"]) for one in replies]


def test_a_half_reply_holds_up_nobody_and_comes_when_it_is_whole(grid: Any, superlink: SuperLink) -> None:
    half = superlink.answer("one", "slow")
    superlink.answer("two", "quick")
    superlink.late = {half}
    assert texts(grid.pull_messages(["one", "two"])) == ["quick"]
    assert grid.pull_messages(["one"]) == []
    superlink.late = set()
    (reply,) = grid.pull_messages(["one"])
    assert texts([reply]) == ["slow"]
    assert (reply.metadata.message_id, reply.metadata.reply_to_message_id) == (half, "one")
    assert half in superlink.confirmed
    assert grid.pull_messages(["one"]) == []


def test_what_is_missing_is_looked_at_first_and_nothing_is_kept(grid: Any, superlink: SuperLink) -> None:
    superlink.late = {superlink.answer("one", "slow")}
    grid.pull_messages(["one"])
    before = superlink.pulled
    for _ in range(3):
        grid.pull_messages(["one"])
    assert superlink.pulled == before + 3


def test_one_that_will_never_be_whole_is_flowers_error(grid: Any, superlink: SuperLink) -> None:
    half = superlink.answer("one", "never")
    superlink.late = {half}
    assert grid.pull_messages(["one"]) == []
    superlink.lost = {half}
    (reply,) = grid.pull_messages(["one"])
    assert reply.has_error()
    assert reply.metadata.reply_to_message_id == "one"
    assert grid.pull_messages(["one"]) == []


def test_the_deadline_ends_the_wait(grid: Any, superlink: SuperLink, monkeypatch: pytest.MonkeyPatch) -> None:
    superlink.late = {superlink.answer("one", "never")}
    monkeypatch.setattr(grid._grid, "push_messages", lambda _: ["one"], raising=False)
    asked = [Message(RecordDict(), dst_node_id=5, message_type="train")]
    ticks = iter(range(100))
    assert list(exchange(grid, asked, deadline=3.0, poll_interval=0.0, clock=lambda: float(next(ticks)))) == []
    assert not grid._halves


def test_a_device_cannot_make_another_wait_by_the_words_of_its_error(grid: Any, superlink: SuperLink) -> None:
    from flwr.app import Error

    half = superlink.answer("one", "slow")
    superlink.late = {half}
    asked = Message(RecordDict(), dst_node_id=6, message_type="train")
    asked.metadata.__dict__["_message_id"] = "two"
    error = Message(Error(0, f"Failed to pull object with ID '{half}'"), reply_to=asked)
    error.metadata.__dict__["_message_id"] = error.object_id
    superlink.parts[error.object_id] = error.deflate()
    superlink.heads.append((message_to_proto(error), get_object_tree(error)))
    replies = grid.pull_messages(["one", "two"])
    assert [one.metadata.reply_to_message_id for one in replies] == ["two"]
    superlink.late = set()
    assert texts(grid.pull_messages(["one"])) == ["slow"]


def test_parts_that_make_no_message_are_one_devices_failure(grid: Any, superlink: SuperLink) -> None:
    name = superlink.answer("one", "bad")
    superlink.answer("two", "good")
    head, _ = superlink.heads[0]
    superlink.heads[0] = (head, ObjectTree(object_id=name))  # it claims to have no children
    bad, good = sorted(grid.pull_messages(["one", "two"]), key=lambda one: one.metadata.reply_to_message_id)
    assert bad.has_error()
    assert "do not make a message" in bad.error.reason
    assert texts([good]) == ["good"]
    assert grid.pull_messages(["one"]) == []


def test_a_reply_of_very_many_parts_is_refused_unseen(grid: Any, superlink: SuperLink) -> None:
    name = superlink.answer("one", "bad")
    head, _ = superlink.heads[0]
    parts = [ObjectTree(object_id=f"{number:064d}") for number in range(1001)]
    superlink.heads[0] = (head, ObjectTree(object_id=name, children=parts))
    (bad,) = grid.pull_messages(["one"])
    assert "1002 parts, expected at most 1000" in bad.error.reason
    assert superlink.pulled == 0


@pytest.mark.parametrize("what", ["ObjectUnavailableError", ""])
def test_where_flower_has_changed_its_own_wait_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str, fake_app: Any
) -> None:
    if what:
        monkeypatch.delattr(f"flwr.supercore.inflatable.inflatable_utils.{what}")
    else:
        monkeypatch.setattr(module, "_HTTP_GRID", "flwr.no_such_module")
    made, simulated = HttpGrid(**PLACE), InProcessGrid(fake_app({}), 1)
    assert whole_replies(made) is made
    assert "a reply that is sent in half may hold up a round" in caplog.text
    caplog.clear()
    assert whole_replies(simulated) is simulated
    assert not caplog.text


def test_flowers_own_wait_is_there_again_afterwards(grid: Any, superlink: SuperLink) -> None:
    before: Callable[..., Any] = grid._module.pull_objects
    superlink.answer("one", "quick")
    grid.pull_messages(["one"])
    assert grid._module.pull_objects is before


def test_a_simulations_grid_is_as_it_is(fake_app: Any) -> None:
    grid = InProcessGrid(fake_app({}), 1)
    assert whole_replies(grid) is grid


def test_without_what_it_needs_it_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "_NEEDED", ("no_such_name",))
    made = HttpGrid(**PLACE)
    assert whole_replies(made) is made
    assert "no no_such_name" in caplog.text
