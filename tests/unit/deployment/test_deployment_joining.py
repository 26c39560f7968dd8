"""A device takes part once, from wherever it is started, and leaves nothing for others to read; programs are fake."""

import json
import stat
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from federated.deployment import joining
from federated.deployment.flower_environment import environment
from federated.deployment.joining import join
from federated.deployment.training_config import TrainingConfig
from federated.errors import DeploymentError

PYTHON = """#!{python}
import json, os, sys, time
said = json.loads(sys.stdin.readline())
told = {{"cwd": os.getcwd(), "said": said, "arguments": sys.argv, "no_proxy": os.environ["no_proxy"]}}
with open(os.path.join({folder!r}, sys.argv[-1].rpartition(".")[2] + ".new"), "w") as file:
    json.dump(told, file)
os.rename(file.name, os.path.join({folder!r}, sys.argv[-1].rpartition(".")[2]))
time.sleep(60)
"""


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python that writes down how it was started."""
    program = tmp_path / "python"
    program.write_text(PYTHON.format(python=sys.executable, folder=str(tmp_path)))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return program


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    folder = tmp_path / "clinic \N{GRINNING FACE}"
    folder.mkdir()
    (folder / "client.yaml").write_text("")
    state = folder / "state"
    return TrainingConfig("http://127.0.0.1:1", folder / "client.yaml", state, apps=("a" * 64,), insecure=True)


@pytest.fixture
def joined(config: TrainingConfig, python: Path) -> Iterator[Path]:
    """A device that takes part; where its programs write."""
    stop = threading.Event()
    thread = threading.Thread(target=join, args=(config,), kwargs={"stop": stop})
    thread.start()
    end = time.monotonic() + 30
    while not all((python.parent / name).is_file() for name in ("supernode", "launcher")):
        assert time.monotonic() < end
        time.sleep(0.02)
    try:
        yield python.parent
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()


def test_places_in_the_clients_file_are_beside_it_wherever_it_was_started(joined: Path, config: TrainingConfig) -> None:
    for name in ("supernode", "launcher"):
        assert json.loads((joined / name).read_text())["cwd"] == str(config.client.parent)


@pytest.mark.parametrize(("pause", "look"), [(0.5, 0.2), (3.0, 0.5), (60.0, 0.5)])
def test_a_launcher_looks_more_often_than_its_supernode(config: TrainingConfig, pause: float, look: float) -> None:
    """Rarely enough for a battery; a message that lies on the device has waited long enough."""
    child = joining._launcher(replace(config, poll_seconds=pause), 1, config.state / "secret")
    assert child.said["poll_seconds"] == look


def test_nothing_of_theirs_is_for_others(joined: Path) -> None:
    for name in ("supernode", "launcher"):
        assert stat.S_IMODE((joined / name).stat().st_mode) == 0o600


def test_no_secret_is_on_a_command_line(joined: Path, config: TrainingConfig) -> None:
    secret = (config.state / "superexec.secret").read_bytes()
    assert len(secret) == 32
    for name in ("supernode", "launcher"):
        assert json.loads((joined / name).read_text())["arguments"][1:] == ["-m", f"federated.deployment.{name}"]


def test_the_clients_file_is_named_so_that_flower_reads_it(joined: Path, config: TrainingConfig) -> None:
    from flwr.common.config import parse_config_args

    arguments = json.loads((joined / "supernode").read_text())["said"]["arguments"]
    told = parse_config_args([arguments[arguments.index("--node-config") + 1]])
    assert told == {"client-config": str(config.client)}


def test_a_device_takes_part_once(joined: Path, config: TrainingConfig) -> None:
    del joined
    with pytest.raises(DeploymentError, match="takes part already"):
        join(config, stop=threading.Event())


def test_and_again_when_it_has_ended(config: TrainingConfig, python: Path) -> None:
    del python
    for _ in range(2):
        stop = threading.Event()
        stop.set()
        join(config, stop=stop)


def test_loopback_is_asked_past_proxies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.delenv("NO_PROXY", raising=False)
    found = environment(tmp_path)
    assert found["no_proxy"] == "example.org,localhost,127.0.0.1,::1"
    assert found["NO_PROXY"] == "localhost,127.0.0.1,::1"


def test_a_state_that_cannot_be_written_is_said(config: TrainingConfig) -> None:
    config.state.write_text("a file")
    with pytest.raises(DeploymentError, match=r"training\.state"):
        join(config, stop=threading.Event())
    assert config.state.is_file()
