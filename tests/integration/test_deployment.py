"""A secured federation on this machine, through the commands that a newcomer gives: real SuperLink, door, devices."""

import base64
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from federated.deployment.app_bundle import copied
from federated.deployment.layout import Layout
from federated.deployment.processes import Processes
from federated.deployment.server_config import read_server_config
from federated.registry import Registry
from federated.tracking import read_events

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
TINY = ("experiment=tiny", "train.steps=2", "round.deadline=240")
PATIENCE = 300.0


class Deployment:
    """A deployment's folder, and the commands on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.layout = Layout(folder)

    def fedpeft(self, *arguments: str, ok: bool = True) -> str:
        """One command; what it printed."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
        done = subprocess.run(
            [sys.executable, "-m", "federated.cli.main", *arguments, "--folder", str(self.folder)],
            env={**kept, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
            cwd=self.folder.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert (done.returncode == 0) is ok, done.stdout + done.stderr + self.logs()
        return done.stdout + done.stderr

    def logs(self) -> str:
        """The end of each process's log."""
        return "".join(f"\n== {path.name}\n{path.read_text()[-1500:]}" for path in self.layout.logs.glob("*.log"))

    def versions(self, name: str) -> list[int]:
        """Rounds of the versions that a run published, in order."""
        run_id = json.loads((self.layout.runs / name / "run.json").read_text())["run_id"]
        with Registry.open(self.layout.registry, create=False) as registry:
            return sorted(record.manifest.round_number for record in registry.versions(run_id))

    def events(self, name: str) -> list[dict[str, Any]]:
        """What a run wrote down."""
        path = self.layout.runs / name / "metrics.jsonl"
        return list(read_events(path)) if path.is_file() else []

    def until(self, what: str, found: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Wait for something."""
        end = time.monotonic() + seconds
        while not found():
            assert time.monotonic() < end, f"no {what} within {seconds:.0f} s {self.logs()}"
            time.sleep(0.2)

    def pid(self, name: str) -> int:
        """Of one of its processes."""
        return next(one.pid for one in Processes(self.layout).states() if one.name == name)

    def completed(self, name: str) -> bool:
        """Whether a run says that it is."""
        return any(event["event"] == "end" and event["status"] == "completed" for event in self.events(name))


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two devices, and a first run."""
    folder = tmp_path_factory.mktemp("deployment")
    deployment = Deployment(folder / "d")
    try:
        said = deployment.fedpeft("deploy", "up", "--nodes", "2", "--app", str(copied(ROOT, folder)), *TINY, "rounds=2")
        (folder / "said").write_text(said)
        yield deployment
    finally:
        deployment.fedpeft("deploy", "down")


@pytest.fixture(scope="module")
def first(deployment: Deployment) -> str:
    """Name of the first run."""
    return next(path.stem for path in sorted(deployment.layout.runs.glob("*.json")))


def test_the_first_run_is_shown_and_published(deployment: Deployment, first: str) -> None:
    said = (deployment.folder.parent / "said").read_text()
    assert "round 2/2: 2 of 2 clients" in said
    assert "completed" in said
    assert deployment.versions(first) == [0, 1, 2]
    assert "completed" in (deployment.layout.runs / first / "report.html").read_text(encoding="utf-8")


def test_status_names_processes_and_runs(deployment: Deployment, first: str) -> None:
    said = deployment.fedpeft("deploy", "status")
    for name in ("superlink", "serverapps", "door", "operator", "node-client-000"):
        assert re.search(rf"{name} .*RUNNING", said), said
    assert first in deployment.fedpeft("run", "status", first)


def test_devices_are_enrolled_each_with_keys_of_its_own(deployment: Deployment) -> None:
    devices = json.loads(deployment.layout.devices_file.read_text())["devices"]
    assert {one["state"] for one in devices.values()} == {"approved"}
    assert len({one["node_key"] for one in devices.values()} | {one["update_key"] for one in devices.values()}) == 4
    for name in devices:
        assert (deployment.layout.node(name).folder / "node.key").stat().st_mode & 0o077 == 0


def test_bytes_were_counted_at_the_door(deployment: Deployment) -> None:
    flows = json.loads(deployment.layout.traffic.read_text())["flows"]
    assert len([flow for flow in flows.values() if flow["up"] > 1000 and flow["down"] > 1000]) == 2


def _signed(key_file: Path) -> dict[str, str]:
    """The headers by which a SuperNode proves itself."""
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

    key: Any = load_ssh_private_key(key_file.read_bytes(), None)
    at = datetime.now(UTC).isoformat()
    return {
        "flwr-public-key": base64.b64encode(public_key_to_bytes(key.public_key())).decode(),
        "flwr-timestamp": at,
        "timestamp": at,
        "flwr-signature": base64.b64encode(sign_message(key, at.encode())).decode(),
        "content-type": "application/protobuf",
    }


@pytest.mark.parametrize(
    "path",
    ["/v1/control/list-runs", "/v1/control/start-run", "/v1/runtime/acquire-task", "/v1/fleet/../control/list-runs"],
)
def test_no_device_reaches_the_control_interface(deployment: Deployment, path: str) -> None:
    node = deployment.layout.node("client-000").folder
    headers = _signed(node / "node.key")
    with httpx.Client(verify=ssl.create_default_context(cafile=str(node / "ca.crt")), headers=headers) as client:
        url = read_server_config(deployment.folder).url
        answer = client.post(httpx.URL(url).copy_with(raw_path=path.encode()), content=b"")
        assert answer.status_code == 404, answer.text
        assert client.post(f"{url}/v1/fleet/send-node-heartbeat", content=b"").status_code != 404


def test_the_control_interface_would_answer_who_reached_it(deployment: Deployment) -> None:
    """The test above can fail: past the door, no credential is asked for."""
    config = read_server_config(deployment.folder)
    with httpx.Client(verify=ssl.create_default_context(cafile=str(deployment.layout.ca))) as client:
        answer = client.post(
            f"https://127.0.0.1:{config.superlink_port}/v1/control/list-runs",
            content=b"",
            headers={"content-type": "application/protobuf"},
        )
    assert answer.status_code == 200


def test_a_stranger_is_not_let_in(deployment: Deployment, tmp_path: Path) -> None:
    from federated.deployment.keys import keys_of

    keys_of(tmp_path)
    config = read_server_config(deployment.folder)
    command = [str(Path(sys.executable).with_name("flower-supernode")), "--superlink", f"127.0.0.1:{config.door_port}"]
    command += ["--root-certificates", str(deployment.layout.ca), "--auth-supernode-private-key"]
    environment = {**os.environ, "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run(
        [*command, str(tmp_path / "node.key"), "--port", "0", "--max-retries", "1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0


def _submit(deployment: Deployment, name: str, *overrides: str, nodes: int = 2) -> None:
    wait = (f"selection.min_clients={nodes}", "selection.wait=240")
    deployment.fedpeft("run", "submit", *TINY, *wait, *overrides, "--name", name)


@pytest.mark.parametrize(
    ("run", "names", "whole"),
    [("killed", ("serverapps", "superlink"), True), ("executor-killed", ("serverapps",), False)],
)
def test_a_run_goes_on_after_its_server_was_killed(
    deployment: Deployment, run: str, names: tuple[str, ...], *, whole: bool
) -> None:
    """The executor alone: its ServerApp is told to end then, which is no end of the run."""
    _submit(deployment, run, "rounds=6")
    deployment.until("round 2", lambda: any(e["event"] == "round" for e in deployment.events(run)))
    for name in names:
        pid = deployment.pid(name)
        if pid:
            (os.killpg if whole else os.kill)(os.getpgid(pid) if whole else pid, signal.SIGKILL)
    deployment.until("end of the run", lambda: deployment.completed(run))
    assert deployment.versions(run) == list(range(7))
    assert len(json.loads((deployment.layout.runs / f"{run}.json").read_text())["flower_runs"]) > 1


def test_a_killed_process_manager_leaves_nothing_behind_and_up_goes_on(deployment: Deployment) -> None:
    _submit(deployment, "unmanaged", "rounds=6")
    deployment.until("round 1", lambda: any(e["event"] == "round" for e in deployment.events("unmanaged")))
    manager = int((deployment.folder / "supervisord.pid").read_text())
    left = [one.pid for one in Processes(deployment.layout).states() if one.pid]
    os.kill(manager, signal.SIGKILL)
    deployment.until("end of what it had started", lambda: not any(map(_alive, left)), 60)
    deployment.fedpeft("deploy", "up")
    deployment.until("end of the run", lambda: deployment.completed("unmanaged"))
    assert deployment.versions("unmanaged") == list(range(7))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_a_stopped_run_stays_stopped_until_it_is_resumed(deployment: Deployment) -> None:
    _submit(deployment, "stopped", "rounds=4")
    deployment.until("round 1", lambda: any(e["event"] == "round" for e in deployment.events("stopped")))
    deployment.fedpeft("run", "stop", "stopped")
    deployment.until("stop", lambda: "stopped" in deployment.fedpeft("run", "status", "stopped").split("Flower")[1])
    done = deployment.versions("stopped")
    deployment.fedpeft("run", "resume", "stopped", "--wait")
    assert deployment.versions("stopped") == [0, 1, 2, 3, 4]
    assert len(done) < 5


def test_an_app_that_a_device_has_not_pinned_does_not_run_there(deployment: Deployment) -> None:
    path = deployment.layout.node("client-001").config
    before = yaml.safe_load(path.read_text())
    changed = {"training": {**before["training"], "apps": ["0" * 64]}}
    try:
        path.write_text(yaml.safe_dump(changed))
        os.kill(deployment.pid("node-client-001"), signal.SIGTERM)  # it is started again
        _submit(deployment, "pinned", "rounds=1", nodes=1)
        deployment.until("end of the run", lambda: deployment.completed("pinned"))
        problems = [event for event in deployment.events("pinned") if event["event"] == "node_problem"]
        assert any("app_not_pinned" in event["message"] for event in problems), deployment.events("pinned")
    finally:
        path.write_text(yaml.safe_dump(before))
        os.kill(deployment.pid("node-client-001"), signal.SIGTERM)  # it is started again


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("run", "submit", "experiment=nothing"), "no such choice"),
        (("run", "submit", "experiment=tiny", "run_dir=x"), "a deployment sets"),
        (("run", "submit", "experiment=tiny", "--name", "../x"), "expected up to 63 letters"),
        (("run", "status", "no-such-run"), "no run no-such-run"),
        (("run", "resume", "no-such-run"), "no run no-such-run"),
        (("deploy", "init"), "holds a deployment already"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(deployment: Deployment, arguments: tuple[str, ...], expected: str) -> None:
    assert expected in deployment.fedpeft(*arguments, ok=False)
