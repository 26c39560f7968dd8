"""A real Flower deployment on loopback: SuperLink, SuperNodes and `flwr run`, as an operator starts them."""

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from federated.cli.apps import load_client_app
from federated.cli.compose import compose
from federated.flower import simulate
from federated.registry import Registry
from federated.tracking import read_events

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
OFF_SWITCHES = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
}
EXPERIMENT = ("experiment=tiny", "train.steps=2", "tracking.progress=false")
PACE = ("round.poll_interval=0.5", "round.deadline=240", "selection.wait=240")
PATIENCE = 400  # seconds, for a busy machine


@dataclass(frozen=True)
class Finished:
    """What `flwr ls` says of a run, its log, and where it wrote."""

    status: str
    log: str
    run_dir: Path
    registry: Path

    def digests(self) -> dict[int, str]:
        """Round number to digest of the published weights."""
        with Registry.open(self.registry, create=False) as registry:
            manifests = [record.manifest for record in registry.versions()]
        return {manifest.round_number: manifest.weights_digest for manifest in manifests}


class Deployment:
    """A SuperLink on a free port of loopback, and what it takes to talk to it."""

    def __init__(self, folder: Path, *, tls: bool = False) -> None:
        self.folder = folder
        self.link_flags, self.node_flags, trust = ["--insecure"], ["--insecure"], "insecure = true"
        if tls:
            certificate, key = _certificate(folder)
            self.link_flags = ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
            self.link_flags += ["--ssl-ca-certfile", str(certificate), "--enable-supernode-auth"]
            self.node_flags = ["--root-certificates", str(certificate)]
            trust = f'root-certificates = "{certificate}"'
        self.app = folder / "federated-peft"
        self.address = f"127.0.0.1:{_free_port()}"
        home = folder / "home"
        home.mkdir()
        connection = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{self.address}"\n{trust}\n'
        (home / "config.toml").write_text(connection)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FEDPEFT_", "FLWR_"))}
        self.environment = {
            **inherited,
            **OFF_SWITCHES,
            "FLWR_HOME": str(home),
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
            "FEDPEFT_CLIENT_STORE": str(folder / "clients"),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "COLUMNS": "200",
        }

    @contextmanager
    def process(self, name: str, *command: str) -> Iterator[subprocess.Popen[bytes]]:
        """A server at work; ended on leaving, gently first."""
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [BIN / command[0], *command[1:]],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @contextmanager
    def superlink(self) -> Iterator[None]:
        """The SuperLink, until everything that was started here is gone."""
        host, port = self.address.split(":")
        try:
            with self.process(
                "superlink", "flower-superlink", *self.link_flags, "--host", host, "--port", port
            ) as link:
                _wait_for_port(int(port), link)
                yield
        finally:
            self._end_leftovers()

    @contextmanager
    def supernode(self, name: str, node_config: str, *more: str) -> Iterator[None]:
        """One SuperNode."""
        command = ["flower-supernode", *self.node_flags, "--superlink", self.address, "--port", str(_free_port())]
        with self.process(name, *command, "--node-config", node_config, *more):
            yield

    def run(self, name: str, *overrides: str) -> Finished:
        """`flwr run`, to its end. Its exit code does not say whether the run succeeded: `flwr ls` does."""
        run_dir, registry = self.folder / name, self.folder / f"{name}-registry"
        texts = [*EXPERIMENT, *PACE, f"run_dir={run_dir}", f"registry={registry}", *overrides]
        config = f"overrides={json.dumps(' '.join(texts))}"
        log = self._flwr("run", str(self.app), "here", "--run-config", config, "--stream")
        found = re.search(r"started run (\d+)", log)
        assert found, log
        listed = self._flwr("ls", "here", "--run-id", found[1], "--format", "json")
        record: dict[str, Any] = json.loads(listed[listed.index("{") :])
        return Finished(record["runs"][0]["status"], log, run_dir, registry)

    def register(self, public_key: Path) -> None:
        """Let a SuperNode with that key connect."""
        self._flwr("supernode", "register", str(public_key), "here")

    def _flwr(self, *arguments: str) -> str:
        done = subprocess.run(
            [BIN / "flwr", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _end_leftovers(self) -> None:
        """End what Flower's servers started and left: known by the home folder that only we gave out."""
        mark = f"FLWR_HOME={self.folder / 'home'}\0".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes():
                    os.kill(int(path.parent.name), signal.SIGKILL)
            except OSError:
                continue  # it ended while we looked, or is somebody else's


def _certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for loopback, signed by itself, and its key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "here")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, SHA256())
    )
    (folder / "here.crt").write_bytes(made.public_bytes(Encoding.PEM))
    (folder / "here.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return folder / "here.crt", folder / "here.key"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    pytest.fail(f"nothing listens on port {port}; exit code {process.poll()}")


def _copy_app(folder: Path) -> None:
    for name in ("clients", "conf", "strategies"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)


def _in_process(folder: Path, *overrides: str) -> str:
    """Digest of the last weights of the same experiment on the in-process engine."""
    config = replace(compose(ROOT, [*EXPERIMENT, *overrides]), run_dir=str(folder / "in-process"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPEFT_CLIENT_STORE", str(folder))  # the run sets its own: put back what was there
        return simulate(config, load_client_app(ROOT)).weights_digest


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A SuperLink that runs a copy of the app."""
    deployment = Deployment(tmp_path_factory.mktemp("deployment"))
    _copy_app(deployment.app)
    with deployment.superlink():
        yield deployment


PARTITIONS = ("rounds=2", "data.partition.num_clients=2")


def _of_partitions(deployment: Deployment, name: str, *overrides: str) -> Finished:
    """A run of two SuperNodes, each with a partition of the experiment's data."""
    with ExitStack() as nodes:
        for index in range(2):
            config = f"partition-id={index} num-partitions=2"
            nodes.enter_context(deployment.supernode(f"{name}-{index}", config))
        return deployment.run(name, *PARTITIONS, "selection.min_clients=2", *overrides)


@pytest.fixture(scope="module")
def partitions(deployment: Deployment) -> Finished:
    """Synchronous rounds."""
    return _of_partitions(deployment, "partitions")


@pytest.fixture(scope="module")
def buffered(deployment: Deployment) -> Finished:
    """Buffered rounds that take everybody."""
    return _of_partitions(deployment, "buffered", "round.mode=buffered", "round.buffer=2", "round.concurrency=2")


def test_run_completes(partitions: Finished) -> None:
    assert partitions.status == "finished:completed", partitions.log


def test_each_round_is_published(partitions: Finished) -> None:
    assert sorted(partitions.digests()) == [0, 1, 2]


def test_run_folder_has_a_report(partitions: Finished) -> None:
    assert "completed" in (partitions.run_dir / "report.html").read_text(encoding="utf-8")


def test_last_weights_are_those_of_the_in_process_engine(partitions: Finished, tmp_path: Path) -> None:
    assert partitions.digests()[2] == _in_process(tmp_path, *PARTITIONS)


def test_buffered_rounds_of_everybody_give_the_same_weights(buffered: Finished, tmp_path: Path) -> None:
    assert buffered.status == "finished:completed", buffered.log
    assert buffered.digests()[2] == _in_process(tmp_path, *PARTITIONS)


@pytest.fixture(scope="module")
def clinic(deployment: Deployment) -> Path:
    """A data owner's folder: its examples, its settings, and later what its client remembers."""
    folder = deployment.folder / "clinic"
    (folder / "data").mkdir(parents=True)
    rows = [f'"{word} number {index}",{word}' for index in range(10) for word in ("negative", "positive")]
    (folder / "data" / "north.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    settings = {
        "client_id": "north",
        "store": str(folder / "store"),
        "data": {"name": "files", "path": str(folder / "data")},
        "model": {"source": "tiny:bert"},
    }
    (folder / "client.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def own_data(deployment: Deployment, clinic: Path) -> Finished:
    """One SuperNode with data and a name of its own; the experiment names other data."""
    with deployment.supernode("clinic", f'client-config="{clinic / "client.yaml"}"'):
        return deployment.run("own-data", "rounds=1")


def test_run_with_own_data_completes(own_data: Finished) -> None:
    assert own_data.status == "finished:completed", own_data.log


def test_client_takes_part_under_its_own_name(own_data: Finished) -> None:
    events = read_events(own_data.run_dir / "metrics.jsonl")
    assert [event["cohort"] for event in events if event["event"] == "round_start"] == [["north"]]


def test_own_data_give_what_they_give_in_a_simulation(own_data: Finished, clinic: Path, tmp_path: Path) -> None:
    simulated = _in_process(tmp_path, "rounds=1", "data=files", f"data.path={clinic / 'data'}")
    assert own_data.digests()[1] == simulated


def test_client_remembers_in_its_own_store(own_data: Finished, clinic: Path) -> None:
    assert [path.name for path in (clinic / "store").rglob("counter.json")] == ["counter.json"]


class Device:
    """A data owner's folder with two keys: of the node, and of its updates."""

    def __init__(self, folder: Path, name: str, *, signs: bool = True) -> None:
        folder.mkdir(parents=True)
        self.folder, self.name = folder, name
        self.node, self.update = ec.generate_private_key(ec.SECP384R1()), Ed25519PrivateKey.generate()
        (folder / "data").mkdir()
        rows = [f'"{word} number {index}",{word}' for index in range(10) for word in ("negative", "positive")]
        (folder / "data" / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
        settings: dict[str, Any] = {
            "client_id": name,
            "store": str(folder / "store"),
            "data": {"name": "files", "path": str(folder / "data")},
            "model": {"source": "tiny:bert"},
        }
        settings |= {"signing_key": "update.pem"} if signs else {}
        (folder / "client.yaml").write_text(yaml.safe_dump(settings))
        for key, path, form in (
            (self.node, folder / "node", PrivateFormat.OpenSSH),
            (self.update, folder / "update.pem", PrivateFormat.PKCS8),
        ):
            path.write_bytes(key.private_bytes(Encoding.PEM, form, NoEncryption()))
            path.chmod(0o600)
        public = self.node.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        (folder / "node.pub").write_bytes(public)

    @property
    def entry(self) -> dict[str, str]:
        """What the operator's file says of it."""
        node_key = (self.folder / "node.pub").read_text()
        update_key = base64.b64encode(self.update.public_key().public_bytes_raw()).decode()
        return {"state": "approved", "node_key": node_key, "update_key": update_key}

    @property
    def flags(self) -> tuple[str, ...]:
        """Of its SuperNode."""
        node_config = f'client-config="{self.folder / "client.yaml"}"'
        return node_config, "--auth-supernode-private-key", str(self.folder / "node")


@pytest.fixture(scope="module")
def enrolled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """Four nodes: one as it should be, one that does not sign, one that nobody enrolled, one under another's name.

    With TLS, without which Flower authenticates no node; it lets all four connect.
    """
    deployment = Deployment(tmp_path_factory.mktemp("secured"), tls=True)
    _copy_app(deployment.app)
    place = deployment.folder / "devices"
    good, unsigned = Device(place / "good", "north"), Device(place / "unsigned", "south", signs=False)
    stranger, thief = Device(place / "stranger", "north"), Device(place / "thief", "north")
    entries = {"north": good.entry, "south": unsigned.entry, "west": thief.entry}
    (place / "devices.json").write_text(json.dumps({"format": 1, "devices": entries}))
    with deployment.superlink(), ExitStack() as nodes:
        for number, device in enumerate((thief, stranger, good, unsigned)):
            deployment.register(device.folder / "node.pub")
            nodes.enter_context(deployment.supernode(f"device-{number}", *device.flags))
        policy = ("rounds=1", "selection.min_clients=2", f"admission.devices={place / 'devices.json'}")
        yield deployment.run("enrolled", *policy)


def test_enrolled_devices_take_part_under_their_own_names(enrolled: Finished) -> None:
    assert enrolled.status == "finished:completed", enrolled.log
    (start,) = [e for e in read_events(enrolled.run_dir / "metrics.jsonl") if e["event"] == "round_start"]
    assert start["cohort"] == ["north", "south"]


def test_a_signed_update_is_taken_and_an_unsigned_one_is_not(enrolled: Finished) -> None:
    events = [e for e in read_events(enrolled.run_dir / "metrics.jsonl") if e["event"] == "client"]
    assert {e["client_id"]: (e["status"], e["reason"]) for e in events} == {
        "north": ("ok", None),
        "south": ("refused", "unsigned"),
    }


def test_nodes_under_a_name_that_is_not_theirs_are_named_and_left_out(enrolled: Finished) -> None:
    events = [e for e in read_events(enrolled.run_dir / "metrics.jsonl") if e["event"] == "node_problem"]
    assert sorted(e["reason"] for e in events) == ["unknown_client", "wrong_key"]
