"""``fedpeft serve`` as a user runs it: a process, a registry on disk, a channel that moves."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from federated.cli.main import app
from federated.errors import ConfigError, DeviceError, VersionNotFound
from federated.registry import Registry

Make = Callable[..., Any]

TOKEN, ADMIN = "a-public-word-for-tests", "an-admin-word-for-tests"


@pytest.fixture
def versions(recipe: Make, real_version: Make) -> list[Any]:
    first = real_version(recipe(), 1)
    return [first, real_version(recipe(), 2, parent=first.version_id), real_version(recipe(), 3)]


@pytest.fixture
def registry(tmp_path: Path, versions: list[Any]) -> Path:
    with Registry.open(tmp_path / "registry") as store:
        for version in versions:
            store.publish(version.manifest, version.weights, channel="dev")
        store.channel("stable").promote("v1")
    return tmp_path / "registry"


@pytest.mark.slow
def test_a_channel_is_served_followed_and_ended_in_order(
    registry: Path, versions: list[Any], tmp_path: Path, process: Make
) -> None:
    (tmp_path / "routes.yaml").write_text("users:\n  ann: second\narms:\n  b: third\n")
    (tmp_path / "tokens").write_text(f"{TOKEN}\n")
    options = ["--registry", str(registry), "--adapter", "second=v2", "--adapter", "third=v3", "--poll", "0.2"]
    options += [
        "--routes",
        str(tmp_path / "routes.yaml"),
        "--token-file",
        str(tmp_path / "tokens"),
        "--admin-port",
        "0",
    ]
    with process(options, FEDPEFT_ADMIN_TOKEN=ADMIN) as server:
        place, admin = server.wait_for(r"answers at (\S+)"), server.wait_for(r"admin: (\S+)")
        headers = {"authorization": f"Bearer {TOKEN}"}
        with httpx.Client(base_url=place, headers=headers, timeout=60) as client:

            def version(arm: str = "", **body: Any) -> str:
                told = client.post("/classify", json={"input": "late again", **body}, headers={"x-fedpeft-arm": arm})
                return str(told.headers["x-fedpeft-version"])

            first, second, third = (one.version_id for one in versions)
            assert [version(), version(user="ann"), version("b"), version(model="null")] == [
                first,
                second,
                third,
                "null",
            ]
            assert client.get("/v1/models", headers={"authorization": "Bearer wrong-word-for-tests"}).status_code == 401
            with Registry.open(registry, create=False) as store:
                store.channel("stable").promote("v3")
            until = time.monotonic() + 200
            while version() != third:
                assert time.monotonic() < until
            ruled = httpx.post(f"{admin}/admin/rollback", headers={"authorization": f"Bearer {ADMIN}"})
            assert ruled.json()["kind"] == "rollback"
            assert version() == first
        server.running.send_signal(signal.SIGTERM)
        assert server.running.wait(200) == 0
        assert "late again" not in "".join(server.said)
        assert "POST /classify 200" in "".join(server.said)


@pytest.mark.slow
def test_ctrl_c_ends_a_server_on_an_admin_socket(registry: Path, tmp_path: Path, process: Make) -> None:
    place = tmp_path / "admin.sock"
    with process(["--registry", str(registry), "--admin-socket", str(place)]) as server:
        server.wait_for(r"(admin: )")
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(place)), base_url="http://admin") as client:
            loaded = client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "v2"})
            assert loaded.json()["label"] == "v2"
        server.running.send_signal(signal.SIGINT)
        assert server.running.wait(200) == 0
        assert not place.exists()


def ask(*options: str) -> None:
    CliRunner().invoke(app, ["serve", "--port", "0", *options], catch_exceptions=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--adapter", "second"], "NAME=VERSION"),
        (["--adapter", "=v1"], "NAME=VERSION"),
        (["--admin-port", "0", "--admin-socket", "x"], "choose one"),
        (["--admin-token-file", "x"], "add --admin-port"),
        (["--routes", "nowhere.yaml"], "cannot be read"),
        (["--device", "device.yaml"], "--device brings its own --registry"),
    ],
)
def test_a_wrong_command_line_is_said_before_a_model_is_loaded(
    registry: Path, options: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("federated.device.open_runtime", None, raising=False)
    with pytest.raises(ConfigError, match=said):
        ask("--registry", str(registry), *options)


@pytest.mark.parametrize("text", ["- a", "groups: {}", "users: [a]", "users: {ann: 3}", ": :"])
def test_a_wrong_routing_is_said(registry: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "routes.yaml").write_text(text)
    with pytest.raises(ConfigError):
        ask("--registry", str(registry), "--routes", str(tmp_path / "routes.yaml"))


def test_a_channel_without_a_version_is_said(registry: Path) -> None:
    with pytest.raises(VersionNotFound, match="canary"):
        ask("--registry", str(registry), "--channel", "canary")


def test_an_open_address_without_tokens_is_not_served(registry: Path) -> None:
    with pytest.raises(DeviceError, match="--allow-anonymous"):
        ask("--registry", str(registry), "--host", "0.0.0.0")  # noqa: S104 - that is the point


def test_without_the_extra_it_is_said_how_to_get_it() -> None:
    code = (
        "import sys\n"
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'prometheus_client' else find(name, *rest)\n"
        "import federated.device.serving\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'federated-peft[serve]'" in done.stderr


def test_the_room_needs_neither_torch_nor_a_database() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'sqlalchemy', 'transformers', 'peft'): sys.modules[name] = None\n"
        "import federated.device.serving\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
