"""An overview of a deployment, from folders as its processes write them."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from federated.deployment.device_records import Claim
from federated.deployment.devices import DeviceBook
from federated.deployment.keys import keys_of
from federated.deployment.layout import Layout
from federated.deployment.overview import Gatherer, traffic_key
from federated.deployment.overview_records import Overview
from federated.deployment.run_feed import OTHERS
from federated.deployment.server_config import ServerConfig
from federated.errors import DeploymentError
from federated.manifest import AdapterSpec, ModuleSpec, VersionManifest, sha256_hex
from federated.registry import Registry
from federated.tracking import JsonlTracker

NOW = 1_800_000_000.0
ACCOUNT = {"unit": "client", "epsilon": 1.5, "target_delta": 1e-5, "target_epsilon": 8.0, "private": True,
           "not_protected": ["metrics (losses, accuracies)"]}  # fmt: skip


class Deployment:
    """A folder of which each test writes what it is about."""

    def __init__(self, folder: Path, clock: Callable[[], Any]) -> None:
        self.layout = Layout(folder)
        self.layout.runs.mkdir()
        self.book_clock = clock
        self.gatherer = Gatherer(self.layout, ServerConfig(name="clinics"), clock=lambda: NOW)

    def look(self) -> Overview:
        return self.gatherer.overview()

    def run(self, name: str = "first", **given: Any) -> None:
        about = {"name": name, "overrides": [], "app": "/app", "app_digest": "ab", "flower_runs": ["1"],
                 "rounds_before": [0], "submitted": NOW - 100, "attempted": NOW - 100, **given}  # fmt: skip
        (self.layout.runs / f"{name}.json").write_text(json.dumps(about))

    def events(self, *events: dict[str, Any], run: str = "first") -> None:
        tracker = JsonlTracker(self.layout.runs / run / "metrics.jsonl", clock=lambda: NOW - 50)
        for event in events:
            tracker.emit(event)
        tracker.close()

    def enrol(self, name: str, *, approve: bool = True) -> str:
        """A device with keys of its own; its node key's line."""
        self.layout.folder.joinpath(name).mkdir()
        keys = keys_of(self.layout.folder / name)
        book = DeviceBook(self.layout.folder, clock=self.book_clock)
        invitation = book.invite(name, door="https://x", ca_sha256="0" * 64, valid=timedelta(hours=1),
                                 auto_approve=approve, actor="test")  # fmt: skip
        book.enrol(Claim(name, invitation.token_sha256, keys.node_line, keys.update_raw))
        return keys.node_line


@pytest.fixture
def deployment(tmp_path: Path, clock: Callable[[], Any]) -> Deployment:
    return Deployment(tmp_path, clock)


def begun(**given: Any) -> dict[str, Any]:
    return {"event": "run", "run_id": "tiny-ab", "method": "fedit + sgd", "rounds": 3, **given}


def asked(number: int, *cohort: str) -> dict[str, Any]:
    return {"event": "round_start", "round_number": number, "cohort": list(cohort)}


def client(number: int, name: str, reason: str | None = None, status: str = "refused") -> dict[str, Any]:
    return {"event": "client", "round_number": number, "client_id": name, "status": status if reason else "ok",
            "reason": reason, "message": "what the client said of its patients"}  # fmt: skip


def ended(number: int, **given: Any) -> dict[str, Any]:
    return {"event": "round", "round_number": number, "published": True, "version_id": "cd", "participants": 1,
            "cohort": 2, "seconds": 4.5, "bytes_up": 100, "bytes_down": 200, "train_loss": 0.5,
            "evaluation": {"loss": 0.7, "num_examples": 12}, **given}  # fmt: skip


def test_an_empty_deployment_has_an_overview(deployment: Deployment) -> None:
    view = deployment.look()
    assert (view.federation, view.up, view.secured, list(view.runs), list(view.devices)) == (
        "clinics", False, True, [], []
    )  # fmt: skip
    assert view.faults == ()
    assert json.loads(json.dumps(view.to_dict()))["format"] == 1


def test_a_round_under_way_says_who_has_answered(deployment: Deployment) -> None:
    deployment.run()
    deployment.events(begun(), asked(1, "a", "b"), client(1, "a"))
    (run,) = deployment.look().runs
    assert (run.state, run.current_round, run.answered, list(run.cohort)) == ("running", 1, 1, ["a", "b"])
    assert (run.rounds, run.rounds_done, run.method, run.last_round) == (3, 0, "fedit + sgd", None)


def test_events_are_read_once_as_they_come(deployment: Deployment) -> None:
    deployment.run()
    deployment.events(begun(), asked(1, "a"), client(1, "a"))
    deployment.look()
    path = deployment.layout.runs / "first" / "metrics.jsonl"
    with path.open("r+b") as file:  # what was read is not read again
        file.write(b"#")
    deployment.events(ended(1))
    (run,) = deployment.look().runs
    assert (run.rounds_done, run.current_round, deployment.look().devices[0].updates) == (1, 0, 1)
    assert deployment.look().faults == ()


def test_half_a_line_waits_for_its_rest(deployment: Deployment) -> None:
    deployment.run()
    deployment.events(begun())
    path = deployment.layout.runs / "first" / "metrics.jsonl"
    line = json.dumps(ended(1)).encode() + b"\n"
    with path.open("ab") as file:
        file.write(line[:40])
    assert deployment.look().runs[0].rounds_done == 0
    with path.open("ab") as file:
        file.write(line[40:])
    assert deployment.look().runs[0].rounds_done == 1


def test_a_file_that_was_cut_is_read_anew(deployment: Deployment) -> None:
    deployment.run()
    deployment.events(begun(), client(1, "a"), client(2, "a"))
    assert deployment.look().devices[0].updates == 2
    (deployment.layout.runs / "first" / "metrics.jsonl").write_text("")
    deployment.events(begun())
    assert list(deployment.look().devices) == []


def test_refusals_are_counted_by_code_and_client_and_carry_no_words(deployment: Deployment) -> None:
    deployment.run()
    deployment.events(begun(), client(1, "a", "too_large"), client(1, "b", "too_large"), client(2, "a", "late", "late"))
    view = deployment.look()
    assert view.runs[0].refusals == {"too_large": 2, "late": 1}
    assert view.runs[0].refusals_by_client == {"a": {"too_large": 1, "late": 1}, "b": {"too_large": 1}}
    assert {one.client_id: one.refusals for one in view.devices}["b"] == {"too_large": 1}
    assert "patients" not in json.dumps(view.to_dict())


def test_reasons_that_clients_make_up_are_bounded(deployment: Deployment) -> None:
    deployment.run()
    deployment.events(begun(), *(client(number, "a", f"made up {number}" * 9) for number in range(200)))
    run = deployment.look().runs[0]
    assert len(run.refusals) == 21
    assert run.refusals[OTHERS] == 180
    assert max(map(len, run.refusals)) <= 64
    assert len(run.refusals_by_client["a"]) == 21


def test_not_now_is_counted_and_is_no_refusal(deployment: Deployment) -> None:
    deployment.run()
    away = {"event": "not_now", "client_id": "a", "condition": "charging"}
    deployment.events(begun(), away, client(1, "a", "not_now", "not_now"), ended(1, not_now={"a": "idle"}))
    run = deployment.look().runs[0]
    assert (run.not_now, run.refusals) == ({"a": {"charging": 1, "idle": 1}}, {})


def test_what_was_spent_stands_with_its_unit(deployment: Deployment) -> None:
    deployment.run()
    deployment.events(begun(), ended(1, privacy={"accounts": [ACCOUNT]}))
    (account,) = deployment.look().runs[0].accounts
    assert (account.unit, account.epsilon, account.target_delta, account.target_epsilon) == ("client", 1.5, 1e-5, 8.0)
    assert deployment.look().runs[0].not_protected == ("metrics (losses, accuracies)",)


def test_an_epsilon_without_a_bound_is_none(deployment: Deployment) -> None:
    deployment.run()
    deployment.events(begun(), ended(1, privacy={"accounts": [{**ACCOUNT, "epsilon": float("inf")}]}))
    assert deployment.look().runs[0].accounts[0].epsilon is None


@pytest.mark.parametrize(
    ("given", "events", "state"),
    [
        ({}, [], "waiting"),
        ({}, [begun()], "running"),
        ({}, [begun(), {"event": "end", "status": "completed", "message": ""}], "completed"),
        ({}, [begun(), {"event": "end", "status": "failed", "message": "no room"}], "failed"),
        ({"stopped": True}, [begun()], "stopped"),
        ({"stopped": True}, [begun(), {"event": "end", "status": "completed", "message": ""}], "completed"),
        ({"gave_up": "5 attempts"}, [begun()], "gave up"),
        ({"attempted": NOW - 10}, [begun(), {"event": "end", "status": "failed", "message": "old"}], "waiting"),
    ],
)
def test_states_of_a_run(deployment: Deployment, given: dict[str, Any], events: list[Any], state: str) -> None:
    deployment.run(**given)
    deployment.events(*events)
    assert deployment.look().runs[0].state == state


def test_a_run_that_nobody_works_on_is_down(deployment: Deployment) -> None:
    deployment.run()
    deployment.events(begun())
    deployment.layout.supervisor_config.write_text("")  # kept by a manager that does not answer
    assert deployment.look().runs[0].state == "down"


def test_bytes_are_those_that_the_door_counted_for_the_devices_key(deployment: Deployment) -> None:
    line = deployment.enrol("north")
    flows = {
        traffic_key(line): {"up": 10, "down": 20, "requests": 3, "last": NOW - 5},
        "strangers": {"up": 1, "down": 2, "requests": 1, "last": NOW},
    }
    deployment.layout.traffic.write_text(json.dumps({"flows": flows, "refused": 7}))
    view = deployment.look()
    (north,) = view.devices
    assert (north.bytes_up, north.bytes_down, north.requests, north.last_seen) == (10, 20, 3, NOW - 5)
    assert (view.bytes_up, view.bytes_down, view.strange_requests, view.refused_at_door) == (11, 22, 1, 7)


def test_the_key_is_written_as_flower_writes_it(tmp_path: Path) -> None:
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    keys = keys_of(tmp_path)
    sent = public_key_to_bytes(keys.node.public_key())
    assert traffic_key(keys.node_line) == hashlib.sha256(sent).hexdigest()


def test_a_line_that_is_no_key_is_refused() -> None:
    with pytest.raises(DeploymentError, match="expected 'ecdsa"):
        traffic_key("ssh-rsa AAAA")


def test_devices_that_only_enrolled_are_there_with_their_state(deployment: Deployment) -> None:
    deployment.enrol("north")
    deployment.enrol("south", approve=False)
    view = deployment.look()
    assert [(one.client_id, one.state, one.last_seen) for one in view.devices] == [
        ("north", "approved", None), ("south", "pending", None)
    ]  # fmt: skip
    assert view.devices_by_state == {"approved": 1, "pending": 1}


def test_devices_and_runs_are_bounded_and_the_rest_is_counted(deployment: Deployment) -> None:
    deployment.run()
    deployment.events(begun(), *(client(1, f"c{number:05}") for number in range(1200)))
    for number in range(60):
        deployment.run(f"run-{number:02}", submitted=NOW - number)
    view = deployment.look()
    assert (len(view.devices), view.devices_left_out, len(view.runs), view.runs_left_out) == (1000, 200, 50, 11)
    assert [one.name for one in view.runs[:2]] == ["run-00", "run-01"]


@pytest.mark.parametrize("name", ["traffic.json", "first.json", "devices.db", "registry"])
def test_what_cannot_be_read_is_named_and_the_rest_is_shown(deployment: Deployment, name: str) -> None:
    deployment.run("second", submitted=NOW - 5)
    paths = {
        "traffic.json": deployment.layout.traffic,
        "first.json": deployment.layout.runs / "first.json",
        "devices.db": deployment.layout.devices_db,
        "registry": deployment.layout.registry / "registry.db",
    }
    paths[name].parent.mkdir(exist_ok=True)
    paths[name].write_text("{ this is not it")
    view = deployment.look()
    assert len(view.faults) == 1
    assert name.partition(".")[0].replace("devices", "book of devices") in view.faults[0]
    assert [run.name for run in view.runs] == ["second"]


def test_damaged_lines_are_counted_and_passed_over(deployment: Deployment) -> None:
    deployment.run()
    deployment.events(begun())
    with (deployment.layout.runs / "first" / "metrics.jsonl").open("ab") as file:
        file.write(b"{\n[1]\n")
    deployment.events(ended(1, participants="many", cohort=None, evaluation=[]))
    view = deployment.look()
    assert (view.runs[0].rounds_done, view.runs[0].last_round.participants) == (1, 0)
    assert "1 lines" in view.faults[0]


def publish(registry: Registry, number: int, channel: str | None = None) -> str:
    weights = f"weights {number}".encode()
    spec = AdapterSpec("lora", 2, 4.0, False, (ModuleSpec("layer", 4, 4, 2, 4.0),))
    manifest = VersionManifest(sha256_hex(weights), "b" * 64, spec, "fedit + sgd", "tiny-ab", number, participants=2)
    return registry.publish(manifest, weights, channel=channel)


def test_versions_and_channels_are_read_again_when_there_are_new_ones(deployment: Deployment) -> None:
    with Registry.open(deployment.layout.registry) as registry:
        first = publish(registry, 1, channel="dev")
        assert [one.name for one in deployment.look().versions] == ["tiny-ab:v1"]
        second = publish(registry, 2, channel="dev")
        view = deployment.look()
    assert [(one.version_id, tuple(one.channels)) for one in view.versions] == [(second, ("dev",)), (first, ())]
    assert [(one.name, one.version_id) for one in view.channels if one.version_id] == [("dev", second)]
    deployment.gatherer.close()


def test_a_socket_that_was_left_over_is_down_and_no_fault(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(deployment.layout.folder)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as left:
        left.bind("supervisor.sock")
    view = deployment.look()
    assert (view.up, view.processes, view.faults) == (False, [], ())
