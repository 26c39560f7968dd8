"""The door, as devices and strangers find it: real HTTP before a real server that stands for the SuperLink."""

import base64
import hashlib
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from federated.deployment import front
from federated.deployment.certificates import make_ca, make_server_certificate
from federated.deployment.front import FLEET, door_app
from federated.deployment.layout import Layout
from federated.deployment.loopback import free_ports
from federated.deployment.server_config import ServerConfig
from federated.deployment.traffic import STRANGERS, Traffic
from federated.listening import BoundedServer, Bounds

KEY = b"a device's public key"
HEADERS = {"flwr-public-key": base64.b64encode(KEY).decode(), "timestamp": "now"}
NAME = hashlib.sha256(KEY).hexdigest()


class Link(ThreadingHTTPServer):
    """Answers every request with what it got, and remembers it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, str, dict[str, str], int]] = []
        self.status = 200


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Link

    def do_POST(self) -> None:
        body = self._body()
        self.server.seen.append((self.command, self.path, dict(self.headers.items()), len(body)))
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(body) * 2))
        self.end_headers()
        self.wfile.write(body * 2)

    do_GET = do_PUT = do_DELETE = do_POST  # noqa: N815 - the standard library's names

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def serving(app: Any, port: int, **more: Any) -> Iterator[None]:
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", ws="none", **more))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


class Door:
    def __init__(self, folder: Path, link: Link) -> None:
        port = free_ports(1)[0]
        self.config = ServerConfig(
            door_port=port, superlink_port=link.server_address[1], insecure=True, max_request_mb=0.01
        )
        self.traffic = Traffic(folder / "traffic.json")
        self.app = door_app(Layout(folder), self.config, self.traffic)
        self.port = port
        self.link = link

    def post(self, path: str, body: bytes = b"x", **more: Any) -> httpx.Response:
        return httpx.post(f"http://127.0.0.1:{self.port}{path}", content=body, **{"headers": HEADERS, **more})

    def raw(self, path: str, method: str = "POST") -> int:
        """A path as it is, with nothing made normal."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.putrequest(method, path, skip_host=False)
            connection.putheader("Content-Length", "0")
            connection.endheaders()
            return connection.getresponse().status
        finally:
            connection.close()


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    link = Link()
    threading.Thread(target=link.serve_forever, args=(0.01,), daemon=True).start()
    door = Door(tmp_path, link)
    try:
        with serving(door.app, door.port):
            yield door
    finally:
        link.shutdown()
        link.server_close()


@pytest.mark.parametrize("name", sorted(FLEET))
def test_what_supernodes_ask_is_passed_on(door: Door, name: str) -> None:
    answer = door.post(f"/v1/fleet/{name}", b"question")
    assert (answer.status_code, answer.content) == (200, b"questionquestion")
    assert door.link.seen[-1][:2] == ("POST", f"/v1/fleet/{name}")


def test_a_nodes_proof_is_passed_on_and_a_connections_own_headers_are_not(door: Door) -> None:
    door.post("/v1/fleet/get-run", headers={**HEADERS, "Connection": "keep-alive, x-own", "Proxy-Authorization": "no"})
    headers = {name.lower(): value for name, value in door.link.seen[-1][2].items()}
    assert headers["flwr-public-key"] == HEADERS["flwr-public-key"]
    assert headers["timestamp"] == "now"
    assert "proxy-authorization" not in headers


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/v1/fleet/start-run",
        "/v1/fleet/",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/..%2fcontrol%2fstart-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/get-run/../../control/start-run",
        "/v1/fleet/get-run?x=1",
        "/v1/fleet/get%2drun",
        "//v1/control/start-run",
        "/V1/fleet/get-run",
        "/v1/fleet/get-run/",
        "/",
        "/docs",
        "/openapi.json",
        "/metrics",
        "http://127.0.0.1/v1/control/start-run",
    ],
)
def test_nothing_else_is(door: Door, path: str) -> None:
    assert door.raw(path) in (404, 405, 307)
    assert not door.link.seen


@pytest.mark.parametrize("host", ["x/v1/control/start-run#", "x/v1/control/start-run?", "x@127.0.0.1:1", "x y"])
def test_the_host_header_has_no_part_in_where_a_request_goes(
    door: Door, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from starlette import datastructures

    # Releases of Starlette before 1.0 take any header into `request.url`; FastAPI 0.115 comes with such a one.
    monkeypatch.setattr(datastructures, "_HOST_RE", re.compile(".*"), raising=False)
    door.post("/v1/fleet/get-run", headers={**HEADERS, "Host": host})
    assert [path for _, path, _, _ in door.link.seen] == ["/v1/fleet/get-run"]


def spoken(port: int, request: bytes) -> bytes:
    """What comes back for bytes as they are."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        found = b""
        while part := connection.recv(65_536):
            found += part
        return found


HIDDEN = b"POST /v1/control/start-run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
FLEET_LINE = b"POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    "request_bytes",
    [
        FLEET_LINE + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        FLEET_LINE
        + b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n"
        + f"{len(HIDDEN):x}\r\n".encode()
        + HIDDEN
        + b"\r\n0\r\n\r\n",
        FLEET_LINE + b"Content-Length: 0\r\nContent-Length: 70\r\n\r\n" + HIDDEN,
        FLEET_LINE + b"Content-Length: 70\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
        FLEET_LINE + b"Content-Length: +0\r\n\r\n" + HIDDEN,
        FLEET_LINE + b"Transfer-Encoding: x, chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        FLEET_LINE + b"Transfer-Encoding : chunked\r\nContent-Length: 70\r\n\r\n0\r\n\r\n" + HIDDEN,
        FLEET_LINE + b"X: y\rContent-Length: 0\r\n\r\n" + HIDDEN,
        FLEET_LINE + b"X: y\n\nPOST /v1/control/start-run HTTP/1.1\r\n\r\n",
        FLEET_LINE + b"Connection: content-length\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
        FLEET_LINE + b"Content-Length: 0\r\n\r\n" + HIDDEN,
        FLEET_LINE + b"Upgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
        b"POST http://127.0.0.1:9440/v1/control/start-run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
        b"POST /v1/fleet/get-run#/../control/start-run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
        b"POST /v1/fleet/get-run;/../control HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
        b"POST /v1/control/start-run HTTP/1.0\r\n\r\n",
        b"CONNECT 127.0.0.1:9440 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        FLEET_LINE + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
    ],
)
def test_no_second_request_is_smuggled_in(door: Door, request_bytes: bytes) -> None:
    spoken(door.port, request_bytes)
    assert {path for _, path, _, _ in door.link.seen} <= {"/v1/fleet/get-run"}
    assert all(size in (0, len(HIDDEN)) for *_, size in door.link.seen)


def test_who_leaves_in_the_middle_costs_a_line_and_no_trace(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_connection(("127.0.0.1", door.port), timeout=10) as connection:
        connection.sendall(FLEET_LINE + b"Content-Length: 5000\r\n\r\nhalf")
        time.sleep(0.3)
    time.sleep(0.5)
    assert door.post("/v1/fleet/get-run").status_code == 200
    assert "Traceback" not in caplog.text


def test_who_sends_nothing_more_is_not_waited_for(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "_PAUSE", 0.2)
    with socket.create_connection(("127.0.0.1", door.port), timeout=10) as connection:
        connection.sendall(FLEET_LINE + b"Content-Length: 5000\r\n\r\nhalf")
        assert connection.recv(20).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "CONNECT", "TRACE"])
def test_no_other_method_is(door: Door, method: str) -> None:
    assert door.raw("/v1/fleet/get-run", method) in (404, 405)
    assert not door.link.seen


def test_what_is_refused_is_counted(door: Door) -> None:
    door.raw("/v1/control/start-run")
    door.raw("/v1/fleet/start-run")
    assert door.traffic.refused == 2


def test_a_body_over_the_limit_is_refused(door: Door) -> None:
    assert door.post("/v1/fleet/push-object", bytes(10_001)).status_code == 413
    assert door.post("/v1/fleet/push-object", bytes(10_000)).status_code == 200


def test_a_body_that_does_not_say_its_length_is_cut_off_there(door: Door) -> None:
    parts = (bytes(1_000) for _ in range(20))
    answer = httpx.post(f"http://127.0.0.1:{door.port}/v1/fleet/push-object", content=parts, headers=HEADERS)
    assert answer.status_code == 413


def test_bytes_are_counted_by_key(door: Door) -> None:
    door.post("/v1/fleet/push-object", bytes(300))
    door.post("/v1/fleet/push-object", bytes(200))
    flow = door.traffic.flows[NAME]
    assert (flow.up, flow.down, flow.requests) == (500, 1000, 2)


@pytest.mark.parametrize("header", [None, "not base64!", "é"])
def test_bytes_without_a_key_are_counted_too(door: Door, header: str | None) -> None:
    headers = {} if header is None else {"flwr-public-key": header.encode()}
    door.post("/v1/fleet/push-object", bytes(300), headers=headers)
    assert door.traffic.flows[""].up == 300


def test_keys_that_the_superlink_does_not_let_in_have_one_counter(door: Door) -> None:
    door.post("/v1/fleet/pull-messages", bytes(10))
    for number, status in enumerate((400, 401, 403, 412, 415)):
        door.link.status = status
        key = base64.b64encode(bytes([number])).decode()
        door.post("/v1/fleet/pull-messages", bytes(10), headers={"flwr-public-key": key})
    door.post("/v1/fleet/pull-messages", bytes(10))  # one that was let in before stays itself
    assert door.traffic.flows.keys() == {NAME, STRANGERS}
    assert [door.traffic.flows[key].requests for key in (NAME, STRANGERS)] == [2, 5]


def test_who_says_nothing_is_not_kept(tmp_path: Path) -> None:
    door = Door(tmp_path, Link())
    quick, place = Bounds(0.3, 5.0).protocol, ("127.0.0.1", door.port)
    with serving(door.app, door.port, http=quick), socket.create_connection(place, timeout=10) as connection:
        assert connection.recv(1) == b""
    door.link.server_close()


def test_nor_who_was_answered_before_it_had_sent_all(tmp_path: Path) -> None:
    door = Door(tmp_path, Link())
    quick, place = Bounds(0.3, 0.3).protocol, ("127.0.0.1", door.port)
    with serving(door.app, door.port, http=quick), socket.create_connection(place, timeout=10) as connection:
        connection.sendall(b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 404")
        connection.sendall(b"x")
        assert connection.recv(1) == b""
    door.link.server_close()


def test_nor_who_does_not_shake_hands(tmp_path: Path) -> None:
    layout, (port,) = Layout(tmp_path), free_ports(1)
    now = lambda: datetime.now(UTC)  # noqa: E731
    authority = make_ca(layout.ca.parent, name="clinics", clock=now)
    make_server_certificate(layout.ca.parent, authority, hosts=["127.0.0.1"], clock=now)
    tls = {"ssl_certfile": str(layout.certificate), "ssl_keyfile": str(layout.key)}
    bounds = Bounds(0.5, 0.5)
    app = door_app(layout, ServerConfig(door_port=port, insecure=True), Traffic(tmp_path / "traffic.json"))
    config = uvicorn.Config(app, port=port, log_level="error", ws="none", http=bounds.protocol, **tls)
    server = BoundedServer(config, bounds)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until_started(server)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            assert connection.recv(1) == b""
        assert httpx.get(f"https://127.0.0.1:{port}/healthz", verify=False).text == "ok\n"  # noqa: S501 - its own
    finally:
        server.should_exit = True
        thread.join()


def until_started(server: uvicorn.Server) -> None:
    end = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_one_address_has_but_a_part_of_the_connections(caplog: pytest.LogCaptureFixture) -> None:
    bounds = Bounds(1.0, 1.0, each=2)
    assert [bounds.enter("2001:db8::1"), bounds.enter("2001:db8::2"), bounds.enter("2001:db8::3")] == [
        True,
        True,
        False,
    ]
    assert bounds.enter("192.0.2.1")
    bounds.leave("2001:db8::3")
    bounds.leave("2001:db8::2")
    assert bounds.enter("2001:db8::4")
    here = ("127.0.0.1", "::1", "::ffff:127.0.0.1", "")
    assert all(bounds.enter(one) for one in here for _ in range(5))  # a proxy may stand there
    assert caplog.text.count("2001:db8::/64 has 2 connections") == 1


def test_a_superlink_that_is_away_is_said(door: Door) -> None:
    door.link.shutdown()
    door.link.server_close()
    answer = door.post("/v1/fleet/get-run")
    assert answer.status_code == 502
    assert "SuperLink does not answer" in answer.text


def test_health(door: Door) -> None:
    assert httpx.get(f"http://127.0.0.1:{door.port}/healthz").text == "ok\n"


def test_traffic_goes_on_from_what_was_written(tmp_path: Path) -> None:
    first = Traffic(tmp_path / "traffic.json")
    first.flow("a").up = 7
    first.note()
    assert Traffic.of(first.path).flows["a"].up == 7


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"flows": {"a": {"sideways": 1}}, "refused": 0})])
def test_damaged_traffic_begins_anew_and_is_said(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "traffic.json"
    path.write_text(text)
    assert not Traffic.of(path).flows
    assert "begins anew" in caplog.text


def test_keys_are_bounded(tmp_path: Path) -> None:
    traffic = Traffic(tmp_path / "traffic.json")
    for number in range(10_050):
        traffic.flow(str(number)).up += 1
    assert len(traffic.flows) == 10_001
    assert traffic.flows[STRANGERS].up == 50
