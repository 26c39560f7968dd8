"""The process manager: real supervisord, real processes."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from federated.deployment import processes as manager
from federated.deployment.layout import Layout
from federated.deployment.processes import Processes, Program
from federated.errors import DeploymentError

SLEEP = (sys.executable, "-c", "import time; time.sleep(600)")


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(Layout(tmp_path))
    try:
        yield made
    finally:
        made.stop()


def state_of(processes: Processes, name: str) -> str:
    return next(one.state for one in processes.states() if one.name == name)


def until(processes: Processes, name: str, state: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while state_of(processes, name) != state:
        assert time.monotonic() < end, processes.states()
        time.sleep(0.1)


def test_they_start_are_started_again_and_end(processes: Processes) -> None:
    assert not processes.running
    processes.start([Program("one", SLEEP)])
    until(processes, "one", "RUNNING")
    pid = next(one.pid for one in processes.states() if one.name == "one")
    os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + 60
    while next(one.pid for one in processes.states() if one.name == "one") in (0, pid):
        assert time.monotonic() < end
        time.sleep(0.1)
    again = next(one.pid for one in processes.states() if one.name == "one")
    processes.stop()
    assert not processes.running
    with pytest.raises(ProcessLookupError):
        os.kill(again, 0)


def test_a_second_start_adds_what_is_new_and_leaves_the_rest(tmp_path: Path) -> None:
    processes = Processes(Layout(tmp_path))
    try:
        processes.start([Program("one", SLEEP)])
        until(processes, "one", "RUNNING")
        before = {one.name: one.pid for one in processes.states()}
        processes.start([Program("one", SLEEP), Program("two", SLEEP)])
        until(processes, "two", "RUNNING")
        after = {one.name: one.pid for one in processes.states()}
        assert after["one"] == before["one"]
        processes.start([Program("two", SLEEP)])
        assert {one.name: one.pid for one in processes.states()} == {"two": after["two"]}
    finally:
        processes.stop()


def test_without_a_manager_it_says_how_to_start_one(tmp_path: Path) -> None:
    processes = Processes(Layout(tmp_path))
    with pytest.raises(DeploymentError, match="fedpeft deploy up"):
        processes.states()
    processes.stop()


def test_others_cannot_reach_it(tmp_path: Path) -> None:
    processes = Processes(Layout(tmp_path))
    try:
        processes.start([Program("one", SLEEP)])
        assert processes.socket.stat().st_mode & 0o077 == 0
        assert processes._layout.supervisor_config.stat().st_mode & 0o077 == 0
    finally:
        processes.stop()


def test_a_manager_that_does_not_answer_is_said_and_gets_no_second_beside_it(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes.start([Program("one", SLEEP)])
    pid = int(processes._call("getPID"))
    monkeypatch.setattr(manager, "_PATIENCE", 0.5)
    os.kill(pid, signal.SIGSTOP)
    try:
        for ask in (processes.states, processes.stop, lambda: processes.start([Program("one", SLEEP)])):
            with pytest.raises(DeploymentError, match=r"has not answered for 0\.5 s"):
                ask()
    finally:
        os.kill(pid, signal.SIGCONT)
    monkeypatch.undo()
    assert int(processes._call("getPID")) == pid
