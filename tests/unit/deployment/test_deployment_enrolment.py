"""The door's routes against whoever can reach them: what is let in, and that refusals tell nothing."""

from __future__ import annotations

import hashlib
import json
import logging
import socket
import ssl
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from federated.deployment import enrolment
from federated.deployment.certificates import ca_fingerprint
from federated.deployment.enrolment_messages import (
    EnrolBody,
    StateBody,
    asks_for_itself,
    enrol_body,
    proves,
    state_body,
)
from federated.deployment.invitations import Invitation, encoded
from federated.deployment.keys import DeviceKeys
from federated.deployment.rate_limit import RateLimit
from federated.errors import DeploymentError

LOG = "federated.deployment.enrolment"


def new_keys() -> DeviceKeys:
    return DeviceKeys(ec.generate_private_key(ec.SECP384R1()), Ed25519PrivateKey.generate())


def body_of(invitation: Invitation, keys: DeviceKeys, **changed: Any) -> dict[str, Any]:
    """A device's request; what is changed, it signs."""
    about: dict[str, Any] = {
        "client_id": invitation.client_id,
        "token": invitation.token,
        "token_sha256": invitation.token_sha256,
        "ca_sha256": invitation.ca_sha256,
        **changed,
    }
    return enrol_body(keys, **about).model_dump()


def told(response: httpx.Response) -> tuple[int, str, str]:
    """What a stranger sees of a refusal."""
    record = response.json()
    assert set(record) == {"code", "message", "at"}
    return response.status_code, record["code"], record["message"]


@pytest.fixture
def http(door: Any) -> Any:
    with door.asking() as client:
        yield client


def test_the_authority_is_shown(door: Any, http: httpx.Client) -> None:
    response = http.get("/enrol/ca.pem")
    assert (response.status_code, response.content) == (200, door.tls.ca.pem)


def test_a_good_request_comes_in(door: Any, http: httpx.Client) -> None:
    response = http.post("/enrol", json=body_of(door.invite(), new_keys()))
    assert response.status_code == 200
    at = int(door.clock().timestamp())
    assert response.json() == {"client_id": "north", "state": "pending", "at": at}


def test_nothing_else_is_served(door: Any, http: httpx.Client) -> None:
    for path in ("/", "/enrol/", "/enrol/devices", "/docs", "/openapi.json", "/devices.json", "/enrol/../devices.db"):
        assert http.get(path, follow_redirects=True).status_code in (404, 405)
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS"):
        assert http.request(method, "/enrol").status_code == 405
    assert http.get("/enrol").status_code == 405


def test_refusals_are_all_alike(door: Any, http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever tries learns neither which names there are, nor whether a token was ever good; the operator does."""
    used, gone, late = door.invite("used"), door.invite("gone"), door.invite("late", valid=timedelta(hours=1))
    http.post("/enrol", json=body_of(used, new_keys()))
    door.book.revoke("gone", actor="ada", reason="x")
    door.clock.move(hours=2)
    good = door.invite("good")
    strange = {"token": bytes(32), "token_sha256": hashlib.sha256(bytes(32)).digest()}
    bodies = [
        body_of(used, new_keys()),
        body_of(gone, new_keys()),
        body_of(late, new_keys()),
        body_of(good, new_keys(), **strange),
        body_of(good, new_keys(), client_id="nobody"),
        body_of(good, new_keys(), ca_sha256="cd" * 32),  # signed for another deployment
    ]
    with caplog.at_level(logging.INFO, logger=LOG):
        seen = [http.post("/enrol", json=body) for body in bodies]
    assert {told(one) for one in seen} == {(403, "refused", "this invitation or this key opens nothing here")}
    assert len({json.dumps(sorted(one.headers)) for one in seen}) == 1
    lines = [record.getMessage() for record in caplog.records if record.name == LOG]
    for word in ("used at", "withdrawn at", "ended at", "no invitation of this name", "a proof does not hold"):
        assert any(word in line for line in lines), word
    assert len(door.book.devices()) == 1


def test_no_token_is_logged(door: Any, http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    invitation = door.invite()
    with caplog.at_level(logging.DEBUG):
        http.post("/enrol", json=body_of(invitation, new_keys()))
        http.post("/enrol", json=body_of(invitation, new_keys()))
        http.post("/enrol", json={"token": encoded(invitation.token)})
    assert encoded(invitation.token) not in caplog.text
    assert "AAAAE2VjZHNh" not in caplog.text


@pytest.mark.parametrize("field", ["node_proof", "update_proof", "node_key", "update_key", "client_id", "token"])
def test_a_proof_covers_every_field(door: Any, http: httpx.Client, field: str) -> None:
    """What another device signed, and what was changed on the way, is worth nothing."""
    door.invite("south")
    invitation = door.invite()
    good, other = body_of(invitation, new_keys()), body_of(invitation, new_keys())
    other |= {"client_id": "south", "token": encoded(bytes(32))}
    assert told(http.post("/enrol", json=good | {field: other[field]}))[:2] == (403, "refused")
    assert not door.book.devices()
    assert http.post("/enrol", json=good).status_code == 200


@pytest.mark.parametrize(
    "changed",
    [
        {"client_id": "south"},
        {"node_key": new_keys().node_line},
        {"update_key": encoded(new_keys().update_raw)},
        {"node_proof": "A" * 138},
        {"update_proof": "A" * 86},
        {},
    ],
    ids=lambda changed: "".join(changed) or "nothing",
)
def test_a_statement_names_what_is_asked_for(changed: dict[str, str]) -> None:
    """By itself, whatever the book would say besides."""
    token_sha256, ca_sha256 = bytes(32), "ab" * 32
    good = enrol_body(
        new_keys(), client_id="north", token=bytes(32), token_sha256=token_sha256, ca_sha256=ca_sha256
    ).model_dump()
    about = {"token_sha256": token_sha256, "ca_sha256": ca_sha256}
    assert proves(EnrolBody(**good | changed), **about) is not bool(changed)
    assert not proves(EnrolBody(**good), **about | {"token_sha256": bytes([1]) * 32})
    assert not proves(EnrolBody(**good), **about | {"ca_sha256": "cd" * 32})


@pytest.mark.parametrize("changed", [{"client_id": "south"}, {"at": 8}, {"proof": "A" * 86}, {}], ids=str)
def test_a_question_names_who_asks_and_when(changed: dict[str, Any]) -> None:
    keys = new_keys()
    good = state_body(keys, client_id="north", at=7, ca_sha256="ab" * 32).model_dump()
    asked = StateBody(**good | changed)
    assert asks_for_itself(asked, update_key=keys.update_raw, ca_sha256="ab" * 32) is not bool(changed)
    assert not asks_for_itself(StateBody(**good), update_key=keys.update_raw, ca_sha256="cd" * 32)
    assert not asks_for_itself(StateBody(**good), update_key=new_keys().update_raw, ca_sha256="ab" * 32)


def test_one_statement_is_not_taken_for_another() -> None:
    """What the update key signs to enrol is not what it signs to ask, nor what it signs of an update."""
    keys = new_keys()
    body = enrol_body(keys, client_id="north", token=bytes(32), token_sha256=bytes(32), ca_sha256="ab" * 32)
    asked = StateBody(client_id="north", at=7, proof=body.update_proof)
    assert not asks_for_itself(asked, update_key=keys.update_raw, ca_sha256="ab" * 32)


def test_a_thief_of_the_invitation_cannot_enrol_somebody_elses_public_keys(door: Any, http: httpx.Client) -> None:
    invitation, victim, thief = door.invite(), new_keys(), new_keys()
    for node, update in ((victim.node, thief.update), (thief.node, victim.update)):
        forged = body_of(invitation, DeviceKeys(node, update))
        shown = body_of(invitation, thief)
        forged |= {"node_proof": shown["node_proof"], "update_proof": shown["update_proof"]}
        assert told(http.post("/enrol", json=forged))[:2] == (403, "refused")


@pytest.mark.parametrize(
    "changed",
    [
        {"client_id": "../../root"},
        {"client_id": "n\u043erth"},
        {"client_id": "north\u200b"},
        {"client_id": "x" * 65},
        {"client_id": ""},
        {"client_id": None},
        {"client_id": ["north"]},
        {"client_id": 7},
        {"token": "!" * 43},
        {"token": "A" * 44},
        {"update_key": "A" * 42},
        {"node_key": 1},
        {"node_proof": ""},
        {"update_proof": "A" * 1000},
        {"more": True},
        {"state": "approved"},
        {"auto_approve": True},
        {"token": ...},
    ],
    ids=str,
)
def test_a_body_of_another_shape_is_refused(door: Any, http: httpx.Client, changed: dict[str, Any]) -> None:
    body = body_of(door.invite(), new_keys()) | changed
    body = {key: value for key, value in body.items() if value is not ...}
    status, code, message = told(http.post("/enrol", json=body))
    assert (status, code) == (400, "malformed")
    assert len(message) < 100
    assert not door.book.devices()


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"{" * 4000, b"[" * 4000, b'{"client_id":"north"' * 100, b"NaN", b"\0"],
    ids=lambda data: f"{data[:8]!r} {len(data)}",
)
@pytest.mark.parametrize("path", ["/enrol", "/enrol/state"])
def test_a_body_that_is_no_record_is_refused(http: httpx.Client, path: str, data: bytes) -> None:
    assert told(http.post(path, content=data))[:2] == (400, "malformed")


@pytest.mark.parametrize("path", ["/enrol", "/enrol/state"])
@pytest.mark.parametrize("size", [4097, 10**6])
def test_a_large_body_is_refused(http: httpx.Client, path: str, size: int) -> None:
    assert told(http.post(path, content=b"x" * size))[:2] == (413, "too_large")


def test_a_large_body_of_unknown_length_is_refused(http: httpx.Client) -> None:
    def pieces() -> Any:
        for _ in range(100):
            yield b"x" * 100

    assert told(http.post("/enrol", content=pieces()))[:2] == (413, "too_large")


def raw(door: Any, *parts: bytes, pause: float = 0.0) -> bytes:
    """What the door says to bytes that no client would send."""
    context = ssl.create_default_context(cadata=door.tls.ca.pem.decode())
    port = int(door.url.rpartition(":")[2])
    with (
        socket.create_connection(("localhost", port), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as tls,
    ):
        for part in parts:
            tls.sendall(part)
            time.sleep(pause)
        return bytes(tls.recv(4096))


def test_a_body_that_never_comes_is_not_waited_for(door: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrolment, "_BODY_SECONDS", 0.3)
    said = raw(door, b"POST /enrol HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\nab")
    assert said.startswith(b"HTTP/1.1 408")


def test_a_connection_that_ends_in_the_middle_harms_nobody(
    door: Any, http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    context = ssl.create_default_context(cadata=door.tls.ca.pem.decode())
    port = int(door.url.rpartition(":")[2])
    with socket.create_connection(("localhost", port)) as plain:
        tls = context.wrap_socket(plain, server_hostname="localhost")
        tls.sendall(b"POST /enrol HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\nab")
        tls.close()
    assert http.post("/enrol", json=body_of(door.invite(), new_keys())).status_code == 200
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("length", [b"-1", b"1e9", b"99999999999999999999999", b"ab"])
def test_odd_lengths_are_refused(door: Any, length: bytes) -> None:
    said = raw(door, b"POST /enrol HTTP/1.1\r\nhost: localhost\r\ncontent-length: " + length + b"\r\n\r\nab")
    assert said.startswith((b"HTTP/1.1 400", b"HTTP/1.1 413"))


def test_plain_http_gets_nothing(door: Any) -> None:
    port = int(door.url.rpartition(":")[2])
    with socket.create_connection(("localhost", port), timeout=30) as plain:
        plain.sendall(b"GET /enrol/ca.pem HTTP/1.1\r\nhost: localhost\r\n\r\n")
        with suppress(ConnectionResetError):
            assert b"HTTP" not in plain.recv(4096)


def test_one_address_is_heard_so_often(open_door: Any) -> None:
    door = open_door(limit=RateLimit(burst=3, per_second=0.5))
    invitation = door.invite()
    with door.asking() as http:
        seen = [http.post("/enrol/state", content=b"") for _ in range(2)] + [http.get("/enrol/ca.pem")]
        assert [one.status_code for one in seen] == [400, 400, 200]
        for refused in (http.post("/enrol", json=body_of(invitation, new_keys())), http.get("/enrol/ca.pem")):
            assert told(refused)[:2] == (429, "too_often")
            assert int(refused.headers["retry-after"]) in (1, 2)
    assert not door.book.devices()


def test_a_request_that_is_sent_again_changes_nothing(door: Any, http: httpx.Client) -> None:
    """Somebody who recorded it learns the state, and gets no key."""
    body = body_of(door.invite(), new_keys())
    first, again = http.post("/enrol", json=body), http.post("/enrol", json=body)
    assert first.json() == again.json()
    assert len(door.book.devices()) == 1
    assert door.told == ["north"]


def test_keys_that_are_in_the_book_are_refused_to_who_has_a_token(door: Any, http: httpx.Client) -> None:
    keys = new_keys()
    http.post("/enrol", json=body_of(door.invite(), keys))
    assert told(http.post("/enrol", json=body_of(door.invite("south"), keys)))[:2] == (409, "keys_used")


def state_of(http: httpx.Client, door: Any, keys: DeviceKeys, **changed: Any) -> httpx.Response:
    about: dict[str, Any] = {
        "client_id": "north",
        "at": int(door.clock().timestamp()),
        "ca_sha256": ca_fingerprint(door.tls.ca.pem),
        **changed,
    }
    return http.post("/enrol/state", json=state_body(keys, **about).model_dump())


def test_a_device_learns_its_own_state(door: Any, http: httpx.Client) -> None:
    keys = new_keys()
    http.post("/enrol", json=body_of(door.invite(), keys))
    assert state_of(http, door, keys).json()["state"] == "pending"
    door.book.approve("north", actor="ada")
    assert state_of(http, door, keys).json()["state"] == "approved"
    door.book.revoke("north", actor="ada", reason="x")
    assert state_of(http, door, keys).json()["state"] == "revoked"
    http.post("/enrol", json=body_of(door.invite(auto_approve=True), new_keys()))
    assert state_of(http, door, keys).json()["state"] == "revoked"  # the name is approved; this key is not


def test_nobody_else_learns_it(door: Any, http: httpx.Client) -> None:
    keys = new_keys()
    http.post("/enrol", json=body_of(door.invite(), keys))
    body = state_body(keys, client_id="north", at=0, ca_sha256=ca_fingerprint(door.tls.ca.pem)).model_dump()
    seen = [
        state_of(http, door, new_keys()),
        state_of(http, door, keys, client_id="nobody"),
        state_of(http, door, keys, ca_sha256="cd" * 32),
        http.post("/enrol/state", json=body | {"at": int(door.clock().timestamp())}),
    ]
    assert {told(one) for one in seen} == {(403, "refused", "this invitation or this key opens nothing here")}


@pytest.mark.parametrize("seconds", [-301, 301, -(10**6)])
def test_a_question_of_another_time_is_refused(door: Any, http: httpx.Client, seconds: int) -> None:
    keys = new_keys()
    http.post("/enrol", json=body_of(door.invite(), keys))
    at = int(door.clock().timestamp()) + seconds
    status, code, message = told(state_of(http, door, keys, at=at))
    assert (status, code) == (403, "clock")
    assert f"{abs(seconds)} s {'ahead of' if seconds > 0 else 'behind'} the door's" in message


def test_what_follows_may_fail_without_harm(open_door: Any, caplog: pytest.LogCaptureFixture) -> None:
    done = threading.Event()

    def fails(client_id: str) -> None:
        done.set()
        raise RuntimeError(f"no SuperLink for {client_id}")

    door = open_door(on_change=fails)
    with door.asking() as http:
        assert http.post("/enrol", json=body_of(door.invite(), new_keys())).status_code == 200
        assert done.wait(30)
        assert http.get("/enrol/ca.pem").status_code == 200
    assert "what follows from it failed: no SuperLink for north" in caplog.text


def test_a_book_that_cannot_be_used_is_said_without_details(door: Any, http: httpx.Client) -> None:
    invitation = door.invite()
    for path in door.book.folder.glob("devices.db*"):
        path.unlink()
    door.book.path.write_bytes(b"nothing of the kind" * 1000)
    status, code, message = told(http.post("/enrol", json=body_of(invitation, new_keys())))
    assert (status, code) == (503, "failed")
    assert str(door.book.folder) not in message


def test_routes_need_an_authority(door: Any) -> None:
    with pytest.raises(DeploymentError, match="found no certificate"):
        enrolment.enrolment_routes(door.book, ca_pem=b"", on_change=print)


class TestRateLimit:
    """The buckets by themselves."""

    def test_a_bucket_empties_and_fills(self) -> None:
        now = [0.0]
        limit = RateLimit(burst=2, per_second=0.5, clock=lambda: now[0])
        assert [limit.wait("a") for _ in range(3)] == [0.0, 0.0, 2.0]
        now[0] = 1.0
        assert limit.wait("a") == 1.0
        now[0] = 2.0
        assert limit.wait("a") == 0.0
        now[0] = 1000.0
        assert [limit.wait("a") for _ in range(3)] == [0.0, 0.0, 2.0]

    def test_addresses_do_not_pay_for_each_other(self) -> None:
        limit = RateLimit(burst=1, clock=lambda: 0.0)
        assert [limit.wait(one) for one in ("10.0.0.1", "10.0.0.2", "unknown")] == [0.0] * 3
        assert limit.wait("10.0.0.1") > 0

    def test_a_network_of_one_owner_is_one_address(self) -> None:
        limit = RateLimit(burst=1, clock=lambda: 0.0)
        assert limit.wait("2001:db8::1") == 0.0
        assert limit.wait("2001:db8::2%eth0") > 0
        assert limit.wait("2001:db8:0:1::1") == 0.0

    def test_an_old_address_in_new_clothes_is_that_address_alone(self) -> None:
        limit = RateLimit(burst=1, clock=lambda: 0.0)
        assert limit.wait("::ffff:10.0.0.1") == 0.0
        assert limit.wait("::ffff:10.0.0.2") == 0.0

    def test_many_addresses_take_bounded_memory(self) -> None:
        limit = RateLimit(burst=1, addresses=100, clock=lambda: 0.0)
        for number in range(10_000):
            limit.wait(f"10.0.{number // 256}.{number % 256}")
        assert len(limit._buckets) == 100
