"""Enrolment as the door serves it: three routes, and nothing else of the server.

    GET  /enrol/ca.pem   the authority's certificate; who fetches it checks it against an invitation
    POST /enrol          an invitation's token, two public keys and proofs of both -> pending or approved
    POST /enrol/state    a device asks for its own state, signed by its update key

From outside, a token that is unknown, used, withdrawn or out of date is one and the same answer; the log says which,
and from where. Bodies are a few kilobytes, and an address is heard a few times a second.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from federated.deployment.certificates import ca_fingerprint
from federated.deployment.devices import Claim, Device, DeviceBook, KeysUsed
from federated.deployment.enrolment_messages import (
    FRESH_SECONDS,
    Answer,
    EnrolBody,
    Refusal,
    StateBody,
    asks_for_itself,
    proves,
)
from federated.deployment.invitations import decoded
from federated.deployment.rate_limit import RateLimit
from federated.errors import ConfigError, DeploymentError, EnrolmentRefused
from federated.names import check_device_name

__all__ = ["BODY_BYTES", "OnChange", "enrolment_routes"]

BODY_BYTES = 4096
_BODY_SECONDS = 10.0
_LOG = logging.getLogger("federated.deployment.enrolment")
_NO_KEY = bytes(32)

OnChange = Callable[[str], None]
"""Told the name of a device that was entered into the book; runs in a thread, after the answer."""

_Body = TypeVar("_Body", bound=BaseModel)


class _Refused(Exception):
    def __init__(self, status: int, code: str, message: str, *, retry_after: int = 0) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after


def enrolment_routes(
    book: DeviceBook,
    *,
    ca_pem: bytes,
    on_change: OnChange,
    limit: RateLimit | None = None,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> APIRouter:
    """The routes, for an application that has nothing else to say to strangers.

    Args:
        book: is asked and written to.
        ca_pem: certificate of the authority that signed the door's.
        on_change: called after a device was entered; what it raises is logged.
        limit: how often one address may ask.
        clock: for the age of signed questions, and the time in answers.

    Raises:
        DeploymentError: if ``ca_pem`` is no certificate.
    """
    desk = _Desk(book, ca_fingerprint(ca_pem), on_change, clock)
    limit = limit or RateLimit()
    router = APIRouter()

    @router.get("/enrol/ca.pem")
    async def authority(request: Request) -> Response:
        """The authority's certificate, which is public."""
        try:
            _paced(limit, request)
        except _Refused as refused:
            return _refusal(refused, desk.now())
        return Response(ca_pem, media_type="application/x-pem-file")

    @router.post("/enrol")
    async def enrol(request: Request) -> Response:
        """Use an invitation."""
        return await _answered(request, limit, desk, desk.enrol)

    @router.post("/enrol/state")
    async def state(request: Request) -> Response:
        """A device's own state."""
        return await _answered(request, limit, desk, desk.state)

    return router


class _Desk:
    """Decides; runs in threads."""

    def __init__(self, book: DeviceBook, ca_sha256: str, on_change: OnChange, clock: Callable[[], datetime]) -> None:
        self._book, self._ca, self._on_change, self._clock = book, ca_sha256, on_change, clock

    def now(self) -> int:
        """Seconds since 1970."""
        return int(self._clock().timestamp())

    def enrol(self, data: bytes, address: str) -> Response:
        """Enter a device into the book.

        Raises:
            _Refused: if it does not come in.
        """
        body = _read(EnrolBody, data)
        token = _bytes(body.token)
        token_sha256 = hashlib.sha256(token).digest()
        if not proves(body, token_sha256=token_sha256, ca_sha256=self._ca):
            _LOG.warning("enrolment from %s refused: a proof does not hold", address)
            raise _no()
        claim = Claim(body.client_id, token_sha256, body.node_key, _bytes(body.update_key), address)
        try:
            device, new = self._book.enrol(claim)
        except KeysUsed as error:
            _LOG.warning("enrolment from %s refused: %s", address, error)
            message = "one of the keys was enrolled before, and keys are taken once; enrol with new ones"
            raise _Refused(409, "keys_used", message) from None
        except EnrolmentRefused as error:
            _LOG.warning("enrolment from %s refused: %s", address, error)
            raise _no() from None
        about = {"client": device.client_id}
        _LOG.info("enrolment from %s: %s is %s", address, device.client_id, device.state, extra=about)
        return self._answer(device, BackgroundTask(self._tell, device.client_id) if new else None)

    def state(self, data: bytes, address: str) -> Response:
        """Tell a device its own state.

        Raises:
            _Refused: if it is not one of ours, or its clock is far off.
        """
        body = _read(StateBody, data)
        found = None
        for device in self._book.entries(body.client_id):
            if asks_for_itself(body, update_key=device.update_key, ca_sha256=self._ca):
                found = device
        if found is None:
            asks_for_itself(body, update_key=_NO_KEY, ca_sha256=self._ca)  # an unknown name takes its time too
            _LOG.warning("question from %s for a state refused: no such key", address)
            raise _no()
        behind = self.now() - body.at
        if abs(behind) > FRESH_SECONDS:
            _LOG.warning("question from %s for the state of %s is %d s old", address, found.client_id, behind)
            message = f"the device's clock is {abs(behind)} s {'behind' if behind > 0 else 'ahead of'} the door's"
            raise _Refused(403, "clock", message)
        return self._answer(found, None)

    def _answer(self, device: Device, after: BackgroundTask | None) -> Response:
        answer = Answer(client_id=device.client_id, state=device.state, at=self.now())
        return Response(answer.model_dump_json(), media_type="application/json", background=after)

    def _tell(self, client_id: str) -> None:
        try:
            self._on_change(client_id)
        except Exception as error:  # noqa: BLE001 - the boundary: the device has its answer, the operator this line
            _LOG.error("%s is in the book, and what follows from it failed: %s", client_id, error)


async def _answered(
    request: Request, limit: RateLimit, desk: _Desk, work: Callable[[bytes, str], Response]
) -> Response:
    address = _address(request)
    try:
        _paced(limit, request)
        return await run_in_threadpool(work, await _received(request), address)
    except _Refused as refused:
        return _refusal(refused, desk.now())
    except DeploymentError as error:
        _LOG.error("enrolment from %s failed: %s", address, error)
        return _refusal(_Refused(503, "failed", "the door could not do it now; try again later"), desk.now())


def _paced(limit: RateLimit, request: Request) -> None:
    seconds = limit.wait(_address(request))
    if seconds:
        after = math.ceil(seconds)
        raise _Refused(
            429, "too_often", f"too many requests from this address; try again in {after} s", retry_after=after
        )


async def _received(request: Request) -> bytes:
    """The body, bounded in size and time."""
    told = request.headers.get("content-length", "0")
    if not told.isdigit() or int(told[:20]) > BODY_BYTES:
        raise _too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > BODY_BYTES:
                    raise _too_large()
    except TimeoutError:
        raise _Refused(408, "timeout", f"the body was not there within {_BODY_SECONDS:g} s") from None
    except ClientDisconnect:
        raise _Refused(400, "malformed", "the connection ended before the body did") from None
    return bytes(body)


def _too_large() -> _Refused:
    return _Refused(413, "too_large", f"the body is larger than {BODY_BYTES} bytes")


def _read(kind: type[_Body], data: bytes) -> _Body:
    try:
        body = kind.model_validate_json(data)
        check_device_name(getattr(body, "client_id", ""))
    except (ValidationError, ConfigError):
        raise _Refused(400, "malformed", "the body is not what this address expects; use the same version") from None
    return body


def _bytes(text: str) -> bytes:
    try:
        return decoded(text)
    except ValueError:
        raise _Refused(400, "malformed", "the body is not what this address expects; use the same version") from None


def _no() -> _Refused:
    return _Refused(403, "refused", "this invitation or this key opens nothing here")


def _refusal(refused: _Refused, at: int) -> Response:
    body = Refusal(code=refused.code, message=refused.message, at=at).model_dump()
    headers = {"connection": "close"} | ({"retry-after": str(refused.retry_after)} if refused.retry_after else {})
    return Response(json.dumps(body), refused.status, headers, media_type="application/json")


def _address(request: Request) -> str:
    return request.client.host if request.client else "unknown"
