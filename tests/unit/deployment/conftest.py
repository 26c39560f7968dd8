"""A deployment's authority, made once, a clock that tests set, and doors that answer over TLS."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from federated.deployment.certificates import Authority, ca_fingerprint, make_ca, make_server_certificate
from federated.deployment.devices import DeviceBook
from federated.deployment.enrolment import enrolment_routes
from federated.deployment.invitations import Invitation
from federated.deployment.rate_limit import RateLimit


def real_now() -> datetime:
    """The machine's clock: TLS libraries look at no other."""
    return datetime.now(UTC)


@dataclass
class Clock:
    """A clock that stands still until it is moved."""

    now: datetime

    def __call__(self) -> datetime:
        return self.now

    def move(self, **by: float) -> None:
        self.now += timedelta(**by)


@pytest.fixture
def clock() -> Clock:
    """It starts now."""
    return Clock(real_now())


@dataclass(frozen=True)
class Tls:
    """Where an authority's files are."""

    folder: Path
    ca: Authority


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    """An authority with a certificate for this machine; not to be written to."""
    folder = tmp_path_factory.mktemp("tls")
    ca = make_ca(folder, name="federation of the tests", clock=real_now)
    make_server_certificate(folder, ca, hosts=["localhost", "127.0.0.1"], clock=real_now)
    return Tls(folder, ca)


@dataclass
class OpenDoor:
    """A door on a free port of this machine, with TLS, and the book behind it."""

    url: str
    tls: Tls
    book: DeviceBook
    clock: Clock
    told: list[str]

    def invite(self, name: str = "north", *, door: str | None = None, **given: Any) -> Invitation:
        """An invitation to this door."""
        about: dict[str, Any] = {"valid": timedelta(hours=24), "auto_approve": False, "actor": "ada", **given}
        return self.book.invite(name, door=door or self.url, ca_sha256=ca_fingerprint(self.tls.ca.pem), **about)

    def asking(self, **given: Any) -> httpx.Client:
        """A client that trusts the door, and speaks to it as it likes."""
        context = ssl.create_default_context(cadata=self.tls.ca.pem.decode())
        return httpx.Client(base_url=self.url, verify=context, timeout=30, trust_env=False, **given)


class _InThread(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextmanager
def listening(app: FastAPI, folder: Path) -> Iterator[str]:
    """Serves an application with the certificate in a folder; its address."""
    config = uvicorn.Config(
        app,
        port=0,
        ssl_certfile=folder / "server.crt",
        ssl_keyfile=folder / "server.key",
        log_config=None,
        lifespan="off",
        http="h11",
        ws="none",
    )
    server = _InThread(config)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            until = time.monotonic() + 60
            while not server.started:
                assert thread.is_alive()
                assert time.monotonic() < until
                time.sleep(0.01)
            yield f"https://localhost:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


Opened = Callable[..., OpenDoor]


@pytest.fixture
def open_door(tls: Tls, tmp_path: Path, clock: Clock) -> Iterator[Opened]:
    """Opens doors; all are shut at the end."""
    with ExitStack() as stack:

        def opened(**given: Any) -> OpenDoor:
            folder = tmp_path / f"server-{len(list(tmp_path.glob('server-*')))}"
            folder.mkdir()
            book, told = DeviceBook(folder, clock=clock), list[str]()
            certificate = given.pop("folder", tls.folder)
            app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
            about: dict[str, Any] = {"ca_pem": tls.ca.pem, "on_change": told.append, "clock": clock, **given}
            about.setdefault("limit", RateLimit(burst=10_000))
            app.include_router(enrolment_routes(book, **about))
            url = stack.enter_context(listening(app, certificate))
            return OpenDoor(url, tls, book, clock, told)

        yield opened


@pytest.fixture
def door(open_door: Opened) -> OpenDoor:
    """An open door."""
    return open_door()
