"""Clients that say nothing, take nothing, or ask for much: none of them keeps the others from being answered."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from federated.device import Token
from federated.device.serving import Limits

Sites = Callable[..., Any]


@contextmanager
def connected(site: Any, *, buffer: int = 0) -> Iterator[socket.socket]:
    with socket.socket() as made:
        if buffer:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        made.connect((site.public.base_url.host, site.public.base_url.port))
        made.settimeout(30)
        yield made


def head(site: Any, path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    told = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{told}content-length: {len(content)}\r\n\r\n".encode() + content


@pytest.mark.parametrize("said", [b"", b"GET /healthz HT"])
def test_connections_without_a_request_do_not_stay(sites: Sites, said: bytes) -> None:
    with sites(limits=Limits(connections=3, head_seconds=0.5)) as site, connected(site) as one, connected(site) as two:
        for quiet in (one, two):
            quiet.sendall(said)
        with connected(site) as third:
            third.sendall(said)
            for quiet in (one, two, third):
                assert quiet.recv(1) == b""
        assert httpx.get(f"{site.public.base_url}/healthz").status_code == 200


def test_a_kept_connection_does_not_stay_after_half_a_request(sites: Sites) -> None:
    with sites(limits=Limits(head_seconds=0.5)) as site, connected(site) as kept:
        whole = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"
        for _ in range(2):
            kept.sendall(whole)
            got = b""
            while not got.endswith(b"}"):
                got += kept.recv(10_000)
            assert got.startswith(b"HTTP/1.1 200")
        kept.sendall(whole[:-2])
        assert kept.recv(1) == b""


def test_a_long_answer_is_no_late_head(sites: Sites) -> None:
    with sites(limits=Limits(head_seconds=0.2)) as site:
        asking = threading.Timer(0.8, lambda: site.backend.step.release(1))
        asking.start()
        assert site.ask(prompt="slow", max_tokens=1).status_code == 200


def test_a_client_that_takes_nothing_is_let_go(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    def tokens(self: Any, handle: float, text: str, sampling: Any) -> Iterator[Token]:
        for number in range(sampling.max_tokens):
            yield Token(number, "x" * (100_000 if text == "much" else 1), -0.5, None)

    with sites(limits=Limits(generations=1, request_seconds=1.5, wait_seconds=25)) as site:
        monkeypatch.setattr(type(site.backend), "_tokens", tokens)
        with connected(site, buffer=2048) as greedy:
            greedy.sendall(head(site, "/v1/completions", {"prompt": "much", "stream": True, "max_tokens": 1000}))
            site.wait_for(lambda: site.service.writer.gate.working == 1)
            assert site.ask(max_tokens=1).status_code == 200  # after its time
            site.wait_no_pins()


def test_a_client_that_takes_its_time_gets_all_of_it(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    def tokens(self: Any, handle: float, text: str, sampling: Any) -> Iterator[Token]:
        for number in range(1, sampling.max_tokens + 1):
            yield Token(number, "x" * 200_000, -0.5, "length" if number == sampling.max_tokens else None)

    with sites(limits=Limits(request_seconds=20)) as site, connected(site, buffer=2048) as slow:
        monkeypatch.setattr(type(site.backend), "_tokens", tokens)
        slow.sendall(head(site, "/v1/completions", {"prompt": "a", "stream": True, "max_tokens": 40}))
        time.sleep(1)
        got = bytearray()
        while not got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            piece = slow.recv(1 << 16)
            assert piece
            got += piece
        assert got.count(b"x") > 40 * 200_000


def test_the_wait_ends_where_the_work_begins(sites: Sites) -> None:
    """What takes longer than a request may wait is answered, up to the longest work."""
    with sites(speaks="labels", limits=Limits(wait_seconds=0.3, request_seconds=20)) as site:
        threading.Timer(1.0, site.backend.hold.set).start()
        assert site.ask("/classify", input="hold").status_code == 200


def test_work_that_takes_too_long_is_told_apart_from_waiting(sites: Sites) -> None:
    with sites(speaks="labels", limits=Limits(wait_seconds=20, request_seconds=0.5)) as site:
        late = site.ask("/classify", input="hold")
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        assert "send fewer inputs" in late.json()["error"]["message"]
        site.backend.hold.set()
        assert site.ask("/classify", input="a").status_code == 200
        site.wait_no_pins()


def test_off_is_the_same_kind_of_value(site: Any) -> None:
    """``logprobs: 0`` asks for the chosen tokens' logprobs; ``n: true`` is no number."""
    for field, value in (("logprobs", 0), ("n", True), ("echo", 0), ("logit_bias", False)):
        told = site.ask(**{field: value})
        assert (told.status_code, field in told.json()["error"]["message"]) == (400, True)
    assert site.ask(presence_penalty=0.0, n=1, echo=False, max_tokens=1).status_code == 200
