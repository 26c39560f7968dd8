"""One process serves a run, and whoever looks knows at once when it is gone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from federated.errors import ConfigError
from federated.run_lock import FILE, last_serving, serving

HOLD = """
import sys, time
from pathlib import Path
from federated.run_lock import serving
with serving(Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    return process


def test_a_killed_server_is_gone_at_once_and_the_next_one_may_serve(tmp_path: Path) -> None:
    assert last_serving(tmp_path) is None
    began = time.time()
    with holder(tmp_path) as process:
        found = last_serving(tmp_path)
        assert found is not None
        assert found.alive
        assert found.pid == process.pid
        assert began <= found.since <= time.time()
        with (
            pytest.raises(ConfigError, match=rf"another process serves the run .*{process.pid}"),
            serving(tmp_path, patience=0.3),
        ):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        gone = last_serving(tmp_path)
        assert gone is not None
        assert not gone.alive
        assert gone.since == found.since
    with serving(tmp_path, patience=0.0):
        assert f'"pid": {os.getpid()}' in (tmp_path / FILE).read_text()


def test_one_that_is_ending_is_waited_for(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {process.pid}; true"])
        with serving(tmp_path, patience=20.0):
            pass
        killer.wait()


def test_a_server_that_has_not_said_its_name_yet_is_seen(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        (tmp_path / FILE).write_bytes(b"")
        found = last_serving(tmp_path)
        assert found is not None
        assert found.alive
        process.kill()
    gone = last_serving(tmp_path)
    assert gone is not None
    assert (gone.alive, gone.since) == (False, 0.0)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"), serving(tmp_path / "not-there"):
        pass
