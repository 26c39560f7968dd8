"""What the TUF library refuses, by this library's names: which attack it is, where that can be told.

The library raises one class for several things (a version number may be an old one, or one that does not fit the
others); which it is follows from the role and from what had been verified by then.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from tuf.api.exceptions import (
    BadVersionNumberError,
    RepositoryError,
    UnsignedMetadataError,
)
from tuf.api.metadata import Metadata, Root, Signed, Targets

from federated.errors import (
    ExpiredMetadata,
    FreezeAttack,
    MixAndMatch,
    RollbackAttack,
    UntrustedRelease,
    WrongContent,
    WrongSignature,
)
from federated.release.roles import ONLINE, ROOT, SNAPSHOT, TIMESTAMP

__all__ = ["TUF_ERRORS", "expired", "mismatched", "refused"]

TUF_ERRORS = (RepositoryError, ValueError, TypeError, KeyError, AttributeError, RuntimeError)
"""Whatever the library may raise for bytes from a stranger."""


def refused(error: Exception, role: str, source: str) -> UntrustedRelease:
    """The error for what the library says of a role's metadata from a source."""
    what = f"{role} from {source}"
    match error:
        case UnsignedMetadataError():
            return WrongSignature(
                f"{what} is not signed as it must be ({error}): somebody without the keys made it, or the publisher "
                f"changed keys and this is an old file"
            )
        case BadVersionNumberError() if role in (ROOT, TIMESTAMP, SNAPSHOT):
            return RollbackAttack(f"{what} is older than what was verified before ({error}); it is refused")
        case BadVersionNumberError():
            return MixAndMatch(f"{what} is another version than the snapshot names ({error}); it is refused")
        case _ if type(error) is RepositoryError and role == SNAPSHOT:
            return MixAndMatch(f"{what} does not fit what was verified before ({error}); it is refused")
        case _:
            said = error.__cause__ or error
            return WrongContent(f"{what} is damaged or was tampered with ({type(said).__name__}: {said})")


def expired(role: str, signed: Signed, now: datetime) -> ExpiredMetadata:
    """The error for metadata that are out of date by the clock that was given."""
    until = f"{role} was valid until {signed.expires:%Y-%m-%d %H:%M} UTC, the clock here says {now:%Y-%m-%d %H:%M}"
    if role in ONLINE:
        return FreezeAttack(
            f"{until}: somebody holds newer ones back, the publisher stopped renewing, or the clock is wrong; what is "
            f"installed stays, nothing new is taken"
        )
    return ExpiredMetadata(f"{until}: its keyholder must renew it, or the clock is wrong")


def mismatched(data: bytes, role: str, delegator: Root | Targets, source: str) -> UntrustedRelease:
    """The error for bytes without the length or hash that was signed for them.

    Genuine bytes in a wrong place are a mix; others lack signatures, or are nothing at all.
    """
    try:
        document: Metadata[Any] = Metadata.from_bytes(data)
        delegator.verify_delegate(role, document.signed_bytes, document.signatures)
    except TUF_ERRORS as error:
        return refused(error, role, source)
    return MixAndMatch(f"{role} from {source} is genuine, and not the one that the other metadata name; it is refused")
