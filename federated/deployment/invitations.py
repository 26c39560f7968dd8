"""An invitation: one line of text by which one device may ask once to take part.

    fedpeft1.<base64url of {"ca_sha256":...,"client_id":...,"door":...,"expires":...,"token":...}>

It names the door and the fingerprint of its authority, so a device trusts nobody else on the way there, and carries a
one-time token. Whoever has the line before it is used can enrol in the device's place: give it on a way that you trust.
The server keeps the token's SHA-256 alone. Made by the operator's command, read by the device's.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from federated.digests import canonical_json
from federated.errors import ConfigError, DeploymentError
from federated.names import check_device_name

__all__ = ["TOKEN_BYTES", "Invitation", "check_door", "decoded", "encoded", "new_token", "parse_invitation"]

TOKEN_BYTES = 32
_PREFIX = "fedpeft1."
_LONGEST = 2000
_LONGEST_DOOR = 300
_YEAR_9000 = 221_845_392_000


@dataclass(frozen=True)
class Invitation:
    """What one line says.

    Args:
        door: ``https://HOST[:PORT]``.
        client_id: the name that the device will have.
        token: 32 random bytes; not shown when this is printed.
        ca_sha256: fingerprint of the door's authority.
        expires_at: by the server's clock, in whole seconds.
    """

    door: str
    client_id: str
    token: bytes
    ca_sha256: str
    expires_at: datetime

    def __repr__(self) -> str:
        return f"Invitation({self.client_id} at {self.door} until {self.expires_at:%F %T})"

    @property
    def token_sha256(self) -> bytes:
        """What the server keeps of the token."""
        return hashlib.sha256(self.token).digest()

    @property
    def text(self) -> str:
        """The line."""
        fields = {
            "door": self.door,
            "client_id": self.client_id,
            "token": encoded(self.token),
            "ca_sha256": self.ca_sha256,
            "expires": int(self.expires_at.timestamp()),
        }
        return _PREFIX + encoded(canonical_json(fields))


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

    door: Annotated[str, Field(max_length=_LONGEST_DOOR)]
    client_id: str
    token: str
    ca_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    expires: Annotated[int, Field(gt=0, lt=_YEAR_9000)]


def new_token() -> bytes:
    """From the operating system's generator."""
    return secrets.token_bytes(TOKEN_BYTES)


def parse_invitation(text: str) -> Invitation:
    """Read a line; spaces around it do not matter.

    Raises:
        DeploymentError: if it is no invitation; nothing of it is quoted, it may be a secret that was cut.
    """
    line = text.strip() if len(text) <= 2 * _LONGEST else text
    try:
        if len(line) > _LONGEST or not line.startswith(_PREFIX):
            raise ValueError
        body = decoded(line.removeprefix(_PREFIX))
        fields = _Fields.model_validate_json(body)
        token = decoded(fields.token)
        if len(token) != TOKEN_BYTES:
            raise ValueError
        made = Invitation(
            door=check_door(fields.door),
            client_id=check_device_name(fields.client_id),
            token=token,
            ca_sha256=fields.ca_sha256,
            expires_at=datetime.fromtimestamp(fields.expires, UTC),
        )
        if made.text != line:  # one invitation has one text; fields that are given twice are not seen above
            raise ValueError
    except (ValueError, ValidationError, ConfigError):
        raise DeploymentError(
            f"this is no invitation (found {len(text)} characters); expected the whole line that the operator gave, "
            f"which begins with {_PREFIX} and has no spaces or line breaks in it"
        ) from None
    return made


def check_door(url: str) -> str:
    """The address of a door in its one spelling.

    >>> check_door("https://Door.example.org:8443/")
    'https://door.example.org:8443'

    Raises:
        ConfigError: unless it is ``https://HOST[:PORT]`` and nothing more.
    """
    try:
        if len(url) > _LONGEST_DOOR or not url.isascii() or not url.isprintable():
            raise ValueError
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        if parts.scheme != "https" or not host or set(host) & set(" %\\<>\"'"):
            raise ValueError
        shown = f"[{host}]" if ":" in host else host
        found = f"https://{shown}" + ("" if port in (None, 443) else f":{port}")
        if url.lower().removesuffix("/").removesuffix(":443") != found:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"{url[:100]!a} is no address of a door; expected https://HOST or https://HOST:PORT"
        ) from None
    return found


def encoded(data: bytes) -> str:
    """Base64url without padding."""
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def decoded(text: str) -> bytes:
    """The bytes of `encoded`.

    Raises:
        ValueError: for any other text than `encoded` gives.
    """
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError:
        raise ValueError("not base64url") from None
    if encoded(data) != text:
        raise ValueError("not base64url in its one spelling")
    return data
