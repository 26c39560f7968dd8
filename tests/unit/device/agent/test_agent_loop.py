"""The agent at work, in its own time: looks, commands between them, and an orderly end."""

import threading
import time as seconds

import pytest

from federated.device import Agent, run
from federated.device.agent_commands import Mailbox
from federated.errors import Unreachable


def worker(yard, **changes) -> Agent:
    yard.reboot()
    return Agent(yard.config(**changes), yard.runtime_of)


@pytest.fixture
def fresh(yard):
    """The real clock judges: sign with it."""
    from datetime import UTC, datetime

    yard.time.now = datetime.now(UTC)
    yard.publisher.renew()
    return yard


def test_once_ends_with_the_probation(fresh) -> None:
    version = fresh.publish(1)
    assert run(worker(fresh, probation={"seconds": 0.3}), once=True)
    assert (fresh.state_of(version), fresh.events[-2:]) == ("committed", ["committed", "stopped"])


def test_once_without_news_ends_at_once(fresh) -> None:
    began = seconds.monotonic()
    assert not run(worker(fresh), once=True)
    assert run(worker(fresh), once=True) is False
    assert seconds.monotonic() - began < 100


def test_a_running_agent_polls_obeys_and_stops(fresh) -> None:
    first = fresh.publish(1)
    agent = worker(fresh, poll_seconds=0.2, retry_seconds=0.05, probation={"seconds": 0.0})
    thread = threading.Thread(target=run, args=(agent,))
    thread.start()
    try:
        wait_for(lambda: fresh.state_of(first) == "committed")
        second = fresh.publish(2)
        wait_for(lambda: fresh.book.active == second and fresh.state_of(second) == "committed")
        name = Mailbox(fresh.state / "commands").send("rollback", second)
        wait_for(lambda: name in {one.name for one in fresh.book.replies})
        assert fresh.book.active == first
    finally:
        agent.stop()
        thread.join(100)
    assert not thread.is_alive()
    assert (fresh.events[-1], fresh.book.boots) == ("stopped", 0)


def wait_for(done) -> None:
    until = seconds.monotonic() + 200
    while True:
        try:
            if done():
                return
        except AssertionError:  # no journal yet
            pass
        assert seconds.monotonic() < until
        seconds.sleep(0.02)


def test_what_a_disk_refuses_does_not_end_the_service(fresh, monkeypatch) -> None:
    fresh.publish(1)
    agent = worker(fresh, poll_seconds=0.05, retry_seconds=0.05, jitter=0.0)
    calls: list[int] = []

    def poll(_: Agent) -> bool:
        calls.append(1)
        if len(calls) == 1:
            raise Unreachable("cannot write the journal")
        agent.stop()
        return True

    monkeypatch.setattr(Agent, "poll", poll)
    assert run(agent)
    assert len(calls) == 2
    assert "trouble" in fresh.events
