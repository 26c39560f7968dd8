"""A device's connection to the door: trusts the deployment's own authority and nobody else.

`fetched_authority` is the one request without trust: it sends nothing but the request itself, and what comes back is
worth something only if its fingerprint is the one that the invitation names. Proxies come from the environment, as in
other programs. Called by `federated.deployment.enrolling`.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from federated.deployment.certificates import ca_fingerprint
from federated.deployment.enrolment_messages import Answer, EnrolBody, Refusal, StateBody
from federated.errors import DeploymentError, DoorUnreachable

__all__ = ["Busy", "DoorClient", "fetched_authority"]

_LARGEST = 65_536
_TIMEOUT = httpx.Timeout(15.0)
_PLAIN = {"accept-encoding": "identity"}  # sizes are bounded as they arrive
_WHOLE = 30.0  # seconds for an answer with all of its bytes
_NOT_YET_VALID, _ENDED, _ANOTHER_HOST, _ANOTHER_ADDRESS = 9, 10, 62, 64  # OpenSSL's X509_V_ERR_*

_Model = TypeVar("_Model", bound=BaseModel)


class Busy(DoorUnreachable):
    """The door asks to come back later, after ``seconds``."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class DoorClient:
    """Speaks to one door.

    Args:
        door: ``https://HOST[:PORT]``.
        ca_pem: the only authority that is trusted; the host's name is checked too.
    """

    def __init__(self, door: str, ca_pem: str) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(cadata=ca_pem)
        self._door = door
        self._http = _client(door, context)

    def __enter__(self) -> DoorClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()

    def enrol(self, body: EnrolBody) -> Answer | Refusal:
        """Use an invitation.

        Raises:
            DoorUnreachable: if there is no answer, or none of a door.
        """
        return self._asked("/enrol", body)

    def state(self, body: StateBody) -> Answer | Refusal:
        """Ask for one's own state.

        Raises:
            DoorUnreachable: if there is no answer, or none of a door.
        """
        return self._asked("/enrol/state", body)

    def _asked(self, path: str, body: EnrolBody | StateBody) -> Answer | Refusal:
        headers = {"content-type": "application/json"}
        status, retry_after, data = _exchanged(
            self._http, "POST", f"{self._door}{path}", content=body.model_dump_json().encode(), headers=headers
        )
        if status == 200:
            return _read(Answer, data, self._door)
        refusal = _read(Refusal, data, self._door)
        if status in (429, 503):
            raise Busy(f"{self._door}: {_printable(refusal.message)}", retry_after)
        return refusal


def fetched_authority(door: str, ca_sha256: str) -> str:
    """The door's authority, as it shows it, if it is the one that was named.

    Returns:
        Its certificate in PEM.

    Raises:
        Busy: if it asks to come back later.
        DoorUnreachable: if there is no answer, or none of a door.
        DeploymentError: if it is another authority.
    """
    untrusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    untrusting.check_hostname = False
    untrusting.verify_mode = ssl.CERT_NONE
    with _client(door, untrusting) as http:
        status, retry_after, data = _exchanged(http, "GET", f"{door}/enrol/ca.pem")
    if status in (429, 503):
        raise Busy(f"{door} has too many requests from this address; try again in a minute", retry_after)
    try:
        found = ca_fingerprint(data) if status == 200 else ""
    except DeploymentError:
        found = ""
    if not found:
        raise DoorUnreachable(f"{door} answers, and not as a door of federated-peft (status {status}); {_CHECK}")
    if found != ca_sha256:
        raise DeploymentError(
            f"{door} shows another authority than the invitation names: found SHA-256 {found}, expected {ca_sha256}. "
            "Somebody may be in between; nothing was sent. Ask the operator, on another way, whether it changed"
        )
    return data.decode("ascii")


def _client(door: str, context: ssl.SSLContext) -> httpx.Client:
    """Through the environment's proxies, but to a door on this machine."""
    here = httpx.URL(door).host in ("localhost", "127.0.0.1", "::1")
    return httpx.Client(verify=context, timeout=_TIMEOUT, follow_redirects=False, headers=_PLAIN, trust_env=not here)


_CHECK = "check the address in the invitation, and the proxy settings, if there are any"


def _exchanged(
    http: httpx.Client, method: str, url: str, *, content: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, float, bytes]:
    """Status, seconds after which to come back, and the body, bounded in size and time."""
    until = time.monotonic() + _WHOLE
    data = bytearray()
    with _told(url), http.stream(method, url, content=content, headers=headers) as response:
        for chunk in response.iter_raw():
            data += chunk
            if len(data) > _LARGEST or time.monotonic() > until:
                raise DoorUnreachable(
                    f"{url} sends more than {_LARGEST} bytes, or for more than {_WHOLE:g} s; {_CHECK}"
                )
        after = response.headers.get("retry-after", "")
        return response.status_code, float(after) if after.isdigit() and len(after) < 5 else 5.0, bytes(data)


@contextmanager
def _told(url: str) -> Iterator[None]:
    """What goes wrong on the way, in words for the device's owner.

    Raises:
        DoorUnreachable: always, in place of an error of the network or of TLS.
    """
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        fault = _certificate_fault(error)
        raise DoorUnreachable(
            f"{url} {fault}"
            if fault
            else f"{url} cannot be reached ({_printable(str(error)) or type(error).__name__}); {_CHECK}"
        ) from error


def _certificate_fault(error: BaseException | None) -> str:
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    if error is None:
        return ""
    if error.verify_code in (_NOT_YET_VALID, _ENDED):
        when = "is not valid yet" if error.verify_code == _NOT_YET_VALID else "has ended"
        return f"has a certificate that, by this device's clock, {when}; set the clock, or have the operator renew it"
    if error.verify_code in (_ANOTHER_HOST, _ANOTHER_ADDRESS):
        return "has a certificate for other names; the operator has to make one for the name in the invitation"
    return (
        f"has a certificate that the deployment's authority did not sign ({error.verify_message}). "
        "Somebody may be in between; no key and no token was sent"
    )


def _read(kind: type[_Model], data: bytes, door: str) -> _Model:
    try:
        return kind.model_validate_json(data)
    except ValidationError:
        raise DoorUnreachable(f"{door} answers, and not as a door of federated-peft; {_CHECK}") from None


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)[:300]
