"""Ctrl-C while the command line itself is still loading: a module that it loads stops the process from within."""

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
MODULE, FUNCTION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"][
    "fedpeft"
].split(":")
SCRIPT = f"import re\nimport sys\nfrom {MODULE} import {FUNCTION}\nsys.exit({FUNCTION}())"  # as pip writes it
STARTS = {"script": ["-c", SCRIPT], "module": ["-m", "federated.cli.main"]}
TYPER = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep({seconds})
except KeyboardInterrupt:
    if {swallow}:
        raise ImportError("typer was stopped half way") from None
    raise
raise ImportError("nobody listened")
"""


def _hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _ignore_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _start(folder: Path, start: str, *, swallow: bool = False, deaf: bool = False) -> subprocess.CompletedProcess[str]:
    """Start the command with a typer of ours before the real one."""
    (folder / "typer.py").write_text(TYPER.format(swallow=swallow, seconds=0 if deaf else 60))
    return subprocess.run(
        [sys.executable, *STARTS[start], "--version"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
        preexec_fn=_ignore_ctrl_c if deaf else _hear_ctrl_c,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("swallow", [False, True], ids=["raised", "swallowed"])
@pytest.mark.parametrize("start", STARTS)
def test_ctrl_c_while_loading_is_one_line_and_130(tmp_path: Path, start: str, swallow: bool) -> None:
    done = _start(tmp_path, start, swallow=swallow)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_job_in_the_background_goes_on_ignoring_ctrl_c(tmp_path: Path) -> None:
    assert "nobody listened" in _start(tmp_path, "script", deaf=True).stderr


@pytest.mark.parametrize("start", STARTS)
def test_every_start_runs_commands(start: str) -> None:
    done = subprocess.run(
        [sys.executable, *STARTS[start], "--version"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout.split()[0], done.stderr) == (0, "federated-peft", "")


def test_entry_point_loads_nothing_slow() -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, {MODULE}; print(*sys.modules)"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert {"typer", "rich", "numpy", "importlib.metadata", "email"} & set(done.stdout.split()) == set()
