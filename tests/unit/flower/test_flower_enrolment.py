"""Enrolled devices take part under their own names, and nobody else does: keys of nodes, and signatures of updates."""

import base64
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from federated.errors import ConfigError, NotEnoughUpdates
from federated.flower import InProcessGrid
from federated.flower.directory import Directory
from federated.flower.enrolled_nodes import NODE_REASONS
from federated.flower.node_keys import fingerprint, node_keys, openssh_line
from federated.flower.records import assignment_of, reply_content
from federated.flower.run import Run
from federated.flower.stoppable import StoppableGrid
from federated.tracking import MemoryTracker

Make = Callable[..., Any]
PAGE = Path(__file__).resolve().parents[3] / "docs" / "admission.md"
NAMES = ("client-000", "client-001", "client-002")
NODE_KEYS = [ec.generate_private_key(ec.SECP384R1()).public_key() for _ in range(4)]
UPDATE_KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in range(4)]


def line(number: int) -> str:
    """A node's key as ``devices.json`` has it."""
    return NODE_KEYS[number].public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def entry(number: int, **changes: Any) -> dict[str, Any]:
    update_key = base64.b64encode(UPDATE_KEYS[number].public_key().public_bytes_raw()).decode()
    return {"state": "approved", "node_key": f"{line(number)} device", "update_key": update_key, **changes}


def enrolled(**changes: Any) -> dict[str, Any]:
    """The three clients, each with its own keys; by name with underscores what is changed."""
    devices = {name: entry(number) for number, name in enumerate(NAMES)}
    for name, change in changes.items():
        devices[name.replace("_", "-")].update(change)
    return devices


class KeyedGrid(InProcessGrid):
    """Nodes 1 to n with the keys of a deployment: what the SuperLink knows of them, in the form in which Flower has it.

    It counts whom it asked for a name.
    """

    keyless = False
    keys: Mapping[int, bytes] = {number + 1: public_key_to_bytes(key) for number, key in enumerate(NODE_KEYS)}

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=node, public_key=self.keys.get(node, b"")) for node in self.get_node_ids()]

    def push_messages(self, messages: Any) -> Any:
        sent = list(messages)
        self.asked = [
            *getattr(self, "asked", []),
            *(m.metadata.dst_node_id for m in sent if m.metadata.message_type == "query"),
        ]
        return super().push_messages(sent)


def claiming(*names: str) -> ClientApp:
    """Nodes that claim these names, in order."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(reply_content(names[int(str(context.node_config["partition-id"]))], "", {}), reply_to=message)

    return app


class Devices:
    """A file of enrolled devices."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "devices.json"
        self.write(enrolled())

    def write(self, devices: Mapping[str, Any]) -> None:
        self.path.write_text(json.dumps({"format": 1, "devices": devices}))


@pytest.fixture
def devices(tmp_path: Path) -> Devices:
    return Devices(tmp_path)


@pytest.fixture
def directory(config: Make, devices: Devices) -> Directory:
    return Directory(config(admission={"devices": str(devices.path)}, selection={"wait": 5.0}))


def codes(directory: Directory) -> list[tuple[int, str]]:
    found = [(problem.node, problem.reason) for problem in directory.problems]
    assert {reason for _, reason in found} <= NODE_REASONS.keys()
    return found


class TestNodes:
    def test_enrolled_nodes_are_asked_for_their_names(self, directory: Directory):
        with KeyedGrid(claiming(*NAMES), 3) as grid:
            directory.refresh(grid)
        assert directory.nodes == {"client-000": 1, "client-001": 2, "client-002": 3}
        assert codes(directory) == []

    def test_a_node_that_claims_another_ones_name(self, directory: Directory):
        with KeyedGrid(claiming("client-000", "client-002", "client-002"), 3) as grid:
            directory.refresh(grid)
        assert directory.nodes == {"client-000": 1, "client-002": 3}
        assert codes(directory) == [(2, "wrong_key")]

    def test_its_name_and_the_one_that_it_claims_are_said(self, directory: Directory):
        with KeyedGrid(claiming("client-001"), 1) as grid:
            directory.refresh(grid)
        (problem,) = directory.problems
        assert "'client-001' is enrolled with another node key" in problem.text
        assert "enrolled as 'client-000'" in problem.text

    def test_a_node_that_nobody_enrolled_is_not_even_asked(self, directory: Directory):
        with KeyedGrid(claiming(*NAMES, "client-000"), 4) as grid:
            directory.refresh(grid)
            assert grid.asked == [1, 2, 3]
        assert codes(directory) == [(4, "unknown_client")]

    def test_it_is_named_by_the_fingerprint_of_its_key(self, directory: Directory):
        with KeyedGrid(claiming(*NAMES, "client-000"), 4) as grid:
            directory.refresh(grid)
        assert fingerprint(line(3)) in directory.problems[0].text

    def test_an_enrolled_node_that_gives_a_name_that_nobody_has(self, directory: Directory):
        with KeyedGrid(claiming("../../root"), 1) as grid:
            directory.refresh(grid)
        assert (directory.nodes, codes(directory)) == ({}, [(1, "unknown_client")])

    @pytest.mark.parametrize(
        ("state", "reason"), [("revoked", "revoked"), ("pending", "unknown_client"), ("x", "unknown_client")]
    )
    def test_who_is_not_approved_stays_out_and_is_not_asked(
        self, devices: Devices, directory: Directory, state: str, reason: str
    ):
        devices.write(enrolled(client_001={"state": state}))
        with KeyedGrid(claiming(*NAMES), 3) as grid:
            directory.refresh(grid)
            assert grid.asked == [1, 3]
        assert codes(directory) == [(2, reason)]

    @pytest.mark.parametrize("key", [b"", b"\x01" * 32, b"-----BEGIN PUBLIC KEY-----\n"], ids=["none", "random", "cut"])
    def test_a_node_without_a_usable_key_stays_out(self, directory: Directory, key: bytes):
        with KeyedGrid(claiming(*NAMES), 3) as grid:
            grid.keys = {**grid.keys, 2: key}
            directory.refresh(grid)
        assert sorted(directory.nodes) == ["client-000", "client-002"]
        assert codes(directory) == [(2, "unknown_client")]

    def test_a_device_that_waits_for_approval_has_no_use_for_an_empty_key(self, devices: Devices, directory: Directory):
        devices.write({**enrolled(), "new": {"state": "pending", "node_key": ""}})
        with KeyedGrid(claiming(*NAMES), 3) as grid:
            grid.keys = {**grid.keys, 2: b""}
            directory.refresh(grid)
        assert "is not enrolled" in directory.problems[0].text

    def test_what_is_revoked_takes_no_part_from_the_next_look_on(self, devices: Devices, directory: Directory):
        with KeyedGrid(claiming(*NAMES), 3) as grid:
            directory.refresh(grid)
            devices.write(enrolled(client_001={"state": "revoked"}))
            directory.refresh(grid)
        assert sorted(directory.nodes) == ["client-000", "client-002"]
        assert codes(directory) == [(2, "revoked")]
        assert not directory.allows("client-001")

    def test_who_is_enrolled_anew_with_other_keys_is_out_with_the_old_ones(
        self, devices: Devices, directory: Directory
    ):
        with KeyedGrid(claiming(*NAMES), 3) as grid:
            directory.refresh(grid)
            devices.write(enrolled(client_001={"node_key": line(3)}))
            directory.refresh(grid)
        assert sorted(directory.nodes) == ["client-000", "client-002"]
        assert codes(directory)[0] == (2, "wrong_key")

    def test_who_is_approved_is_asked_at_the_next_look(self, devices: Devices, directory: Directory):
        devices.write(enrolled(client_001={"state": "pending"}))
        with KeyedGrid(claiming(*NAMES), 3) as grid:
            for _ in range(5):
                directory.refresh(grid)
            devices.write(enrolled())
            directory.refresh(grid)
        assert sorted(directory.nodes) == list(NAMES)

    def test_a_wrong_name_is_asked_again_as_soon_as_the_file_changes(self, devices: Devices, directory: Directory):
        with KeyedGrid(claiming("client-001"), 1) as grid:
            for _ in range(4):
                directory.refresh(grid)
            asked = len(grid.asked)
            devices.write({"client-001": entry(0)})
            directory.refresh(grid)
            assert len(grid.asked) == asked + 1
        assert directory.nodes == {"client-001": 1}

    def test_who_stays_out_for_the_same_reason_is_named_once(self, devices: Devices, directory: Directory):
        devices.write(enrolled(client_001={"state": "revoked"}))
        with KeyedGrid(claiming(*NAMES, "x"), 4) as grid:
            for _ in range(3):
                directory.refresh(grid)
            assert codes(directory) == [(2, "revoked"), (4, "unknown_client")]
            directory.problems.clear()
            devices.write(enrolled(client_001={"state": "pending"}))
            directory.refresh(grid)
        assert codes(directory) == [(2, "unknown_client")]

    def test_a_file_that_is_gone_lets_nobody_in(self, devices: Devices, directory: Directory):
        with KeyedGrid(claiming(*NAMES), 3) as grid:
            directory.refresh(grid)
            devices.path.unlink()
            with pytest.raises(ConfigError, match=r"admission\.devices = .*No such file"):
                directory.refresh(grid)

    def test_without_a_file_keys_do_not_matter(self, config: Make):
        directory = Directory(config())
        with KeyedGrid(claiming("client-002", "x", "y"), 3) as grid:
            grid.keys = {}
            directory.refresh(grid)
        assert sorted(directory.nodes) == ["client-002", "x", "y"]
        assert directory.update_key("x") is None
        assert directory.allows("x")

    def test_too_few_enrolled_clients_end_the_wait_with_the_causes(self, config: Make, devices: Devices):
        policy = {"min_clients": 1, "wait": 0.05}
        directory = Directory(config(admission={"devices": str(devices.path)}, selection=policy))
        with (
            KeyedGrid(claiming(*NAMES), 3) as grid,
            pytest.raises(
                NotEnoughUpdates, match=r"0 clients answered.*node 1: the node key SHA256:.* is not enrolled"
            ),
        ):
            grid.keys = {node: public_key_to_bytes(NODE_KEYS[3]) for node in (1, 2, 3)}
            directory.wait(grid)


class TestSimulatedNodes:
    def test_they_have_no_keys(self):
        with InProcessGrid(claiming("x"), 1) as grid:
            assert node_keys(grid) is None
            assert node_keys(StoppableGrid(grid, None)) is None  # type: ignore[arg-type]

    def test_a_name_must_be_enrolled_all_the_same(self, devices: Devices, directory: Directory):
        devices.write(enrolled(client_001={"state": "revoked"}))
        with InProcessGrid(claiming("client-000", "client-001", "stranger"), 3) as grid:
            directory.refresh(grid)
        assert directory.nodes == {"client-000": 1}
        assert codes(directory) == [(2, "revoked"), (3, "unknown_client")]

    def test_the_run_says_once_that_only_signatures_bind_names(self, config: Make, devices: Devices):
        tracker = MemoryTracker(clock=lambda: 0.0)
        directory = Directory(config(admission={"devices": str(devices.path)}), tell=tracker.emit)
        with InProcessGrid(claiming(*NAMES), 3) as grid:
            directory.gather(grid)
            directory.gather(grid)
        (warning,) = tracker.of("warning")
        assert "the signature of its update alone" in warning["message"]

    def test_nodes_with_keys_leave_nothing_to_say(self, config: Make, devices: Devices):
        tracker = MemoryTracker(clock=lambda: 0.0)
        directory = Directory(config(admission={"devices": str(devices.path)}), tell=tracker.emit)
        with KeyedGrid(claiming(*NAMES), 3) as grid:
            directory.gather(grid)
        assert tracker.of("warning") == []


class TestKeys:
    def test_flower_s_form_becomes_openssh_s(self):
        assert openssh_line(public_key_to_bytes(NODE_KEYS[0])) == line(0)

    def test_a_key_of_another_kind_is_none(self):
        key = rsa.generate_private_key(65537, 2048).public_key()
        assert openssh_line(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)) == ""

    def test_a_curve_that_openssh_does_not_know_is_none(self):
        key = ec.generate_private_key(ec.SECP256K1()).public_key()
        assert openssh_line(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)) == ""


def signing(number: int, honest: Make, **changes: Any) -> Make:
    """A client that answers honestly and signs with that key."""

    def answer(message: Message, task: Any) -> Message:
        extra = {} if task.plan.mode == "evaluate" else {"signing_key": UPDATE_KEYS[number], **changes}
        reply: Message = honest(message, task, **extra)
        return reply

    return answer


@pytest.fixture
def run(federation: Make, fake_app: Make, honest: Make, devices: Devices) -> Make:
    """Run a federation of three enrolled clients; a script replaces what single ones do."""

    def make(script: Mapping[str, Make] | None = None, *, grid: type[InProcessGrid] = KeyedGrid, **changes: Any) -> Any:
        made = federation(admission={"devices": str(devices.path)}, **changes)
        scripts = {name: signing(number, honest) for number, name in enumerate(NAMES)} | dict(script or {})
        with grid(fake_app(scripts), 3) as nodes:
            made.strategy.start(nodes)
        return made

    return make


def refusals(made: Any) -> list[tuple[int, str, str]]:
    return [(e["round_number"], e["client_id"], e["reason"]) for e in made.events("client") if e["status"] != "ok"]


class TestRounds:
    @pytest.mark.parametrize("grid", [KeyedGrid, InProcessGrid])
    def test_signed_updates_give_what_unsigned_ones_gave(self, run: Make, federation: Make, grid: type[InProcessGrid]):
        plain = federation()
        plain.run()
        made = run(grid=grid)
        assert made.tensors == plain.tensors
        assert refusals(made) == []

    @pytest.mark.parametrize("grid", [KeyedGrid, InProcessGrid])
    def test_an_unsigned_update_is_refused_and_the_others_are_taken(
        self, run: Make, honest: Make, grid: type[InProcessGrid]
    ):
        made = run({"client-001": honest}, grid=grid)
        assert refusals(made) == [(1, "client-001", "unsigned"), (2, "client-001", "unsigned")]
        assert [event["participants"] for event in made.events("round")] == [2, 2]

    def test_another_clients_key_does_not_sign_for_this_one(self, run: Make, honest: Make):
        made = run({"client-001": signing(0, honest)}, rounds=1)
        assert refusals(made) == [(1, "client-001", "bad_signature")]

    def test_who_is_revoked_during_a_run_is_out_of_the_next_round(self, run: Make, honest: Make, devices: Devices):
        def revoked(message: Message, task: Any) -> Message:
            devices.write(enrolled(client_001={"state": "revoked"}))
            reply: Message = signing(1, honest)(message, task)
            return reply

        made = run({"client-001": revoked}, rounds=2)
        assert [event["cohort"] for event in made.events("round_start")] == [list(NAMES), ["client-000", "client-002"]]
        (problem,) = made.events("node_problem")
        assert (problem["node_id"], problem["reason"]) == ("2", "revoked")

    def test_a_buffered_run_does_not_wait_for_who_was_revoked(
        self, federation: Make, fake_app: Make, honest: Make, devices: Devices
    ):
        """Client 1 trains on while others fill the first buffer, and is revoked before the second."""

        class Slow(KeyedGrid):
            """What client 1 trained never arrives."""

            def pull_messages(self, message_ids: Any) -> Any:
                if made.events("round"):
                    devices.write(enrolled(client_001={"state": "revoked"}))
                found = super().pull_messages(message_ids)
                return [one for one in found if one.metadata.src_node_id != 2 or one.metadata.message_type == "query"]

        policy = {"mode": "buffered", "buffer": 2, "concurrency": 3}
        made = federation(rounds=3, round=policy, admission={"devices": str(devices.path)})
        with Slow(fake_app({name: signing(number, honest) for number, name in enumerate(NAMES)}), 3) as grid:
            made.strategy.start(grid)
        (dropped,) = made.events("dropped")
        assert dropped["clients"] == ["client-001"]
        assert dropped["message"] == "their devices are no longer enrolled"

    def test_the_tasks_of_a_round_are_for_enrolled_clients_alone(self, run: Make, devices: Devices, honest: Make):
        seen = []

        def notes(message: Message, task: Any) -> Message:
            seen.append(assignment_of(message).client_id)
            reply: Message = signing(1, honest)(message, task)
            return reply

        devices.write({name: one for name, one in enrolled().items() if name != "client-001"})
        run({"client-001": notes}, rounds=1)
        assert seen == []


class TestRun:
    def test_the_file_is_found_from_any_folder(
        self, config: Make, devices: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_config: Any
    ):
        monkeypatch.chdir(tmp_path)
        made = Run(config(**REAL, admission={"devices": "devices.json"}, run_dir=str(tmp_path / "run")))
        assert made.config.admission.devices == str(devices.path)
        monkeypatch.chdir("/")
        resumed = Run(config(**REAL, admission={"devices": str(devices.path)}, run_dir=str(made.folder), resume=True))
        assert resumed.config.admission.devices == str(devices.path)
        assert f"devices: {devices.path}" in (made.folder / "config.yaml").read_text()

    def test_a_file_that_cannot_be_read_leaves_nothing_behind(self, config: Make, tmp_path: Path):
        missing = tmp_path / "none.json"
        with pytest.raises(ConfigError, match=r"none\.json: No such file"):
            Run(config(**REAL, admission={"devices": str(missing)}, run_dir=str(tmp_path / "run")))
        assert not (tmp_path / "run").exists()

    def test_no_client_hears_where_the_file_is(self, config: Make):
        assert "devices.json" not in config(admission={"devices": "/srv/devices.json"}).client_json


REAL: dict[str, Any] = {"model": {"source": "tiny:bert"}, "data": {"partition": {"num_clients": 3}}}


def test_every_reason_says_what_was_found_and_what_to_do() -> None:
    rows = dict(re.findall(r"^\| `([a-z_]+)` \| ([^|]+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert {code: rows.get(code) for code in NODE_REASONS} == dict(NODE_REASONS)
