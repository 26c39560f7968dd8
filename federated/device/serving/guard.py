"""What every request passes first and last: host, token, size, time; its number, log line and metrics.

Plain ASGI. The body is read whole before the application sees the request, so that it is bounded in size and in time.
The log holds method, endpoint, status, time and version, and never what was asked or answered.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import traceback
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from federated.device.serving.credentials import Tokens
from federated.device.serving.faults import FAILED, ApiError, error_body
from federated.device.serving.limits import Limits
from federated.device.serving.metrics import Metrics

__all__ = ["Door", "Guard"]

_LOG = logging.getLogger("federated.serving")


@dataclass(frozen=True)
class Door:
    """Who may come in.

    Args:
        tokens: that open it; none: everybody.
        hosts: accepted ``Host`` headers without port; None: any. Keeps a web page, whose name somebody points at this
            machine, from asking a server that has no tokens.
        open_paths: that need no token.
    """

    tokens: Tokens
    hosts: Collection[str] | None = None
    open_paths: Collection[str] = ("/healthz",)

    def check(self, path: str, headers: Mapping[bytes, bytes]) -> None:
        """Let a request in.

        Raises:
            ApiError: 401 without a token, 403 for another host.
        """
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
        if self.hosts is not None and name not in self.hosts:
            raise ApiError("this server does not answer under that host name; use its own", status=403, code="bad_host")
        if path not in self.open_paths and not self.tokens.open(headers.get(b"authorization")):
            raise ApiError(
                "no valid token; send the header 'Authorization: Bearer TOKEN' with one of this listener's",
                status=401,
                code="invalid_api_key",
            )


class Guard:
    """The outermost layer of a listener.

    Args:
        app: what it guards.
        door: who may come in.
        limits: of the body.
        metrics: told of every request.
        paths: endpoints by which requests are counted; others are counted together.
    """

    def __init__(self, app: ASGIApp, *, door: Door, limits: Limits, metrics: Metrics, paths: Collection[str]) -> None:
        self._app, self._door, self._limits, self._metrics = app, door, limits, metrics
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            raise RuntimeError(f"this server speaks HTTP alone, found {scope['type']}")
        sent = _Sent(send)
        try:
            headers = dict(scope["headers"])
            self._door.check(scope["path"], headers)
            body = await self._body(headers, receive)
            sent.begin = time.perf_counter()
            await self._app(scope, _replayed(body, receive), sent)
        except ApiError as error:
            await sent.refuse(error.status, error.body, error.headers)
        except Exception as error:  # noqa: BLE001 - the boundary: its text may hold inputs, so the place alone is logged
            _LOG.error("%s failed with %s at %s", sent.number, type(error).__name__, _place(error))
            await sent.refuse(500, error_body(FAILED, 500), {})
        finally:
            self._noted(scope, sent)

    async def _body(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        """The whole body.

        Raises:
            ApiError: 413 if it is too large, 408 if it takes too long.
        """
        told = headers.get(b"content-length", b"0")
        if int(told) > self._limits.body_bytes:  # a server that lets other than digits through would be the fault
            raise self._too_large()
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while more:
                    message = await receive()
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self._limits.body_bytes:
                        raise self._too_large()
        except TimeoutError:
            raise ApiError(
                f"the body was not there within {self._limits.body_seconds:g} s", status=408, code="timeout"
            ) from None
        return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(
            f"the body is larger than {self._limits.body_bytes} bytes; send less", status=413, code="too_large"
        )

    def _noted(self, scope: Scope, sent: _Sent) -> None:
        path = scope["path"] if scope["path"] in self._paths else "other"
        seconds = time.perf_counter() - sent.begin
        self._metrics.request(path, sent.status, seconds)
        _LOG.info(
            "%s %s %s %d %.1f ms version %s",
            sent.number,
            scope["method"],
            path,
            sent.status,
            seconds * 1000,
            sent.version[:12] or "-",
        )


class _Sent:
    """Sends a response, and knows what was sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._begun = False
        self.begin = time.perf_counter()
        self.number = f"req-{uuid.uuid4().hex}"
        self.status = 499  # the client went away before anything was sent
        self.version = ""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun, self.status = True, message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.number.encode())]
            self.version = dict(message["headers"]).get(b"x-fedpeft-version", b"").decode()
        await self._send(message)

    async def refuse(self, status: int, record: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        """Send an error, unless an answer has begun: then the connection just ends."""
        if self._begun:
            return
        body = json.dumps(record).encode()
        told = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close", **headers}
        pairs = [(key.encode(), value.encode()) for key, value in told.items()]
        await self({"type": "http.response.start", "status": status, "headers": pairs})
        await self({"type": "http.response.body", "body": body})


def _place(error: Exception) -> str:
    """The innermost calls, by file and line."""
    return " < ".join(f"{one.filename}:{one.lineno}" for one in traceback.extract_tb(error.__traceback__)[:-6:-1])


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read already, then whatever comes after it."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay
