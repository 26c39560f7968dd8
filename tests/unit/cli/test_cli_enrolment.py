"""``fedpeft deploy invite | devices | approve | revoke | history`` and ``fedpeft device enroll``, on a real door."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from federated.deployment import nodes
from federated.deployment.certificates import make_ca, make_server_certificate
from federated.deployment.devices import DeviceBook
from federated.deployment.enrolment import enrolment_routes
from federated.deployment.invitations import parse_invitation
from federated.deployment.nodes import Synced
from federated.errors import DeploymentError
from federated.flower.enrolled import read_devices
from tests.unit.deployment.conftest import listening

Run = Callable[..., Any]


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def server(here: Path) -> Iterator[Path]:
    """The server's folder, and its door, open."""
    folder = here / "deployment"
    ca = make_ca(folder / "tls", name="tests", clock=now)
    make_server_certificate(folder / "tls", ca, hosts=["localhost"], clock=now)
    app = FastAPI()
    book = DeviceBook(folder, clock=now)
    app.include_router(enrolment_routes(book, ca_pem=ca.pem, on_change=lambda _: None))
    with listening(app, folder / "tls") as url:
        (folder / "server.yaml").write_text(f"door_url: {url}\nother: 7\n")
        yield folder


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the SuperLink; who told it."""
    told: list[str] = []

    def synced(book: DeviceBook, link: Any, *, actor: str) -> Synced:
        told.append(f"{link.home.name} {actor}")
        waiting = [one for one in book.devices() if one.state == "approved" and not one.node_id]
        for one in waiting:
            book.note_node(one.number, "17", actor=actor)
        gone = [one for one in book.devices() if one.state == "revoked" and one.node_id]
        for one in gone:
            book.note_node(one.number, "", actor=actor)
        return Synced(tuple(one.client_id for one in waiting), tuple(one.client_id for one in gone), ("99",))

    monkeypatch.setattr(nodes, "sync_nodes", synced)
    return told


def invited(fedpeft: Run, *more: str) -> str:
    return str(fedpeft("deploy", "invite", "north", *more).out)


def test_from_invitation_to_revocation(fedpeft: Run, server: Path, flower: list[str]) -> None:
    line = invited(fedpeft, "--valid", "2h")
    asked = fedpeft("device", "enroll", line).out
    assert "north is pending: read the two fingerprints out" in asked
    shown = fedpeft("deploy", "devices").out
    prints = [word for word in asked.split() if word.startswith("SHA256:")]
    assert len(prints) == 2
    assert all(one in shown for one in prints)
    approved = fedpeft("deploy", "approve", "north", "--as", "ada")
    assert "north is approved" in approved.out
    assert "registered with Flower: north" in approved.out
    assert "not in the book: 99" in approved.err
    assert "north is approved" in fedpeft("device", "enroll", line).out
    assert set(read_devices(server / "devices.json")) == {"north"}
    assert "unregistered from Flower: north" in fedpeft("deploy", "revoke", "north", "--reason", "stolen").out
    assert not read_devices(server / "devices.json")
    assert "was revoked by the operator" in fedpeft("device", "enroll", line, code=1).err
    assert flower[0] == "flwr ada"
    history = fedpeft("deploy", "history").out
    for word in ("invited", "enrolled", "approved", "revoked", "stolen", "ada"):
        assert word in history


def test_the_invitation_alone_is_on_stdout(fedpeft: Run, server: Path) -> None:
    done = fedpeft("deploy", "invite", "north")
    assert parse_invitation(done.out).client_id == "north"
    assert done.out.count("\n") == 1
    assert "hand it over on a way that you trust" in done.err


def test_an_invitation_on_stdin_is_on_no_command_line(
    fedpeft: Run, server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = invited(fedpeft, "--approve")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{line}\n"))
    assert "north is approved" in fedpeft("device", "enroll", "-", "--folder", "clinic").out


def test_waiting_ends_in_time(fedpeft: Run, server: Path) -> None:
    line = invited(fedpeft)
    said = fedpeft("device", "enroll", line, "--wait", "0.2", code=1).err
    assert "north was not approved within 0.2 s" in said


def test_an_approval_is_kept_while_flower_is_down(
    fedpeft: Run, server: Path, monkeypatch: pytest.MonkeyPatch, flower: list[str]
) -> None:
    fedpeft("device", "enroll", invited(fedpeft))
    with monkeypatch.context() as patch:

        def down(*_: Any, **__: Any) -> Synced:
            raise DeploymentError("the SuperLink does not answer")

        patch.setattr(nodes, "sync_nodes", down)
        said = fedpeft("deploy", "approve", "north", code=1).err
    assert "north is approved, and Flower does not know it yet: the SuperLink does not answer" in said
    assert set(read_devices(server / "devices.json")) == {"north"}
    assert "not registered" in fedpeft("deploy", "devices").out
    assert "registered with Flower: north" in fedpeft("deploy", "approve", "north").out


def test_a_deployment_that_was_never_up_says_so(fedpeft: Run, server: Path) -> None:
    fedpeft("device", "enroll", invited(fedpeft))
    assert "start the deployment once" in fedpeft("deploy", "approve", "north", code=1).err
    assert "north is revoked" in fedpeft("deploy", "revoke", "north", "--reason", "x").out


def test_an_open_invitation_is_shown_and_withdrawn(fedpeft: Run, server: Path) -> None:
    line = invited(fedpeft, "--approve")
    assert "approves itself" in fedpeft("deploy", "devices").out
    assert "the invitation is withdrawn" in fedpeft("deploy", "revoke", "north", "--reason", "wrong address").out
    assert "the door refuses the invitation" in fedpeft("device", "enroll", line, code=1).err
    assert "approves itself" not in fedpeft("deploy", "devices").out


@pytest.mark.parametrize("valid", ["", "0h", "24", "1w", "-1h", "1h30m", "99999h", "30s", "31d", "\u0661h"])
def test_odd_times_are_refused(fedpeft: Run, server: Path, valid: str) -> None:
    said = fedpeft("deploy", "invite", "north", "--valid", valid, code=2).err
    assert "expected" in said
    assert not DeviceBook(server, clock=now).open_invitations()


def test_odd_names_are_refused(fedpeft: Run, server: Path) -> None:
    for name in ("../../root", "n\u043erth", "", "x" * 10**5):
        for command in (["invite", name], ["approve", name], ["revoke", name, "--reason", "x"]):
            said = fedpeft("deploy", *command, code=2).err
            assert "is no name for a device" in said
            assert len(said) < 500


def test_what_an_operator_types_cannot_steer_a_terminal(fedpeft: Run, server: Path) -> None:
    invited(fedpeft)
    fedpeft("deploy", "revoke", "north", "--reason", "[red]x[/red]", "--as", "\x1b[31mada")
    shown = fedpeft("deploy", "history").out
    assert "[red]x[/red]" in shown
    assert "\x1b" not in shown


def test_a_folder_that_is_no_servers_is_left_alone(fedpeft: Run, here: Path) -> None:
    (here / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        said = fedpeft("deploy", "devices", "--folder", folder, code=1).err
        assert "server.yaml: No such file" in said.replace("\n", " ")
    assert not list((here / "empty").iterdir())


@pytest.mark.parametrize("text", ["", "- 1", "door_url: 7", "door_url: http://a", "{", "other: 1"])
def test_settings_that_name_no_door_are_refused(fedpeft: Run, server: Path, text: str) -> None:
    (server / "server.yaml").write_text(text)
    assert "error:" in fedpeft("deploy", "invite", "north", code=2).err


def test_a_missing_authority_is_named(fedpeft: Run, server: Path) -> None:
    shutil.rmtree(server / "tls")
    assert "ca.crt" in fedpeft("deploy", "invite", "north", code=1).err


def test_what_is_no_invitation_is_refused(fedpeft: Run, here: Path) -> None:
    assert "this is no invitation" in fedpeft("device", "enroll", "hello", code=1).err
    assert not (here / "device").exists()
