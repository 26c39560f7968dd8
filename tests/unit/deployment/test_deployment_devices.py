"""The book of devices: who gets in by which invitation, what stays known, and what the strategy reads of it."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from federated.deployment.devices import Claim, Device, DeviceBook, KeysUsed
from federated.deployment.invitations import Invitation, encoded
from federated.deployment.keys import DeviceKeys
from federated.errors import ConfigError, DeploymentError, EnrolmentRefused
from federated.flower.enrolled import read_devices

DOOR = "https://door.example.org:8443"
CA = "ab" * 32


def new_keys() -> DeviceKeys:
    return DeviceKeys(ec.generate_private_key(ec.SECP384R1()), Ed25519PrivateKey.generate())


def claim(invitation: Invitation, keys: DeviceKeys, **changed: Any) -> Claim:
    fields = {"node_key": keys.node_line, "update_key": keys.update_raw, "address": "10.0.0.3", **changed}
    return Claim(invitation.client_id, invitation.token_sha256, **fields)


@pytest.fixture
def book(tmp_path: Path, clock: Any) -> DeviceBook:
    return DeviceBook(tmp_path, clock=clock)


Invite = Callable[..., Invitation]


@pytest.fixture
def invite(book: DeviceBook) -> Invite:
    def made(name: str = "north", *, hours: float = 24, auto_approve: bool = False) -> Invitation:
        valid = timedelta(hours=hours)
        return book.invite(name, door=DOOR, ca_sha256=CA, valid=valid, auto_approve=auto_approve, actor="ada")

    return made


def enrolled(book: DeviceBook, invite: Invite, name: str = "north", *, auto_approve: bool = True) -> Device:
    return book.enrol(claim(invite(name, auto_approve=auto_approve), new_keys()))[0]


def did(book: DeviceBook) -> list[tuple[str, str, str]]:
    return [(one.actor, one.action, one.client_id) for one in book.log()]


def test_a_device_is_invited_asks_and_is_approved(book: DeviceBook, invite: Invite, tmp_path: Path) -> None:
    keys = new_keys()
    assert book.enrol(claim(invite(), keys))[0].state == "pending"
    assert not read_devices(tmp_path / "devices.json")
    book.approve("north", actor="ada")
    found = read_devices(tmp_path / "devices.json")["north"]
    assert (found.client_id, found.node_key, found.update_key) == ("north", keys.node_line, keys.update_raw)
    assert did(book) == [("ada", "invited", "north"), ("door", "enrolled", "north"), ("ada", "approved", "north")]


def test_an_invitation_may_approve(book: DeviceBook, invite: Invite, tmp_path: Path) -> None:
    assert enrolled(book, invite).state == "approved"
    assert set(read_devices(tmp_path / "devices.json")) == {"north"}
    assert did(book)[-1] == ("door", "approved", "north")


def test_a_revoked_device_takes_no_part(book: DeviceBook, invite: Invite, tmp_path: Path) -> None:
    enrolled(book, invite)
    done = book.revoke("north", actor="ada", reason="stolen from a car")
    assert done is not None
    assert (done.state, done.remark) == ("revoked", "stolen from a car")
    assert not read_devices(tmp_path / "devices.json")
    assert book.log()[-1].detail == "stolen from a car"


def test_a_revoked_name_is_invited_again_with_new_keys(book: DeviceBook, invite: Invite, tmp_path: Path) -> None:
    enrolled(book, invite)
    book.revoke("north", actor="ada", reason="stolen")
    keys = new_keys()
    again, _ = book.enrol(claim(invite(auto_approve=True), keys))
    assert [one.state for one in book.devices()] == ["revoked", "approved"]
    assert book.device("north") == again
    assert read_devices(tmp_path / "devices.json")["north"].update_key == keys.update_raw
    assert [action for _, action, _ in did(book)].count("enrolled") == 2


@pytest.mark.parametrize("which", ["both", "node", "update"])
@pytest.mark.parametrize("name", ["north", "south"])
def test_keys_of_a_revoked_device_are_never_taken_again(
    book: DeviceBook, invite: Invite, which: str, name: str
) -> None:
    keys, fresh = new_keys(), new_keys()
    book.enrol(claim(invite(), keys))
    book.revoke("north", actor="ada", reason="stolen")
    node = keys if which != "update" else fresh
    update = keys if which != "node" else fresh
    invitation = invite(name)
    with pytest.raises(KeysUsed):
        book.enrol(claim(invitation, fresh, node_key=node.node_line, update_key=update.update_raw))
    assert book.enrol(claim(invitation, fresh))[0].state == "pending"


def test_a_token_opens_once(book: DeviceBook, invite: Invite) -> None:
    invitation = invite()
    book.enrol(claim(invitation, new_keys()))
    for _ in range(3):
        with pytest.raises(EnrolmentRefused, match=r"used at .* by other keys"):
            book.enrol(claim(invitation, new_keys(), address="10.9.9.9"))
    (refused,) = [one for one in book.log() if one.action == "refused"]
    assert refused.detail.endswith("from 10.9.9.9")


def test_the_same_device_finds_its_entry_again(book: DeviceBook, invite: Invite, clock: Any) -> None:
    """Its answer may have been lost on the way."""
    invitation, keys = invite(), new_keys()
    first, new = book.enrol(claim(invitation, keys))
    assert new
    clock.move(days=3)
    assert book.enrol(claim(invitation, keys)) == (first, False)
    book.approve("north", actor="ada")
    assert book.enrol(claim(invitation, keys))[0].state == "approved"
    book.revoke("north", actor="ada", reason="gone")
    assert book.enrol(claim(invitation, keys))[0].state == "revoked"
    assert len(book.devices()) == 1


def test_one_of_its_keys_is_not_enough_to_find_it(book: DeviceBook, invite: Invite) -> None:
    invitation, keys = invite(), new_keys()
    book.enrol(claim(invitation, keys))
    with pytest.raises(EnrolmentRefused, match="used at"):
        book.enrol(claim(invitation, keys, update_key=new_keys().update_raw))


def test_an_unknown_token_opens_nothing(book: DeviceBook, invite: Invite) -> None:
    north, south = invite("north"), invite("south")
    for token in (bytes(32), south.token_sha256):
        with pytest.raises(EnrolmentRefused, match="no invitation of this name has such a token"):
            book.enrol(Claim("north", token, new_keys().node_line, new_keys().update_raw))
    with pytest.raises(EnrolmentRefused, match="no invitation"):
        book.enrol(Claim("North", north.token_sha256, new_keys().node_line, new_keys().update_raw))
    assert not book.devices()
    assert len(book.log()) == 2  # the invitations: strangers write nothing into the book


def test_an_invitation_ends(book: DeviceBook, invite: Invite, clock: Any) -> None:
    invitation = invite(hours=1)
    clock.move(minutes=59, seconds=58)
    assert [one.client_id for one in book.open_invitations()] == ["north"]
    clock.move(seconds=2)
    assert not book.open_invitations()
    with pytest.raises(EnrolmentRefused, match="ended at"):
        book.enrol(claim(invitation, new_keys()))


def test_a_newer_invitation_ends_the_older_one(book: DeviceBook, invite: Invite) -> None:
    older, newer = invite(), invite()
    with pytest.raises(EnrolmentRefused, match="withdrawn at"):
        book.enrol(claim(older, new_keys()))
    assert book.enrol(claim(newer, new_keys()))[0].state == "pending"


def test_revoking_withdraws_an_invitation(book: DeviceBook, invite: Invite) -> None:
    invitation = invite()
    assert book.revoke("north", actor="ada", reason="sent to the wrong address") is None
    with pytest.raises(EnrolmentRefused, match="withdrawn at"):
        book.enrol(claim(invitation, new_keys()))


def test_approving_and_revoking_twice_changes_nothing(book: DeviceBook, invite: Invite, clock: Any) -> None:
    enrolled(book, invite, auto_approve=False)
    first = book.approve("north", actor="ada")
    clock.move(hours=1)
    assert book.approve("north", actor="bob") == first
    gone = book.revoke("north", actor="ada", reason="one")
    clock.move(hours=1)
    assert book.revoke("north", actor="bob", reason="two") == gone
    assert len(book.log()) == 4


def test_what_cannot_be_approved_says_why(book: DeviceBook, invite: Invite) -> None:
    with pytest.raises(DeploymentError, match=r"no device is called 'north'; known are: none"):
        book.approve("north", actor="ada")
    invite()
    with pytest.raises(DeploymentError, match="has not used its invitation"):
        book.approve("north", actor="ada")
    enrolled(book, invite)
    book.revoke("north", actor="ada", reason="lost")
    with pytest.raises(DeploymentError, match=r"was revoked at .* \(lost\); invite it again"):
        book.approve("north", actor="ada")
    with pytest.raises(DeploymentError, match=r"no device is called 'south'; known are: north"):
        book.revoke("south", actor="ada", reason="lost")


def test_an_enrolled_name_is_not_invited(book: DeviceBook, invite: Invite) -> None:
    enrolled(book, invite, auto_approve=False)
    with pytest.raises(DeploymentError, match=r"is enrolled \(pending\); revoke it first"):
        invite("north")


def test_names_differ_by_more_than_case(book: DeviceBook, invite: Invite) -> None:
    invite("north")
    with pytest.raises(DeploymentError, match="is known as north"):
        invite("North")


@pytest.mark.parametrize("name", ["../../root", "", "n\u043erth", "a\nb", "\ud800", "x" * 10**6])
def test_odd_names_are_refused_everywhere(book: DeviceBook, invite: Invite, name: str) -> None:
    for call in (
        lambda: invite(name),
        lambda: book.approve(name, actor="ada"),
        lambda: book.revoke(name, actor="ada", reason="x"),
        lambda: book.device(name),
        lambda: book.enrol(Claim(name, bytes(32), new_keys().node_line, bytes(32))),
    ):
        with pytest.raises(ConfigError, match="is no name for a device"):
            call()


def test_markup_of_sql_is_only_text(book: DeviceBook, invite: Invite) -> None:
    enrolled(book, invite)
    book.revoke("north", actor="'); DROP TABLE log; --", reason="'; DELETE FROM devices; --")
    assert book.log()[-1].actor == "'); DROP TABLE log; --"
    assert book.devices()[0].remark == "'; DELETE FROM devices; --"


@pytest.mark.parametrize("reason", ["", "a\nb", "x" * 301])
def test_a_reason_is_one_line(book: DeviceBook, invite: Invite, reason: str) -> None:
    enrolled(book, invite)
    with pytest.raises(ConfigError, match="expected 1 to 300"):
        book.revoke("north", actor="ada", reason=reason)


@pytest.mark.parametrize("valid", [timedelta(0), timedelta(seconds=59), timedelta(days=31), -timedelta(days=1)])
def test_an_invitation_has_a_sensible_end(book: DeviceBook, valid: timedelta) -> None:
    with pytest.raises(ConfigError, match="one minute to 30 days"):
        book.invite("north", door=DOOR, ca_sha256=CA, valid=valid, auto_approve=False, actor="ada")


def test_the_log_is_append_only(book: DeviceBook, invite: Invite) -> None:
    enrolled(book, invite)
    with sqlite3.connect(book.path) as raw:
        for statement in ("DELETE FROM log", "UPDATE log SET actor = 'x'", "DELETE FROM devices"):
            with pytest.raises(sqlite3.IntegrityError, match=r"append-only|kept"):
                raw.execute(statement)
    raw.close()


def test_no_token_is_kept(book: DeviceBook, invite: Invite, tmp_path: Path) -> None:
    invitation = invite()
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert invitation.token_sha256 in stored
    assert invitation.token not in stored
    assert encoded(invitation.token).encode() not in stored


def test_files_are_their_owners_alone(book: DeviceBook, invite: Invite, tmp_path: Path) -> None:
    enrolled(book, invite)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {
        "devices.db": 0o600,
        "devices.json": 0o600,
    }


def test_two_devices_race_for_one_token(book: DeviceBook, invite: Invite) -> None:
    invitation = invite(auto_approve=True)
    claims = [claim(invitation, new_keys()) for _ in range(8)]
    start, won, lost = threading.Barrier(8), [], []

    def ask(one: Claim) -> None:
        start.wait()
        try:
            won.append(DeviceBook(book.folder, clock=book._clock).enrol(one))
        except EnrolmentRefused:
            lost.append(one)

    threads = [threading.Thread(target=ask, args=(one,)) for one in claims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost), len(book.devices())) == (1, 7, 1)


_WORKER = """
import sys, time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from federated.deployment.devices import Claim, DeviceBook
folder, worker = Path(sys.argv[1]), int(sys.argv[2])
now = lambda: datetime.now(UTC)
about = dict(door="https://a", ca_sha256="ab" * 32, valid=timedelta(hours=1), auto_approve=True, actor="w")
while not (folder / "go").exists():
    time.sleep(0.005)
book = DeviceBook(folder / "server", clock=now)
for index in range(15):
    name = f"device-{worker}-{index}"
    made = book.invite(name, **about)
    update = bytes([worker, index]) + bytes(30)
    book.enrol(Claim(name, made.token_sha256, f"ecdsa-sha2-nistp384 {worker:02}{index:02}", update))
    if index % 3 == 0:
        book.revoke(name, actor="w", reason="test")
"""


def test_several_processes_write_one_book(tmp_path: Path) -> None:
    """The file at the end is the book's, whoever wrote last."""
    (tmp_path / "server").mkdir()
    workers = [subprocess.Popen([sys.executable, "-c", _WORKER, tmp_path, str(number)]) for number in range(4)]
    (tmp_path / "go").touch()
    assert [worker.wait(120) for worker in workers] == [0] * 4
    book = DeviceBook(tmp_path / "server", clock=lambda: datetime.now(UTC))
    approved = {one.client_id for one in book.devices() if one.state == "approved"}
    assert len(book.devices()) == 60
    assert len(approved) == 40
    assert set(read_devices(tmp_path / "server" / "devices.json")) == approved
    numbers = [one.number for one in book.log()]
    assert numbers == list(range(1, len(numbers) + 1))


def test_a_file_that_cannot_be_written_is_said_and_made_up_for(
    book: DeviceBook, invite: Invite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrolled(book, invite)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(DeploymentError, match=r"the change is in the book, and .*No space left"):
            book.revoke("north", actor="ada", reason="stolen")
    assert set(read_devices(tmp_path / "devices.json")) == {"north"}
    book.revoke("north", actor="ada", reason="stolen")
    assert not read_devices(tmp_path / "devices.json")


def test_nodes_are_noted(book: DeviceBook, invite: Invite) -> None:
    entry = enrolled(book, invite)
    book.note_registering(entry.number, {"8", "9"})
    assert book.devices()[0].registering == ("8", "9")
    book.note_registering(entry.number)
    assert book.devices()[0].registering == ()
    book.note_node(entry.number, "17", actor="ada")
    book.note_node(entry.number, "17", actor="ada")
    found = book.devices()[0]
    assert (found.node_id, found.registering) == ("17", None)
    book.note_node(entry.number, "", actor="ada")
    assert book.devices()[0].node_id == ""
    assert [(one.action, one.detail) for one in book.log()][-2:] == [
        ("registered", "node 17"),
        ("unregistered", "node 17"),
    ]


def test_what_is_no_database_is_one_error(tmp_path: Path, clock: Any) -> None:
    (tmp_path / "devices.db").write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(DeploymentError, match="cannot be used: file is not a database"):
        DeviceBook(tmp_path, clock=clock)


def test_a_book_of_a_later_format_is_not_touched(book: DeviceBook, tmp_path: Path, clock: Any) -> None:
    with sqlite3.connect(book.path) as raw:
        raw.execute("PRAGMA user_version = 9")
    raw.close()
    with pytest.raises(DeploymentError, match="format 9, expected 1"):
        DeviceBook(tmp_path, clock=clock)


def test_a_folder_that_is_missing_is_one_error(tmp_path: Path, clock: Any) -> None:
    with pytest.raises(DeploymentError, match=r"cannot open .*No such file"):
        DeviceBook(tmp_path / "nowhere", clock=clock)


def test_the_file_may_be_written_elsewhere(book: DeviceBook, invite: Invite, tmp_path: Path) -> None:
    enrolled(book, invite)
    book.write_devices_file(tmp_path / "copy.json")
    assert json.loads((tmp_path / "copy.json").read_text()) == json.loads((tmp_path / "devices.json").read_text())
