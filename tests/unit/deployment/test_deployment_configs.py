"""``server.yaml`` and the section ``training`` of ``device.yaml``: what is refused, and in which words."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from federated.deployment.server_config import ServerConfig, read_server_config, write_server_config
from federated.deployment.training_config import TrainingConfig, read_training_config
from federated.device.agent_config import device_config
from federated.errors import ConfigError

DIGEST = "0f" * 32
TRAINING: dict[str, Any] = {
    "server": "https://fed.example.org:9443",
    "client": "client.yaml",
    "state": "state",
    "ca": "ca.crt",
    "node_key": "node.key",
    "apps": [DIGEST],
}


def device(folder: Path, value: Any) -> Path:
    path = folder / "device.yaml"
    path.write_text(value if isinstance(value, str) else yaml.safe_dump(value))
    return path


def test_a_server_is_read_as_it_was_written(tmp_path: Path) -> None:
    config = ServerConfig(name="clinics", hosts=("fed.example.org",), door_port=443, app="/srv/app")
    write_server_config(tmp_path, config)
    found = read_server_config(tmp_path)
    assert (found.name, found.hosts, found.door_port, found.app) == ("clinics", ("fed.example.org",), 443, "/srv/app")


def test_without_tls_the_door_says_so() -> None:
    assert ServerConfig(insecure=True).url == "http://localhost:9443"


def test_no_deployment_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fedpeft deploy init"):
        read_server_config(tmp_path)


def test_training_is_read_with_paths_beside_the_file(tmp_path: Path) -> None:
    found = read_training_config(device(tmp_path, {"training": TRAINING}))
    assert found.client == tmp_path / "client.yaml"
    assert found.ca == tmp_path / "ca.crt"
    assert found.address == "fed.example.org:9443"
    assert found.warm


def test_the_agent_does_not_mind_the_section(tmp_path: Path) -> None:
    agent = {"device_id": "shop-17", "source": "releases", "root": "root.json", "state": "state"}
    assert device_config(device(tmp_path, {**agent, "training": TRAINING})).device_id == "shop-17"


def test_a_default_port_is_that_of_the_scheme() -> None:
    assert TrainingConfig(**{**TRAINING, "server": "https://fed.example.org"}).address == "fed.example.org:443"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"apps": []}, "apps: name the bundles"),
        ({"unpinned": True}, "apps: name the bundles"),
        ({"apps": ["0f"]}, "64 hexadecimal digits"),
        ({"apps": [DIGEST.upper()]}, "64 hexadecimal digits"),
        ({"server": "fed.example.org:9443"}, "expected https://HOST:PORT"),
        ({"server": "https://fed.example.org:9443/path"}, "expected https://HOST:PORT"),
        ({"server": "https://user@fed.example.org"}, "expected https://HOST:PORT"),
        ({"server": "https://fed.example.org:port"}, "expected https://HOST:PORT"),
        ({"server": "http://fed.example.org:9443"}, "expected https://"),
        ({"insecure": True}, "insecure: true goes with an http"),
        ({"ca": None}, "both must be given"),
        ({"node_key": None}, "both must be given"),
        ({"poll_seconds": 0}, "poll_seconds"),
        ({"pins": []}, "pins"),
    ],
)
def test_training_that_cannot_be_is_said_in_one_line(tmp_path: Path, changed: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        read_training_config(device(tmp_path, {"training": {**TRAINING, **changed}}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["", "[1]", {"device_id": "x"}, {"training": []}])
def test_a_device_that_does_not_train_is_said(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ConfigError, match="expected a section 'training'"):
        read_training_config(device(tmp_path, value))


def test_without_pins_it_must_be_asked_for() -> None:
    found = TrainingConfig(**{**TRAINING, "apps": [], "unpinned": True})
    assert found.unpinned
