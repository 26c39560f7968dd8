"""While a transfer goes on: commands are carried out, health is looked at, and what was decided meanwhile holds."""

import http.server
import threading
import time as seconds
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from federated.device import NULL
from federated.device.agent_commands import Mailbox
from federated.errors import Unreachable
from federated.release.source import FolderSource, HttpSource


class Slow:
    """A folder's files in small pieces; in the middle of a version's weights something happens."""

    label = "slow"

    def __init__(self, folder: Path, happens: Callable[[], object]) -> None:
        self.happens: Callable[[], object] | None = happens
        self.seen: list[float] = []
        self._inner = FolderSource(folder)

    def read(self, name: str) -> Generator[bytes, None, None]:
        return self.read_from(name, 0)

    def read_from(self, name: str, start: int) -> Generator[bytes, None, None]:
        for chunk in self._inner.read_from(name, start):
            for at in range(0, len(chunk), 1000):
                yield chunk[at : at + 1000]
                if "weights" in name and self.happens:
                    happens, self.happens = self.happens, None
                    happens()


@pytest.fixture
def two(yard) -> tuple[str, str]:
    """Two committed versions, and a third that was released since."""
    with yard.started() as agent:
        versions = yard.settled(agent, 1), yard.settled(agent, 2)
    yard.third = yard.publish(3, size=4000)
    return versions


def send(yard, verb: Any, version: str = "") -> Callable[[], object]:
    return lambda: Mailbox(yard.state / "commands").send(verb, version)


def test_a_rollback_does_not_wait_for_a_transfer_and_holds_after_it(yard, two) -> None:
    answers: list[float] = []

    def happens() -> None:
        send(yard, "rollback", two[1])()
        source.happens = lambda: answers.append(yard.answer)

    source = Slow(yard.publisher.folder, happens)
    with yard.started(source) as agent:
        assert agent.poll()
        assert answers == [1.0]  # in the middle of the transfer
        assert (agent.active, yard.answer) == (two[0], 1.0)  # the channel's version was declined by that
        assert agent.poll()
        assert agent.active == two[0]
        assert yard.book.replies[-1].done


@pytest.mark.parametrize(
    ("verb", "at", "answer"), [("pin", 1, 2.0), ("activate", 0, 1.0), ("unpin", None, 3.0), ("rollback", None, 3.0)]
)
def test_what_was_decided_during_a_transfer_holds(yard, two, verb, at, answer) -> None:
    """Also what decides nothing: a rollback from a version that does not answer."""
    version = two[at] if at is not None else "" if verb == "unpin" else two[0]
    with yard.started(Slow(yard.publisher.folder, send(yard, verb, version))) as agent:
        assert agent.poll()
        assert yard.answer == answer


def test_an_install_by_hand_is_given_up_for_what_was_asked_later(yard, two) -> None:
    with yard.started(Slow(yard.publisher.folder, send(yard, "pin", NULL))) as agent:
        done, message = yard.command(agent, "install")
        assert (done, agent.active, yard.book.pinned) == (False, NULL, NULL)
        assert "was not activated: staged" in message
        assert [one.done for one in yard.book.replies[-2:]] == [True, False]
        assert yard.command(agent, "unpin")[0]
        assert yard.command(agent, "install")[0]
        assert yard.answer == 3.0


def test_a_version_that_fails_on_probation_is_left_during_a_transfer(yard, two) -> None:
    fourth = yard.publish(4)
    answers: list[float] = []
    with yard.started() as agent:
        assert yard.command(agent, "install", fourth)[0]
        agent._releases._client._source._source = Slow(yard.publisher.folder, lambda: None)
        slow = agent._releases._client._source._source

        def fail() -> None:
            for _ in range(3):
                agent.health.failure(yard.runtime.active.digest, "the model raised X")
            slow.happens = lambda: answers.append(yard.answer)

        slow.happens = fail
        assert yard.command(agent, "install", yard.third)[0]
        assert (answers, yard.answer, yard.state_of(fourth)) == ([2.0], 3.0, "failed")


def test_an_agent_that_is_stopped_does_not_wait_out_the_bandwidth(yard, two) -> None:
    with yard.started(bandwidth=1) as agent:
        threading.Timer(0.3, agent.stop).start()
        began = seconds.monotonic()
        assert not agent.poll()
        assert seconds.monotonic() - began < 60  # at this rate it would be hours
        assert "was stopped" in yard.book.trouble


@contextmanager
def answering(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_a_server_does_not_say_how_long_the_agent_sleeps() -> None:
    def busy(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(503)
        request.send_header("Retry-After", "7200")
        request.send_header("Content-Length", "0")
        request.end_headers()

    with answering(busy) as url:
        began = seconds.monotonic()
        with pytest.raises(Unreachable, match="HTTP 503"):
            list(HttpSource(url).read("x"))
        assert seconds.monotonic() - began < 60


def test_what_came_before_a_line_broke_is_kept() -> None:
    """A piece is given out as it comes, however long the next one takes."""

    def breaks(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", "100000")
        request.end_headers()
        request.wfile.write(b"x" * 1000)

    with answering(breaks) as url:
        for start in (0, 10):
            got = bytearray()
            with pytest.raises(Unreachable):
                for piece in HttpSource(url).read_from("x", start):
                    got += piece
            assert len(got) == 1000 - start
