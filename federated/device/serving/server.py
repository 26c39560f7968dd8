"""Listeners, and the event loop that they share: starts, drains, stops.

A listener is a port or a Unix socket with its own application and tokens. Sockets are bound before anything is served,
so that a port that is taken is an error at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from federated.device.serving.admin import ADMIN_PATHS, make_admin_app
from federated.device.serving.application import PATHS, make_app
from federated.device.serving.credentials import Tokens
from federated.device.serving.guard import Door, Guard
from federated.device.serving.service import Service
from federated.errors import DeviceError
from federated.listening import Bounds

__all__ = ["Listener", "admin_listener", "public_listener", "serve"]

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HEADER_BYTES = 16_384


@dataclass(frozen=True)
class Listener:
    """Where an application listens.

    Args:
        app: guarded already.
        bound: its socket.
        place: for people: a URL, or the socket's path.
    """

    app: ASGIApp
    bound: socket.socket
    place: str


def public_listener(
    service: Service,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    tokens: Tokens | None = None,
    anonymous: bool = False,
) -> Listener:
    """The listener for whoever asks.

    Args:
        service: answers.
        host: address to bind.
        port: 0 takes a free one.
        tokens: that open it.
        anonymous: whether an address that others reach may be served without tokens.

    Raises:
        DeviceError: if others could reach it without a token, or the address cannot be bound.
    """
    tokens = tokens or Tokens()
    loopback = host in _LOOPBACK
    if not (loopback or tokens or anonymous):
        raise DeviceError(
            f"{host} can be reached by others and no token is set; give --token-file (or FEDPEFT_SERVE_TOKEN), "
            "or say that everybody may ask with --allow-anonymous"
        )
    hosts = None if tokens or not loopback else (*_LOOPBACK[:2], "[::1]")
    door = Door(tokens, hosts)
    guard = Guard(make_app(service), door=door, limits=service.limits, metrics=service.metrics, paths=PATHS)
    bound = _tcp(host, port)
    return Listener(guard, bound, f"http://{_shown(host)}:{bound.getsockname()[1]}")


def admin_listener(
    service: Service, *, tokens: Tokens, host: str = "127.0.0.1", port: int = 0, path: Path | None = None
) -> Listener:
    """The listener for whoever runs the server.

    Args:
        service: is changed.
        tokens: that open it; none is fine for a Unix socket, which its owner alone can open.
        host: address to bind.
        port: 0 takes a free one.
        path: of a Unix socket, instead of host and port.

    Raises:
        DeviceError: without a token on a port, or if the place cannot be bound.
    """
    if path is None and not tokens:
        raise DeviceError(
            "an admin port needs a token of its own; give --admin-token-file (or FEDPEFT_ADMIN_TOKEN), "
            "or use --admin-socket, which only its owner can open"
        )
    app = make_admin_app(service)
    guard = Guard(app, door=Door(tokens), limits=service.limits, metrics=service.metrics, paths=ADMIN_PATHS)
    if path is not None:
        return Listener(guard, _unix(path), str(path))
    bound = _tcp(host, port)
    return Listener(guard, bound, f"http://{_shown(host)}:{bound.getsockname()[1]}")


def serve(
    service: Service,
    listeners: Sequence[Listener],
    *,
    started: Callable[[], object] = lambda: None,
    stop: threading.Event | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then let requests under way finish.

    Args:
        service: behind all listeners.
        listeners: their sockets are closed at the end.
        started: called once requests are answered.
        stop: ends it as well; the only way where this is not the main thread.
    """
    try:
        asyncio.run(_serve(service, listeners, started, stop or threading.Event()))
    finally:
        for listener in listeners:
            listener.bound.close()
            if listener.bound.family == socket.AF_UNIX:
                Path(listener.place).unlink(missing_ok=True)


async def _serve(
    service: Service, listeners: Sequence[Listener], started: Callable[[], object], stop: threading.Event
) -> None:
    servers = [_Server(_config(listener, service)) for listener in listeners]
    async with service.running():
        with _signals(stop):
            ends = [
                asyncio.ensure_future(server.serve(sockets=[listener.bound]))
                for server, listener in zip(servers, listeners, strict=True)
            ]
            while not all(server.started or end.done() for server, end in zip(servers, ends, strict=True)):
                await asyncio.sleep(0.01)
            started()
            while not stop.is_set():
                await asyncio.sleep(0.05)
            service.state.ready = False
            for server in servers:
                server.should_exit = True
            await asyncio.gather(*ends)


class _Server(uvicorn.Server):
    """Leaves the process's signals alone: several servers share them."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """The first SIGTERM or Ctrl-C asks to stop, the second ends the process as ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _: object) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for one in before:
        signal.signal(one, ask)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _config(listener: Listener, service: Service) -> uvicorn.Config:
    return uvicorn.Config(
        listener.app,
        loop="asyncio",
        http=Bounds(service.limits.head_seconds, service.limits.request_seconds).protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=service.limits.connections,
        timeout_graceful_shutdown=int(service.limits.drain_seconds),
        h11_max_incomplete_event_size=_HEADER_BYTES,
    )


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _tcp(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol has to be named: asyncio turns Nagle's algorithm off by it, which else costs each answer 40 ms.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise DeviceError(
            f"{host}:{port} cannot be bound ({error.strerror}); choose another --host or --port"
        ) from None
    return bound


def _unix(path: Path) -> socket.socket:
    """A socket that its owner alone can open; one that a killed server left is replaced."""
    bound = socket.socket(socket.AF_UNIX)
    try:
        if _left_over(path):
            path.unlink()
        mask = os.umask(0o177)
        try:
            bound.bind(str(path))
        finally:
            os.umask(mask)
    except OSError as error:
        bound.close()
        told = error.strerror or "its path is too long"
        raise DeviceError(f"socket {path} cannot be bound ({told}); choose another --admin-socket") from None
    return bound


def _left_over(path: Path) -> bool:
    """Whether a socket is there that nobody listens on."""
    if not path.exists() or not stat.S_ISSOCK(path.stat().st_mode):
        return False
    with socket.socket(socket.AF_UNIX) as asking:
        try:
            asking.connect(str(path))
        except ConnectionRefusedError:
            return True
    return False
