"""A run whose process died goes on by itself, one that ended does not; Flower's command is a stand-in here."""

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from federated.deployment.flwr_command import FlowerLink
from federated.deployment.layout import Layout
from federated.deployment.runs import Runs, Submission
from federated.deployment.server_config import ServerConfig

APP = Path(__file__).resolve().parents[3]
HOLD = """
import sys, time
from pathlib import Path
from federated.run_lock import serving
with serving(Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(60)
"""


class StandIn:
    """Flower's list of runs, and what it was asked."""

    def __init__(self) -> None:
        self.status = "running"
        self.calls: list[str] = []

    def call(self, *arguments: str) -> str:
        self.calls.append(arguments[0])
        if arguments[0] == "stop":
            self.status = "finished:stopped"
        return ""

    def record(self, *arguments: str) -> dict[str, Any]:
        self.calls.append(arguments[0])
        if arguments[0] == "run":
            return {"run-id": f"{len(self.calls)}"}
        return {"runs": [{"status": self.status}]}


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    found = StandIn()
    monkeypatch.setattr(FlowerLink, "call", lambda _, *given: found.call(*given))
    monkeypatch.setattr(FlowerLink, "record", lambda _, *given: found.record(*given))
    return found


@pytest.fixture
def runs(tmp_path: Path, flower: StandIn) -> Runs:
    """One submitted run, ``r``, whose folder is there."""
    del flower
    found = Runs(Layout(tmp_path), ServerConfig(app=str(APP)))
    (tmp_path / "runs" / "r").mkdir(parents=True)
    write(tmp_path, Submission("r", ("rounds=3",), str(APP), "ab", ("7",), (0,), attempted=time.time() - 5))
    return found


def write(folder: Path, submission: Submission) -> None:
    (folder / "runs" / "r.json").write_text(json.dumps(submission.__dict__))


def say(folder: Path, *events: dict[str, Any]) -> None:
    lines = [json.dumps({"time": time.time(), **event}) for event in events]
    (folder / "runs" / "r" / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))


@pytest.fixture
def server(tmp_path: Path, runs: Runs) -> "Iterator[subprocess.Popen[str]]":
    """A process that serves the run."""
    del runs
    (tmp_path / "runs" / "r" / "run.json").write_text("{}")
    command = [sys.executable, "-c", HOLD, str(tmp_path / "runs" / "r")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_a_killed_server_is_missed_at_once_and_its_run_goes_on(
    runs: Runs, server: "subprocess.Popen[str]", flower: StandIn
) -> None:
    flower.status = "finished:failed"  # as after a minute without SuperLink: it may not be resumed while it lives
    assert runs.keep_going("r") is None
    assert runs.standing("r").state == "running"
    assert "run" not in flower.calls
    flower.status = "running"  # Flower has not missed it yet
    server.kill()
    server.wait()
    resumed = runs.keep_going("r", ask=False)
    assert resumed is not None
    assert (resumed.flower_runs[0], len(resumed.flower_runs)) == ("7", 2)
    assert flower.calls.index("stop") < flower.calls.index("run")


def test_a_process_that_never_began_is_missed_when_flower_says_so(runs: Runs, flower: StandIn) -> None:
    assert runs.keep_going("r") is None
    flower.status = "finished:failed"
    assert runs.keep_going("r", ask=False) is None
    assert runs.keep_going("r") is not None


@pytest.mark.parametrize(
    ("status", "state", "resumed"),
    [("completed", "completed", False), ("failed", "failed", False), ("interrupted", "died", True)],
)
def test_only_an_end_from_outside_is_none(
    runs: Runs, tmp_path: Path, flower: StandIn, status: str, state: str, *, resumed: bool
) -> None:
    flower.status = "finished:failed"
    say(tmp_path, {"event": "end", "status": status, "message": ""})
    assert runs.standing("r").state == state
    assert (runs.keep_going("r") is not None) == resumed


def test_what_was_stopped_or_given_up_stays_so(runs: Runs, tmp_path: Path, flower: StandIn) -> None:
    flower.status = "finished:stopped"
    one = runs.submission("r")
    write(tmp_path, replace(one, stopped=True))
    assert runs.standing("r").state == "stopped"
    assert runs.keep_going("r") is None
    write(tmp_path, replace(one, flower_runs=("7",) * 5, rounds_before=(2,) * 5))
    say(tmp_path, {"event": "round", "round_number": 2, "published": True})
    assert runs.keep_going("r") is None
    assert "5 attempts" in runs.submission("r").gave_up


def test_a_run_that_was_killed_before_it_had_a_name_begins_again_in_its_own_folder(
    runs: Runs, tmp_path: Path, flower: StandIn
) -> None:
    (tmp_path / "runs" / "r" / "config.yaml").write_text("half")
    flower.status = "finished:failed"
    assert runs.keep_going("r") is not None
    assert not (tmp_path / "runs" / "r").exists()  # else the new one would be runs/r-2


def test_a_program_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    from federated.deployment import with_parent

    told = tmp_path / "pid"
    program = f"import os, time; open({str(told)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    command = [sys.executable, "-I", "-S", with_parent.__file__, sys.executable, "-c", program]
    starter = f"import subprocess, time; subprocess.Popen({command!r}); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", starter]) as process:
        until(lambda: told.is_file() and bool(told.read_text()))
        process.kill()
    pid = int(told.read_text())
    until(lambda: not alive(pid))


def alive(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    try:
        os.kill(pid, 0)
        return path.read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def until(found: Any) -> None:
    end = time.monotonic() + 20
    while not found():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_process_that_does_not_begin_is_said_and_where_to_look(tmp_path: Path, runs: Runs, flower: StandIn) -> None:
    assert runs.standing("r").message == ""
    write(tmp_path, replace(runs.submission("r"), attempted=time.time() - 130))
    found = runs.standing("r")
    assert (found.state, flower.status) == ("running", "running")
    assert "no server process has begun for 130 s: see superlink.log" in found.message


@pytest.mark.parametrize(
    ("keep_going", "gave_up", "expected"), [(True, "", True), (False, "", False), (True, "x", False)]
)
def test_a_dead_run_is_waited_for_where_it_will_go_on(
    tmp_path: Path, runs: Runs, flower: StandIn, gave_up: str, *, keep_going: bool, expected: bool
) -> None:
    flower.status = "finished:failed"
    write(tmp_path, replace(runs.submission("r"), gave_up=gave_up))
    found = Runs(Layout(tmp_path), ServerConfig(app=str(APP), keep_going=keep_going))
    assert found.goes_on(found.standing("r")) == expected


HARD = ('name="a b"', "task.labels=['x','y z']", "a=b\nc", "a=\N{GRINNING FACE}", "a=$(id);`id`", "a=\x7f\\", "=")


def test_overrides_come_through_flowers_command_as_they_were(runs: Runs, flower: StandIn) -> None:
    from flwr.common.config import parse_config_args

    told = []

    def record(*arguments: str) -> dict[str, Any]:
        told.append(parse_config_args([arguments[-1]])["overrides"])
        return {"run-id": "1"}

    flower.record = record  # type: ignore[method-assign]
    runs.submit(HARD, name="hard")
    assert tuple(shlex.split(str(told[0]))[: len(HARD)]) == HARD


def test_who_stops_a_run_while_the_keeper_resumes_it_has_the_last_word(
    runs: Runs, flower: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    flower.status = "finished:failed"
    stopping = threading.Thread(target=runs.stop, args=("r",))
    record = flower.record

    def slow(*arguments: str) -> dict[str, Any]:
        if arguments[0] == "run":
            stopping.start()
            time.sleep(0.3)
        return record(*arguments)

    monkeypatch.setattr(flower, "record", slow)
    runs.keep_going("r")
    stopping.join(30)
    assert runs.submission("r").stopped
    assert len(runs.submission("r").flower_runs) == 2


def test_two_keepers_resume_a_run_once(runs: Runs, flower: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    flower.status = "finished:failed"
    record = flower.record

    def slow(*arguments: str) -> dict[str, Any]:
        if arguments[0] == "run":
            time.sleep(0.3)
            flower.status = "running"
        return record(*arguments)

    monkeypatch.setattr(flower, "record", slow)
    keepers = [threading.Thread(target=runs.keep_going, args=("r",)) for _ in range(2)]
    for one in keepers:
        one.start()
    for one in keepers:
        one.join(30)
    assert flower.calls.count("run") == 1


def test_the_operators_process_holds_no_torch_in_memory() -> None:
    """It runs for months beside the SuperLink, and looks at files."""
    code = "import sys, federated.deployment.operating; sys.exit(int('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
