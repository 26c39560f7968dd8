"""A device enrols over TLS on loopback: from the invitation to the operator's word, and what goes wrong on the way."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse

from federated.deployment import enrolling
from federated.deployment.certificates import make_ca, make_server_certificate
from federated.deployment.enrolling import Enrolment, ask_state, enrol, read_enrolment, wait_for_approval
from federated.deployment.invitations import Invitation
from federated.deployment.keys import fingerprint, read_keys
from federated.deployment.rate_limit import RateLimit
from federated.errors import DeploymentError, DoorUnreachable, EnrolmentRefused
from federated.flower.enrolled import read_devices
from tests.unit.deployment.conftest import listening


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """The device's folder; not there yet."""
    return tmp_path / "device"


def asked(door: Any, invitation: Invitation, device: Path) -> Enrolment:
    return enrol(invitation, device, clock=door.clock)


def test_a_device_enrols_and_is_approved(door: Any, device: Path) -> None:
    found = asked(door, door.invite(), device)
    assert (found.state, found.client_id, found.door) == ("pending", "north", door.url)
    door.book.approve("north", actor="ada")
    assert ask_state(device, clock=door.clock).state == "approved"
    assert read_enrolment(device).state == "approved"
    keys, read = read_keys(device), read_devices(door.book.folder / "devices.json")["north"]
    assert (read.node_key, read.update_key) == (keys.node_line, keys.update_raw)


def test_operator_and_owner_see_the_same_fingerprints(door: Any, device: Path) -> None:
    found = asked(door, door.invite(), device)
    entry = door.book.device("north")
    assert (found.node_key, found.update_key) == (fingerprint(entry.node_key), fingerprint(entry.update_key))


def test_what_is_left_in_the_folder(door: Any, device: Path) -> None:
    asked(door, door.invite(), device)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in device.iterdir()}
    assert modes == {
        "ca.crt": 0o644,
        "enrolment.json": 0o600,
        "node.key": 0o600,
        "node.key.pub": 0o644,
        "update.key": 0o600,
    }
    assert (device / "ca.crt").read_bytes() == door.tls.ca.pem
    assert stat.S_IMODE(device.stat().st_mode) == 0o700


def test_no_private_key_and_no_token_is_in_the_record(door: Any, device: Path) -> None:
    invitation = door.invite()
    asked(door, invitation, device)
    record = json.loads((device / "enrolment.json").read_text())
    assert set(record) == {"format", "door", "client_id", "state", "ca_sha256", "node_key", "update_key"}


def test_the_server_is_told_once(door: Any, device: Path) -> None:
    invitation = door.invite(auto_approve=True)
    assert asked(door, invitation, device).state == "approved"
    (device / "enrolment.json").unlink()
    assert asked(door, invitation, device).state == "approved"
    assert door.told == ["north"]


def test_the_same_command_again_asks_for_the_state(door: Any, device: Path) -> None:
    invitation = door.invite()
    asked(door, invitation, device)
    door.book.approve("north", actor="ada")
    door.clock.move(days=40)
    assert asked(door, invitation, device).state == "approved"
    assert len(door.book.devices()) == 1


def test_a_device_that_was_killed_at_any_moment_goes_on(door: Any, device: Path) -> None:
    """Whichever of its files are there: nothing is asked twice, and no key is made anew."""
    invitation = door.invite()
    asked(door, invitation, device)
    line = read_keys(device).node_line
    for gone in (["enrolment.json"], ["enrolment.json", "ca.crt"], ["enrolment.json", "node.key.pub"]):
        for name in gone:
            (device / name).unlink()
        assert asked(door, invitation, device).state == "pending"
    assert read_keys(device).node_line == line
    assert len(door.book.devices()) == 1


def test_waiting_ends_with_the_operators_word(door: Any, device: Path) -> None:
    asked(door, door.invite(), device)
    approving = threading.Timer(0.5, door.book.approve, ["north"], {"actor": "ada"})
    approving.start()
    assert wait_for_approval(device, seconds=60, clock=door.clock).state == "approved"
    approving.join()


def test_waiting_ends_with_the_time(door: Any, device: Path) -> None:
    asked(door, door.invite(), device)
    assert wait_for_approval(device, seconds=0.2, clock=door.clock).state == "pending"


def test_waiting_outlasts_a_door_that_is_shut(door: Any, device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked(door, door.invite(auto_approve=False), device)
    door.book.approve("north", actor="ada")
    tries, right = [], enrolling.ask_state

    def at_first_shut(folder: Path, **given: Any) -> Enrolment:
        tries.append(folder)
        if len(tries) < 3:
            raise DoorUnreachable("shut")
        return right(folder, **given)

    monkeypatch.setattr(enrolling, "ask_state", at_first_shut)
    found = wait_for_approval(device, seconds=60, clock=door.clock, sleep=lambda _: None)
    assert (found.state, len(tries)) == ("approved", 3)


def test_a_revoked_device_is_told(door: Any, device: Path, tmp_path: Path) -> None:
    invitation = door.invite(auto_approve=True)
    asked(door, invitation, device)
    door.book.revoke("north", actor="ada", reason="a secret reason")
    with pytest.raises(EnrolmentRefused, match=r"was revoked .* enrol into a new folder") as caught:
        asked(door, invitation, device)
    assert "secret" not in str(caught.value)
    assert read_enrolment(device).state == "revoked"
    assert asked(door, door.invite(), tmp_path / "new").state == "pending"


def test_a_revoked_devices_folder_enrols_no_more(door: Any, device: Path) -> None:
    asked(door, door.invite(), device)
    door.book.revoke("north", actor="ada", reason="stolen")
    (device / "enrolment.json").unlink()
    with pytest.raises(EnrolmentRefused, match="keys in this folder were enrolled before"):
        asked(door, door.invite(), device)
    assert [one.state for one in door.book.devices()] == ["revoked"]


def test_a_stolen_invitation_is_no_use_after_use(door: Any, device: Path, tmp_path: Path) -> None:
    invitation = door.invite(auto_approve=True)
    asked(door, invitation, device)
    with pytest.raises(EnrolmentRefused, match="the door refuses the invitation: it was used by another device"):
        asked(door, invitation, tmp_path / "thief")
    assert [entry.update_key for entry in door.book.devices()] == [read_keys(device).update_raw]
    assert door.book.log()[-1].action == "refused"


def test_two_devices_race_for_one_invitation(door: Any, tmp_path: Path) -> None:
    invitation = door.invite(auto_approve=True)
    outcomes: list[str] = []
    start = threading.Barrier(4)

    def ask(folder: Path) -> None:
        start.wait()
        try:
            outcomes.append(asked(door, invitation, folder).state)
        except EnrolmentRefused:
            outcomes.append("refused")

    threads = [threading.Thread(target=ask, args=(tmp_path / str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["approved", "refused", "refused", "refused"]
    assert len(door.book.devices()) == 1


def test_an_invitation_that_ended_is_named(door: Any, device: Path) -> None:
    invitation = door.invite(valid=timedelta(hours=1))
    door.clock.move(hours=2)
    with pytest.raises(EnrolmentRefused, match=r"the invitation ended at .* UTC; ask for a new one"):
        asked(door, invitation, device)


def test_the_servers_clock_decides(door: Any, device: Path) -> None:
    """A device whose clock is wrong uses a good invitation, and learns about its clock where one ended."""
    ahead = lambda: door.clock() + timedelta(days=2)  # noqa: E731
    assert enrol(door.invite(), device, clock=ahead).state == "pending"
    invitation = door.invite("south", valid=timedelta(hours=1))
    door.clock.move(hours=2)
    with pytest.raises(EnrolmentRefused, match=r"ended at .*clock is 172800 s off the door's"):
        enrol(invitation, device.parent / "south", clock=ahead)


@pytest.mark.parametrize("minutes", [-6, 6])
def test_a_clock_that_is_off_is_named(door: Any, device: Path, minutes: float) -> None:
    asked(door, door.invite(), device)
    with pytest.raises(EnrolmentRefused, match=r"clocks?.* 360 s apart, at most 300 are allowed; set the clock"):
        ask_state(device, clock=lambda: door.clock() + timedelta(minutes=minutes))
    assert ask_state(device, clock=lambda: door.clock() + timedelta(minutes=minutes * 0.8)).state == "pending"


def test_another_authority_is_noticed_before_anything_is_sent(
    open_door: Any, device: Path, tmp_path: Path, clock: Any
) -> None:
    """Somebody in between shows an authority of the same name and passes requests on."""
    received: list[str] = []
    (tmp_path / "evil").mkdir()
    ca = make_ca(tmp_path / "evil", name="federation of the tests", clock=clock)
    make_server_certificate(tmp_path / "evil", ca, hosts=["localhost"], clock=clock)
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def hears(path: str, request: Request) -> Response:
        received.append(f"{request.method} {path} {len(await request.body())}")
        return Response(ca.pem)

    good = open_door()
    with (
        listening(app, tmp_path / "evil") as url,
        pytest.raises(DeploymentError, match=r"another authority than the invitation names.*nothing was sent"),
    ):
        asked(good, good.invite(door=url), device)
    assert received == ["GET enrol/ca.pem 0"]
    assert not (device / "node.key").exists()
    assert not (device / "ca.crt").exists()


def test_somebody_who_shows_the_right_certificate_without_its_key_is_noticed(
    open_door: Any, device: Path, tmp_path: Path, clock: Any
) -> None:
    """The authority is public: that somebody shows it proves nothing, and the connection that follows does."""
    received: list[str] = []
    (tmp_path / "evil").mkdir()
    evil = make_ca(tmp_path / "evil", name="federation of the tests", clock=clock)
    make_server_certificate(tmp_path / "evil", evil, hosts=["localhost"], clock=clock)
    app, good = FastAPI(), open_door()

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def hears(path: str, request: Request) -> Response:
        received.append(f"{request.method} {path}")
        return Response(good.tls.ca.pem)

    with (
        listening(app, tmp_path / "evil") as url,
        pytest.raises(DoorUnreachable, match=r"authority did not sign.*no key and no token was sent"),
    ):
        asked(good, good.invite(door=url), device)
    assert received == ["GET enrol/ca.pem"]


def test_the_doors_name_is_checked(open_door: Any, device: Path, tls: Any, tmp_path: Path, clock: Any) -> None:
    make_server_certificate(tmp_path, tls.ca, hosts=["other.example.org"], clock=clock)
    door = open_door(folder=tmp_path)
    with pytest.raises(DoorUnreachable, match="has a certificate for other names"):
        asked(door, door.invite(), device)


def test_a_certificate_that_ended_is_named(open_door: Any, device: Path, tls: Any, tmp_path: Path, clock: Any) -> None:
    clock.move(days=-9)
    make_server_certificate(tmp_path, tls.ca, hosts=["localhost"], clock=clock, days=2)
    clock.move(days=9)
    door = open_door(folder=tmp_path)
    with pytest.raises(DoorUnreachable, match="by this device's clock, has ended; set the clock"):
        asked(door, door.invite(), device)


def test_a_certificate_of_tomorrow_is_named(open_door: Any, device: Path, tls: Any, tmp_path: Path, clock: Any) -> None:
    clock.move(days=9)
    make_server_certificate(tmp_path, tls.ca, hosts=["localhost"], clock=clock, days=2)
    clock.move(days=-9)
    door = open_door(folder=tmp_path)
    with pytest.raises(DoorUnreachable, match="by this device's clock, is not valid yet; set the clock"):
        asked(door, door.invite(), device)


def test_a_door_that_is_not_there_is_named(door: Any, device: Path) -> None:
    invitation = door.invite(door="https://localhost:9")
    with pytest.raises(DoorUnreachable, match=r"https://localhost:9/enrol/ca\.pem cannot be reached"):
        asked(door, invitation, device)
    assert asked(door, door.invite(), device).state == "pending"


@pytest.mark.parametrize(
    "answer",
    [
        Response("<html>welcome</html>"),
        Response("", 404),
        Response("moved", 302, {"location": "https://localhost:1/"}),
        Response(b"x" * 200_000),
        Response("{}", media_type="application/json"),
        Response('{"client_id": "south", "state": "approved", "at": 0}'),
        Response('{"client_id": "north", "state": "owner", "at": 0}'),
        Response('{"client_id": "north", "state": "approved", "at": 0, "more": 1}'),
    ],
    ids=["page", "404", "redirect", "endless", "empty", "another", "state", "more"],
)
@pytest.mark.parametrize("from_the_start", [True, False])
def test_what_is_no_door_is_named(tls: Any, door: Any, device: Path, answer: Response, from_the_start: bool) -> None:
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def odd(path: str) -> Response:
        return Response(tls.ca.pem) if path == "enrol/ca.pem" and not from_the_start else answer

    with listening(app, tls.folder) as url, pytest.raises(DoorUnreachable):
        asked(door, door.invite(door=url), device)
    assert not (device / "enrolment.json").exists()


def test_an_answer_that_never_ends_does_not_hold_the_device(
    tls: Any, door: Any, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("federated.deployment.door_client._WHOLE", 0.5)
    app = FastAPI()

    @app.get("/enrol/ca.pem")
    async def drops() -> Response:
        async def endless() -> Any:
            for _ in range(200):
                yield b"x"
                await asyncio.sleep(0.05)

        return StreamingResponse(endless())

    begun = time.monotonic()
    with listening(app, tls.folder) as url:
        with pytest.raises(DoorUnreachable, match="or for more than"):
            asked(door, door.invite(door=url), device)
        assert time.monotonic() - begun < 8


def test_a_busy_door_is_asked_again(open_door: Any, device: Path) -> None:
    door = open_door(limit=RateLimit(burst=1, per_second=2.0))
    assert asked(door, door.invite(), device).state == "pending"


def test_also_when_it_was_busy_with_others_before(open_door: Any, device: Path) -> None:
    door = open_door(limit=RateLimit(burst=1, per_second=2.0))
    invitation = door.invite()
    assert httpx.get(f"{invitation.door}/enrol/ca.pem", verify=False).status_code == 200  # noqa: S501 - its own
    assert asked(door, invitation, device).state == "pending"


def test_a_folder_of_another_enrolment_is_left_alone(door: Any, device: Path) -> None:
    asked(door, door.invite(), device)
    before = {path.name: path.read_bytes() for path in device.iterdir()}
    with pytest.raises(DeploymentError, match=r"is enrolled as north at .*invitation is for south"):
        asked(door, door.invite("south"), device)
    assert {path.name: path.read_bytes() for path in device.iterdir()} == before


def test_a_folder_with_another_authority_is_left_alone(door: Any, device: Path, tmp_path: Path, clock: Any) -> None:
    device.mkdir()
    (device / "ca.crt").write_bytes(make_ca(tmp_path / "other", name="x", clock=clock).pem)
    with pytest.raises(DeploymentError, match="damaged, or the authority of another deployment"):
        asked(door, door.invite(), device)
    assert not door.book.devices()


def test_a_swapped_authority_in_the_folder_is_noticed(door: Any, device: Path, tmp_path: Path, clock: Any) -> None:
    asked(door, door.invite(), device)
    for data in (make_ca(tmp_path / "other", name="x", clock=clock).pem, b"", b"\xff"):
        (device / "ca.crt").write_bytes(data)
        with pytest.raises(DeploymentError, match="damaged, or the authority of another deployment"):
            ask_state(device, clock=door.clock)


def test_a_damaged_record_is_named(door: Any, device: Path) -> None:
    invitation = door.invite()
    asked(door, invitation, device)
    good = (device / "enrolment.json").read_text()
    for text in ("", "{}", good.replace("pending", "owner"), good.replace('"format": 1', '"format": 2')):
        (device / "enrolment.json").write_text(text)
        with pytest.raises(DeploymentError, match=r"enrolment\.json is damaged"):
            read_enrolment(device)


def test_a_folder_that_is_not_enrolled_says_so(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="is not enrolled: give 'fedpeft device enroll"):
        read_enrolment(tmp_path)


def test_a_full_disk_is_one_error_and_made_up_for(door: Any, device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    invitation = door.invite()
    whole: Callable[..., None] = enrolling.write_whole

    def full(path: Path, data: bytes, *, mode: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(enrolling, "write_whole", full)
    with pytest.raises(DeploymentError, match="No space left on device; give the same command again"):
        asked(door, invitation, device)
    monkeypatch.setattr(enrolling, "write_whole", whole)
    assert asked(door, invitation, device).state == "pending"


def test_a_device_that_the_server_forgot_is_told(door: Any, open_door: Any, device: Path) -> None:
    asked(door, door.invite(), device)
    other = open_door()
    record = json.loads((device / "enrolment.json").read_text())
    (device / "enrolment.json").write_text(json.dumps(record | {"door": other.url}))
    with pytest.raises(EnrolmentRefused, match="does not know this device"):
        ask_state(device, clock=door.clock)
