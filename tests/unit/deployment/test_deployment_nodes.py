"""Flower's list of nodes follows the book, whatever happens in between; its command is a stand-in here."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from federated.deployment import flower_environment, flwr_command
from federated.deployment.devices import Claim, Device, DeviceBook
from federated.deployment.flower_environment import environment, program
from federated.deployment.keys import DeviceKeys
from federated.deployment.nodes import FlowerLink, Synced, live_nodes, register_node, sync_nodes, unregister_node
from federated.errors import DeploymentError

CONFIG = '[superlink]\ndefault = "deployment"\n[superlink.deployment]\naddress = "127.0.0.1:9"\ninsecure = true\n'


@pytest.fixture
def link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FlowerLink:
    """A SuperLink that is up, behind the stand-in."""
    programs, home = tmp_path / "bin", tmp_path / "flwr"
    programs.mkdir()
    home.mkdir()
    stand_in = Path(__file__).with_name("fake_flwr.py")
    (programs / "flwr").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{stand_in}" "$@"\n')
    (programs / "flwr").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    (home / "config.toml").write_text(CONFIG)
    (home / "nodes.json").write_text("[]")
    return FlowerLink(home)


@pytest.fixture
def book(tmp_path: Path, clock: Any) -> DeviceBook:
    return DeviceBook(tmp_path, clock=clock)


def enrolled(book: DeviceBook, name: str = "north", *, auto_approve: bool = True) -> Device:
    made = book.invite(
        name, door="https://a", ca_sha256="ab" * 32, valid=timedelta(hours=1), auto_approve=auto_approve, actor="ada"
    )
    keys = DeviceKeys(ec.generate_private_key(ec.SECP384R1()), Ed25519PrivateKey.generate())
    return book.enrol(Claim(name, made.token_sha256, keys.node_line, keys.update_raw))[0]


def nodes(link: FlowerLink) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads((link.home / "nodes.json").read_text())
    return found


def calls(link: FlowerLink) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (link.home / "calls.jsonl").read_text().splitlines()]


def sync(book: DeviceBook, link: FlowerLink) -> Synced:
    return sync_nodes(book, link, actor="ada")


def test_what_is_approved_is_registered(book: DeviceBook, link: FlowerLink) -> None:
    north = enrolled(book)
    enrolled(book, "south", auto_approve=False)
    assert sync(book, link) == Synced(("north",), (), ())
    assert [(one["id"], one["key"], one["status"]) for one in nodes(link)] == [("1000", north.node_key, "registered")]
    assert [one.node_id for one in book.devices()] == ["1000", ""]


def test_doing_it_again_changes_nothing(book: DeviceBook, link: FlowerLink) -> None:
    enrolled(book)
    sync(book, link)
    assert sync(book, link) == Synced((), (), ())
    assert len(nodes(link)) == 1


def test_what_is_revoked_is_unregistered(book: DeviceBook, link: FlowerLink) -> None:
    enrolled(book)
    sync(book, link)
    book.revoke("north", actor="ada", reason="stolen")
    assert sync(book, link) == Synced((), ("north",), ())
    assert [one["status"] for one in nodes(link)] == ["unregistered"]
    assert sync(book, link) == Synced((), (), ())
    assert [one.action for one in book.log()][-3:] == ["registered", "revoked", "unregistered"]


def test_a_name_that_was_revoked_comes_back_with_its_new_key(book: DeviceBook, link: FlowerLink) -> None:
    enrolled(book)
    sync(book, link)
    book.revoke("north", actor="ada", reason="stolen")
    again = enrolled(book)
    assert sync(book, link) == Synced(("north",), ("north",), ())
    assert [(one["key"] == again.node_key, one["status"]) for one in nodes(link)] == [
        (False, "unregistered"),
        (True, "registered"),
    ]


def test_a_superlink_that_forgot_everything_is_told_again(book: DeviceBook, link: FlowerLink) -> None:
    enrolled(book)
    enrolled(book, "south")
    sync(book, link)
    (link.home / "nodes.json").write_text("[]")
    assert sync(book, link) == Synced(("north", "south"), (), ())


def test_a_superlink_that_is_not_up_is_one_error(book: DeviceBook, link: FlowerLink) -> None:
    enrolled(book)
    (link.home / "nodes.json").unlink()
    with pytest.raises(DeploymentError, match="the SuperLink does not answer; start the deployment"):
        sync(book, link)
    assert book.devices()[0].node_id == ""
    (link.home / "nodes.json").write_text("[]")
    assert sync(book, link).registered == ("north",)


def test_a_registration_whose_answer_was_lost_is_found(book: DeviceBook, link: FlowerLink) -> None:
    """The node that came in between is the device's; one that somebody registered by hand before is not."""
    by_hand = {"id": "7", "key": "somebody's", "status": "online"}
    (link.home / "nodes.json").write_text(json.dumps([by_hand]))
    enrolled(book)
    (link.home / "lose-the-answer").touch()
    with pytest.raises(DeploymentError, match="'flwr supernode register' did not succeed: killed"):
        sync(book, link)
    (link.home / "lose-the-answer").unlink()
    assert sync(book, link) == Synced((), (), ("7",))
    assert book.devices()[0].node_id == "1001"


def test_a_lost_registration_of_a_revoked_device_is_ended(book: DeviceBook, link: FlowerLink) -> None:
    enrolled(book)
    (link.home / "lose-the-answer").touch()
    with pytest.raises(DeploymentError):
        sync(book, link)
    book.revoke("north", actor="ada", reason="stolen")
    assert sync(book, link) == Synced((), ("north",), ())
    assert [one["status"] for one in nodes(link)] == ["unregistered"]


def test_a_registration_that_never_reached_flower_is_done_again(book: DeviceBook, link: FlowerLink) -> None:
    by_hand = {"id": "7", "key": "somebody's", "status": "online"}
    (link.home / "nodes.json").write_text(json.dumps([by_hand]))
    entry = enrolled(book)
    book.note_registering(entry.number, {"7"})
    assert sync(book, link) == Synced(("north",), (), ("7",))
    assert book.devices()[0].node_id == "1001"


def test_what_cannot_be_told_apart_is_left_to_the_operator(book: DeviceBook, link: FlowerLink) -> None:
    entry = enrolled(book)
    book.note_registering(entry.number)
    (link.home / "nodes.json").write_text(
        json.dumps([{"id": name, "key": name, "status": "online"} for name in ("7", "8")])
    )
    with pytest.raises(DeploymentError, match="registered as one of the nodes 7, 8, and its id was lost"):
        sync(book, link)


def test_a_key_that_flower_does_not_take_stops_no_other_device(book: DeviceBook, link: FlowerLink) -> None:
    north = enrolled(book)
    enrolled(book, "south")
    (link.home / "nodes.json").write_text(json.dumps([{"id": "7", "key": north.node_key, "status": "unregistered"}]))
    with pytest.raises(DeploymentError, match=r"has or had the key of north under an id .* invite it again"):
        sync(book, link)
    assert [one.node_id for one in book.devices()] == ["", "1001"]


def test_processes_take_turns(book: DeviceBook, link: FlowerLink) -> None:
    for number in range(3):
        enrolled(book, f"device-{number}")
    done: list[Synced] = []
    threads = [threading.Thread(target=lambda: done.append(sync(book, link))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(len(one.registered) for one in done) == [0, 0, 3]
    assert len(nodes(link)) == 3


def test_flower_calls_nobody_and_reads_its_own_home_alone(link: FlowerLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.setenv("FLWR_SOMETHING", "1")
    monkeypatch.setenv("NO_PROXY", "example.org")
    live_nodes(link)
    (call,) = calls(link)
    assert call["environment"] == {
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_HOME": str(link.home),
        "NO_PROXY": "example.org,localhost,127.0.0.1,::1",
    }
    assert call["arguments"] == ["supernode", "list", "deployment", "--format", "json"]


def test_nodes_are_registered_and_unregistered_by_hand(link: FlowerLink, tmp_path: Path) -> None:
    (tmp_path / "k.pub").write_text("a key\n")
    node_id = register_node(link, tmp_path / "k.pub", name="north")
    assert calls(link)[-1]["arguments"][-4:] == ["--name", "north", "--format", "json"]
    assert live_nodes(link) == {node_id}
    unregister_node(link, node_id)
    assert live_nodes(link) == set()
    with pytest.raises(DeploymentError, match=r"'flwr supernode unregister' did not succeed: .*Node ID not found"):
        unregister_node(link, node_id)


@pytest.mark.parametrize(
    "config",
    [
        None,
        "",
        "nothing of the kind",
        "[superlink]\n",
        '[superlink.deployment]\naddress = ":local:"\n',
        '[superlink.other]\naddress = "127.0.0.1:9"\n',
        "superlink = 7",
    ],
)
def test_without_a_connection_nothing_is_started(link: FlowerLink, config: str | None) -> None:
    """Flower would start a SuperLink of its own, which nobody asked for and which stays."""
    (link.home / "config.toml").unlink()
    if config is not None:
        (link.home / "config.toml").write_text(config)
    with pytest.raises(DeploymentError, match="start the deployment once"):
        live_nodes(link)
    assert not (link.home / "calls.jsonl").exists()


def test_a_deployment_that_was_never_started_is_one_error(book: DeviceBook, tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="start the deployment once with 'fedpeft deploy up'"):
        sync(book, FlowerLink(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo oops >&2; exit 1", "did not succeed: oops"),
        ("exit 0", "did not succeed: it said nothing"),
        ("echo '{\"success\": true}'", "answers in a way that this version does not read"),
        ('echo \'{"success": true, "nodes": [7]}\'', "answers in a way that this version does not read"),
        ("echo '[1]'", "did not succeed"),
        ("echo '{'", "did not succeed"),
        ("sleep 60", "did not answer within 0.5 s"),
    ],
)
def test_odd_answers_are_one_error(link: FlowerLink, monkeypatch: pytest.MonkeyPatch, script: str, said: str) -> None:
    monkeypatch.setattr(flwr_command, "_SECONDS", 0.5 if "sleep" in script else 60.0)
    Path(sys.executable).with_name("flwr").write_text(f"#!/bin/sh\n{script.replace('sleep', 'exec sleep')}\n")
    with pytest.raises(DeploymentError, match=said):
        live_nodes(link)


def test_a_missing_command_is_one_error(link: FlowerLink, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(sys.executable).parent
    monkeypatch.setattr(flower_environment, "_program_folders", lambda: [folder])
    (folder / "flwr").unlink()
    with pytest.raises(DeploymentError, match=f"flwr is not in {folder}; install federated-peft.deploy. with"):
        live_nodes(link)


def test_a_command_that_cannot_be_started_is_one_error(link: FlowerLink) -> None:
    Path(sys.executable).with_name("flwr").chmod(0o600)
    with pytest.raises(DeploymentError, match="cannot start Flower's command 'flwr': Permission denied"):
        live_nodes(link)


def test_programs_are_found_where_a_systems_pip_puts_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A Debian's Python is in /usr/bin, and what its pip installs in /usr/local/bin."""
    scripts = tmp_path / "local" / "bin"
    scripts.mkdir(parents=True)
    (scripts / "supervisord").write_text("")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python3"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme="": str(tmp_path / "user" if scheme else scripts))
    assert program("supervisord") == str(scripts / "supervisord")
    first, second, *_ = environment(tmp_path)["PATH"].split(os.pathsep)
    assert (first, second) == (str(tmp_path / "bin"), str(scripts))
