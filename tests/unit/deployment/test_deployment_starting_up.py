"""Bringing a deployment up: alone, in a folder of its owner's, with the door on the address that it was given."""

import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from federated.config import experiment_from
from federated.deployment import starting_up
from federated.deployment.layout import Layout
from federated.deployment.local_nodes import make_local_nodes
from federated.deployment.server_config import ServerConfig
from federated.deployment.starting_up import alone, make_deployment
from federated.deployment.training_config import read_training_config
from federated.errors import DeploymentError


def test_one_brings_up_at_a_time(tmp_path: Path) -> None:
    times: list[tuple[float, float]] = []

    def work() -> None:
        with alone(tmp_path / "d"):
            began = time.monotonic()
            time.sleep(0.2)
            times.append((began, time.monotonic()))

    both = [threading.Thread(target=work) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join(30)
    first, second = sorted(times)
    assert first[1] <= second[0]


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DeploymentError, match="cannot make a deployment"), alone(tmp_path / "file" / "d"):
        pass


def test_a_folder_that_was_there_is_its_owners_alone_from_then_on(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    make_deployment(folder, ServerConfig(insecure=True))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.fixture
def six() -> Iterator[socket.socket]:
    """A listener on IPv6's loopback alone."""
    with socket.socket(socket.AF_INET6) as found:
        try:
            found.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
        found.listen()
        yield found


@pytest.mark.parametrize("host", ["::", "::1"])
def test_a_door_is_waited_for_on_its_own_address(six: socket.socket, host: str) -> None:
    config = ServerConfig(door_host=host, door_port=six.getsockname()[1])
    assert starting_up._answers(*starting_up._door(config))


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1", "127.0.0.9", "localhost"])  # noqa: S104
def test_or_on_loopback_where_it_listens_everywhere(host: str) -> None:
    with socket.socket() as listening:
        listening.bind((host, 0))
        listening.listen()
        config = ServerConfig(door_host=host, door_port=listening.getsockname()[1])
        assert starting_up._answers(*starting_up._door(config))


@pytest.mark.parametrize(("count", "pause"), [(1, 0.5), (8, 0.5), (50, 3.12)])
def test_many_devices_of_one_machine_look_less_often(tmp_path: Path, count: int, pause: float) -> None:
    """Each look costs the processors that the rounds need."""
    layout = Layout(tmp_path)
    experiment = experiment_from({"data": {"partition": {"num_clients": 50}}, "task": {"labels": ["no", "yes"]}})
    names = make_local_nodes(
        layout, ServerConfig(insecure=True), experiment, count=count, app=tmp_path, apps=["a" * 64]
    )
    assert len(names) == count
    for name in names:
        assert read_training_config(layout.node(name).config).poll_seconds == pause
