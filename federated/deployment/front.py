"""The door, the one port of a deployment that devices reach: TLS, Flower's fleet interface, enrolment, no more.

SuperLink serves devices, operators and apps on one port and asks operators for no password, so it listens on
loopback, and this stands before it: a reverse proxy that passes ``POST /v1/fleet/<name>`` for the names that
SuperNodes use, and answers 404 to all else. Bodies are streamed, bounded, and counted by the key that the node
authenticates itself with. It holds no secret of a device, and checks no signature: the SuperLink does.

Run as ``python -m federated.deployment.front FOLDER``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse

from federated.deployment.devices import DeviceBook
from federated.deployment.enrolment import enrolment_routes
from federated.deployment.layout import Layout
from federated.deployment.server_config import ServerConfig, read_server_config
from federated.deployment.traffic import Flow, Traffic, key_name
from federated.listening import BoundedServer, Bounds
from federated.logs import set_up_logs

__all__ = ["FLEET", "door_app", "serve_door"]

_LOG = logging.getLogger(__name__)

FLEET = frozenset(
    {
        "register-node",
        "activate-node",
        "deactivate-node",
        "unregister-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    }
)
"""What SuperNodes of flwr 1.41 and 1.42 ask for."""

_KEY_HEADER = "flwr-public-key"
_HOP = frozenset(
    ("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailers", "transfer-encoding",
     "upgrade", "host", "content-length", "expect")
)  # fmt: skip
_NOTE = 2.0  # seconds between two notes of the traffic
_HEADER_BYTES = 16_384
_PAUSE = 60.0  # seconds for which a request's body may pause
_HEAD = 10.0  # seconds until a request's head is there
_SHARE = 4  # one address has at most this part of the connections


def door_app(layout: Layout, config: ServerConfig, traffic: Traffic) -> FastAPI:
    """The application behind the door.

    Args:
        layout: of the deployment.
        config: of the deployment.
        traffic: is counted into.
    """
    most = int(config.max_request_mb * 1_000_000)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        """Hold the connections to the SuperLink, and write the traffic down."""
        app.state.client = _client(layout, config)
        noting = asyncio.create_task(_note(traffic))
        try:
            yield
        finally:
            noting.cancel()
            with suppress(asyncio.CancelledError):
                await noting
            await app.state.client.aclose()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/v1/fleet/{name}")
    async def fleet(name: str, request: Request) -> Response:
        """Pass on what a SuperNode asks."""
        path = f"/v1/fleet/{name}"  # not `request.url`: the Host header, which a stranger writes, has a part in that
        query = request.scope.get("query_string", b"")
        if name not in FLEET or query or request.scope.get("raw_path", b"") != path.encode():
            traffic.refused += 1
            return Response(status_code=404)
        key = key_name(request.headers.get(_KEY_HEADER, ""))
        return await _passed(app.state.client, request, path, partial(traffic.flow, key), most=most)

    @app.get("/healthz")
    async def healthz() -> Response:
        """Whether the door is there; of the SuperLink behind it nothing."""
        return Response("ok\n", media_type="text/plain")

    if not config.insecure:
        book = DeviceBook(layout.folder, clock=lambda: datetime.now(UTC))
        app.include_router(enrolment_routes(book, ca_pem=layout.ca.read_bytes(), on_change=_entered))

    @app.exception_handler(404)
    async def missing(_: Request, __: Exception) -> Response:
        """Say nothing of what is not there."""
        traffic.refused += 1
        return Response(status_code=404)

    return app


def _client(layout: Layout, config: ServerConfig) -> httpx.AsyncClient:
    """Connections to the SuperLink on loopback, by TLS with the deployment's own authority."""
    trust: ssl.SSLContext | bool = True
    if not config.insecure:
        trust = ssl.create_default_context(cafile=str(layout.ca))
    return httpx.AsyncClient(
        base_url=f"{'http' if config.insecure else 'https'}://127.0.0.1:{config.superlink_port}",
        verify=trust,
        limits=httpx.Limits(max_connections=config.max_requests, max_keepalive_connections=64),
        timeout=httpx.Timeout(60.0, connect=5.0),
        trust_env=False,
    )


def _entered(name: str) -> None:
    _LOG.info("device %s was entered into the book", name, extra={"client": name})


class _TooLarge(Exception):
    pass


async def _parts(request: Request, flow: Flow, *, most: int) -> AsyncIterator[bytes]:
    """A request's body as it comes, counted."""
    size, parts = 0, request.stream()
    while True:
        async with asyncio.timeout(_PAUSE):
            part = await anext(parts, None)
        if part is None:
            return
        size += len(part)
        if size > most:
            raise _TooLarge
        flow.up += len(part)
        yield part


async def _passed(
    client: httpx.AsyncClient, request: Request, path: str, flow_of: Callable[..., Flow], *, most: int
) -> Response:
    """Pass a request on, and its answer back, neither held in memory as a whole."""
    if int(request.headers.get("content-length") or 0) > most:
        return _refused(413, f"more than {most} bytes")

    asked = Flow()
    dropped = _HOP - {"content-length"}
    headers = [(name, value) for name, value in request.headers.raw if name.decode("latin-1") not in dropped]
    sent = client.build_request("POST", path, headers=headers, content=_parts(request, asked, most=most))
    try:
        answer = await client.send(sent, stream=True)
    except _TooLarge:
        return _refused(413, f"more than {most} bytes")
    except TimeoutError:
        return _refused(408, f"nothing came for {_PAUSE:g} s")
    except ClientDisconnect:
        return _refused(400, "half a request")  # nobody is there to read it
    except httpx.HTTPError as error:
        return _refused(502, f"the SuperLink does not answer: {type(error).__name__}")

    flow = flow_of(let_in=answer.is_success)
    flow.up, flow.requests, flow.last = flow.up + asked.up, flow.requests + 1, time.time()

    async def back() -> AsyncIterator[bytes]:
        async for part in answer.aiter_raw():
            flow.down += len(part)
            yield part

    kept = {name: value for name, value in answer.headers.items() if name not in _HOP - {"content-length"}}
    return StreamingResponse(back(), answer.status_code, kept, background=BackgroundTask(answer.aclose))


def _refused(code: int, text: str) -> Response:
    return Response(text + "\n", status_code=code, media_type="text/plain")


async def _note(traffic: Traffic) -> None:
    try:
        while True:
            await asyncio.sleep(_NOTE)
            _write(traffic)
    finally:
        _write(traffic)


def _write(traffic: Traffic) -> None:
    try:
        traffic.note()
    except OSError as error:
        _LOG.warning("the traffic cannot be written down: %s", error.strerror)


def serve_door(folder: Path) -> None:
    """Serve a deployment's door until a signal says to stop.

    Raises:
        FederatedError: if its configuration cannot be read.
    """
    layout, config = Layout(folder), read_server_config(folder)
    app = door_app(layout, config, Traffic.of(layout.traffic))
    tls: dict[str, Any] = (
        {} if config.insecure else {"ssl_certfile": str(layout.certificate), "ssl_keyfile": str(layout.key)}
    )
    bounds = Bounds(_HEAD, _PAUSE, each=config.max_requests_each or max(1, config.max_requests // _SHARE))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # connections that have not shaken hands are files too
    server = uvicorn.Config(
        app,
        host=config.door_host,
        port=config.door_port,
        limit_concurrency=config.max_requests,
        timeout_keep_alive=75,
        ws="none",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        http=bounds.protocol,
        h11_max_incomplete_event_size=_HEADER_BYTES,
        **tls,
    )
    BoundedServer(server, bounds).run()


if __name__ == "__main__":
    os.umask(0o077)
    _FOLDER = Path(sys.argv[1]).resolve()
    set_up_logs("door", read_server_config(_FOLDER).log_format)
    serve_door(_FOLDER)
