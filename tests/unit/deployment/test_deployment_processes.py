"""The process manager takes any folder that it can name, refuses the others, and shares its socket with nobody."""

import sys
import tempfile
import time
from pathlib import Path

import pytest

from federated.deployment.layout import Layout
from federated.deployment.processes import Processes, Program, _alive
from federated.errors import DeploymentError


@pytest.mark.parametrize(
    "name", ["plain", "with space", "50% off %(here)s", "a'b\"c", "[x]", "\N{GRINNING FACE}", "x" * 99]
)
def test_a_process_gets_its_arguments_in_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    processes = Processes(Layout(folder))
    code = "import sys, time; print(sys.argv[1], flush=True); time.sleep(60)"
    processes.start([Program("one", [sys.executable, "-c", code, str(folder)])])
    try:
        log = folder / "logs" / "one.log"
        end = time.monotonic() + 60
        while not (log.is_file() and log.read_text()):
            assert time.monotonic() < end, (folder / "logs" / "supervisord.log").read_text()
            time.sleep(0.1)
        assert log.read_text() == f"{folder}\n"
        assert [Path(one.log) for one in processes.states()] == [log]
    finally:
        processes.stop()
    assert not processes.running


@pytest.mark.parametrize("name", ["a #1", "a ;b", "a\nb"])
def test_a_folder_that_cannot_be_named_is_said_in_one_line(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    with pytest.raises(DeploymentError, match="choose another folder"):
        Processes(Layout(folder)).start([Program("one", ["true", str(folder)])])


def test_a_place_for_the_socket_that_others_may_enter_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / ("x" * 99)
    folder.mkdir()
    processes = Processes(Layout(folder))
    processes.socket.parent.mkdir(mode=0o777)
    processes.socket.parent.chmod(0o777)
    with pytest.raises(DeploymentError, match="others may enter"):
        processes.start([])


def test_a_process_that_is_gone_is_not_alive() -> None:
    assert not _alive(2**22 + 1)
