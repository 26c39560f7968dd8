"""Enrolment decides which SuperNodes a real SuperLink lets in: TLS, node authentication, Flower's own processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from federated.deployment.certificates import make_ca, make_server_certificate
from federated.deployment.devices import Claim, DeviceBook
from federated.deployment.keys import keys_of
from federated.deployment.nodes import FlowerLink, live_nodes, register_node, sync_nodes, unregister_node
from federated.errors import DeploymentError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BIN = Path(sys.executable).parent
PATIENCE = 120  # seconds, for a busy machine
OFF_SWITCHES = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
}


def now() -> datetime:
    return datetime.now(UTC)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A server's folder with a SuperLink that authenticates nodes."""

    folder: Path
    port: int

    @property
    def link(self) -> FlowerLink:
        return FlowerLink(self.folder / "flwr")

    @property
    def book(self) -> DeviceBook:
        return DeviceBook(self.folder, clock=now)

    @contextmanager
    def process(self, log: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
        """One of Flower's servers at work; with all that it started, gone at the end."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        environment = inherited | OFF_SWITCHES | {"FLWR_HOME": str(self.folder / "flwr"), "PATH": path}
        with log.open("wb") as file:
            process = subprocess.Popen(
                [BIN / command[0], *command[1:]],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                if process.poll() is None:
                    os.killpg(process.pid, number)
                    try:
                        process.wait(30)
                    except subprocess.TimeoutExpired:
                        continue

    @contextmanager
    def superlink(self) -> Iterator[None]:
        tls = self.folder / "tls"
        command = ["flower-superlink", "--host", "127.0.0.1", "--port", str(self.port), "--enable-supernode-auth"]
        certificates = ["--ssl-ca-certfile", tls / "ca.crt", "--ssl-certfile", tls / "server.crt"]
        keys = ["--ssl-keyfile", tls / "server.key", "--database", self.folder / "superlink.db"]
        with self.process(self.folder / "superlink.log", *command, *map(str, [*certificates, *keys])) as process:
            until = time.monotonic() + PATIENCE
            while True:
                assert process.poll() is None, (self.folder / "superlink.log").read_text()
                assert time.monotonic() < until
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                        break
                time.sleep(0.2)
            yield

    @contextmanager
    def supernode(self, device: Path) -> Iterator[subprocess.Popen[bytes]]:
        command = ["flower-supernode", "--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port())]
        command += ["--root-certificates", str(self.folder / "tls" / "ca.crt")]
        command += ["--auth-supernode-private-key", str(device / "node.key")]
        with self.process(device / "supernode.log", *command) as process:
            yield process

    def end_leftovers(self) -> None:
        """End what Flower's servers started and left: known by the home folder that only we gave out."""
        mark = f"FLWR_HOME={self.folder / 'flwr'}\0".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes():
                    os.kill(int(path.parent.name), signal.SIGKILL)
            except OSError:
                continue  # it ended while we looked, or is somebody else's

    def log_of(self, device: Path) -> str:
        return re.sub(r"\x1b\[[0-9;]*m", "", (device / "supernode.log").read_text())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A SuperLink with TLS from our authority."""
    folder = tmp_path_factory.mktemp("server")
    ca = make_ca(folder / "tls", name="tests", clock=now)
    make_server_certificate(folder / "tls", ca, hosts=["localhost", "127.0.0.1"], clock=now)
    server = Server(folder, free_port())
    (folder / "flwr").mkdir()
    (folder / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "deployment"\n[superlink.deployment]\naddress = "127.0.0.1:{server.port}"\n'
        f'root-certificates = "{folder / "tls" / "ca.crt"}"\n'
    )
    try:
        with server.superlink():
            yield server
    finally:
        server.end_leftovers()


def enrolled(server: Server, name: str, device: Path) -> None:
    """As the door does it; the door itself is tested elsewhere."""
    made = server.book.invite(
        name, door="https://a", ca_sha256="ab" * 32, valid=timedelta(hours=1), auto_approve=False, actor="ada"
    )
    keys = keys_of(device)
    server.book.enrol(Claim(name, made.token_sha256, keys.node_line, keys.update_raw))


def status_of(server: Server, device_name: str) -> str:
    """What Flower says of a device's node."""
    node_id = next(one.node_id for one in server.book.devices() if one.client_id == device_name and one.node_id)
    listed = server.link.record("supernode", "list", server.link.connection)["nodes"]
    return next(str(one["status"]) for one in listed if str(one["node-id"]) == node_id)


def ended(process: subprocess.Popen[bytes]) -> int:
    return process.wait(PATIENCE)


def test_an_enrolled_device_connects_until_it_is_revoked(server: Server, tmp_path: Path) -> None:
    north = tmp_path / "north"
    enrolled(server, "north", north)
    assert sync_nodes(server.book, server.link, actor="ada").registered == ()
    server.book.approve("north", actor="ada")
    assert sync_nodes(server.book, server.link, actor="ada").registered == ("north",)
    with server.supernode(north) as node:
        until = time.monotonic() + PATIENCE
        while status_of(server, "north") != "online":
            assert node.poll() is None, server.log_of(north)
            assert time.monotonic() < until, server.log_of(north)
            time.sleep(0.5)
        server.book.revoke("north", actor="ada", reason="stolen")
        assert sync_nodes(server.book, server.link, actor="ada").unregistered == ("north",)
        assert live_nodes(server.link) == set()
        ended(node)  # by itself, at its next request, with exit code 0
    with server.supernode(north) as again:
        assert ended(again) != 0
    assert "2004" in server.log_of(north)


def test_a_key_that_nobody_enrolled_is_refused(server: Server, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    keys_of(stranger)
    with server.supernode(stranger) as node:
        assert ended(node) != 0
    assert "2004" in server.log_of(stranger)


def test_flower_takes_a_key_once(server: Server, tmp_path: Path) -> None:
    """What the book relies on: a key that was registered elsewhere, or before, is refused and not taken for ours."""
    keys_of(tmp_path / "east")
    node_id = register_node(server.link, tmp_path / "east" / "node.key.pub", name="by hand")
    unregister_node(server.link, node_id)
    enrolled(server, "east", tmp_path / "east")
    server.book.approve("east", actor="ada")
    with pytest.raises(DeploymentError, match="has or had the key of east"):
        sync_nodes(server.book, server.link, actor="ada")
    server.book.revoke("east", actor="ada", reason="test")
    assert sync_nodes(server.book, server.link, actor="ada").registered == ()
