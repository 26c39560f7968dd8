"""One server for each run, whatever became of the last one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from federated.errors import ConfigError
from federated.flower.run_lock import FILE, alone

HOLD = "import sys, time; from pathlib import Path; from federated.flower.run_lock import alone\n"
HOLD += "with alone(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_a_second_server_is_refused_by_name_of_the_first(tmp_path: Path) -> None:
    with (
        alone(tmp_path),
        pytest.raises(ConfigError, match=rf"another server works on this run \(process {os.getpid()}\)"),
        alone(tmp_path, patience=0),
    ):
        pytest.fail("two at once")


def test_the_next_one_follows(tmp_path: Path) -> None:
    for _ in range(3):
        with alone(tmp_path, patience=0):
            assert (tmp_path / FILE).read_text() == f"{os.getpid()}\n"


def test_a_killed_server_leaves_no_lock(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="another server"), alone(tmp_path, patience=0):
            pytest.fail("two at once")
        other.send_signal(signal.SIGKILL)
    began = time.monotonic()
    with alone(tmp_path):
        assert time.monotonic() - began < 5


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"), alone(tmp_path / "no"):
        pytest.fail("held nothing")
