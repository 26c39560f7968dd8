"""``fedpeft deploy status`` on a folder that no process serves: in a pipe, as JSON, and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from federated.cli.main import app
from federated.deployment.server_config import ServerConfig, write_server_config
from federated.tracking import JsonlTracker

RUN = {"name": "first", "overrides": [], "app": "/app", "app_digest": "ab", "flower_runs": ["1"],
       "rounds_before": [0], "submitted": 1.0, "attempted": 1.0}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    write_server_config(tmp_path, ServerConfig(name="clinics"))
    (tmp_path / "runs" / "first.json").write_text(json.dumps(RUN))
    tracker = JsonlTracker(tmp_path / "runs" / "first" / "metrics.jsonl")
    tracker.emit({"event": "run", "run_id": "tiny-ab", "rounds": 3})
    tracker.emit({"event": "client", "round_number": 1, "client_id": "n\x1b[31morth", "status": "late"})
    tracker.emit({"event": "round", "round_number": 1, "published": True, "participants": 0, "cohort": 1,
                  "seconds": 2.0, "evaluation": {"loss": 0.25}})  # fmt: skip
    tracker.emit({"event": "warning", "message": "watch \x1b[31mout"})
    tracker.close()
    return tmp_path


def test_tables_in_a_pipe(folder: Path) -> None:
    done = CliRunner().invoke(app, ["deploy", "status", "--folder", str(folder)])
    assert done.exit_code == 0, done.output
    for expected in ("clinics", "not up", "1 of 3", "held-out loss 0.25", "1 x late", "page: http://127.0.0.1:9441/"):
        assert expected in done.output
    assert "\x1b" not in done.output


def test_json_once(folder: Path) -> None:
    done = CliRunner().invoke(app, ["deploy", "status", "--folder", str(folder), "--json"])
    found = json.loads(done.output)
    assert (found["format"], found["federation"], found["runs"][0]["rounds_done"]) == (1, "clinics", 1)


@pytest.mark.parametrize(("given", "said"), [(["--watch"], "terminal"), (["--watch", "--json"], "choose one")])
def test_what_does_not_go_together_is_said(folder: Path, given: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["deploy", "status", "--folder", str(folder), *given])
    assert done.exit_code != 0
    assert said in str(done.exception)


@pytest.mark.slow
def test_watching_shows_what_is_new_until_it_is_interrupted(folder: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "federated.cli.main", "deploy", "status", "--watch", "--folder", str(folder)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200", "LINES": "50"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    try:
        _until(ours, b"1 of 3")
        path = folder / "runs" / "first" / "metrics.jsonl"
        with path.open("a") as file:
            file.write(json.dumps({"event": "round", "round_number": 2, "published": True}) + "\n")
        _until(ours, b"2 of 3")
        process.send_signal(signal.SIGINT)
        _until(ours, b"\x1b[?1049l")  # the terminal is given back
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _until(terminal: int, expected: bytes) -> None:
    seen, end = b"", time.monotonic() + 90
    while expected not in seen:
        assert time.monotonic() < end, seen[-2000:]
        seen += os.read(terminal, 65_536)
