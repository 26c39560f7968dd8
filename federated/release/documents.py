"""Signed documents: make, sign, read, and what this library writes into them besides TUF's own fields.

``x-fedpeft-days`` says how long a role's signatures last, so that a repository needs no settings of its own;
``x-fedpeft-signed`` says when: a clock that is behind it is wrong. Both are signed, and other TUF clients ignore them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from securesystemslib.signer import Key, Signer
from tuf.api.metadata import Metadata, Root, Signed, Snapshot, Targets, Timestamp

from federated.errors import SigningKeyError, WrongContent
from federated.release.keys import KeyRing, label_of

__all__ = ["days_of", "mark", "new", "note", "noted", "sign", "signed_at"]

S = TypeVar("S", Root, Timestamp, Snapshot, Targets)

_DAYS, _SIGNED = "x-fedpeft-days", "x-fedpeft-signed"
_NOTE = "x-fedpeft-"


def new(signed: S, *, days: int) -> S:
    """A document whose signatures will last so many days; its first `mark` makes it version 1. Returns it."""
    signed.unrecognized_fields[_DAYS] = days
    signed.version = 0
    return signed


def mark(signed: Signed, now: datetime, *, days: int | None = None) -> None:
    """Make it the next version, signed now, lasting as long as its role's signatures last, or ``days``."""
    moment = now.astimezone(UTC).replace(microsecond=0)
    signed.version += 1
    signed.expires = moment + timedelta(days=days_of(signed) if days is None else days)
    signed.unrecognized_fields[_SIGNED] = moment.isoformat()


def days_of(signed: Signed) -> int:
    """How long a signature of this role lasts."""
    return _number(signed, _DAYS, 1)


def signed_at(signed: Signed) -> datetime | None:
    """When it was signed; None if it does not say."""
    try:
        return datetime.fromisoformat(signed.unrecognized_fields[_SIGNED]).astimezone(UTC)
    except (KeyError, TypeError, ValueError):
        return None


def note(signed: Signed, name: str, value: int) -> None:
    """Write a number of this library's into a document."""
    signed.unrecognized_fields[_NOTE + name] = value


def noted(signed: Signed, name: str, default: int) -> int:
    """A number that `note` wrote.

    Raises:
        WrongContent: if somebody wrote something else there.
    """
    return _number(signed, _NOTE + name, default)


def _number(signed: Signed, name: str, default: int) -> int:
    value = signed.unrecognized_fields.get(name, default)
    if type(value) is not int or not 0 <= value < 2**63:
        raise WrongContent(f"signed metadata ({signed.type}) say {name} = {value!r}; expected a whole number")
    return value


def sign(document: Metadata[Any], role: str, needs: Sequence[tuple[int, Sequence[Key]]], ring: KeyRing) -> None:
    """Replace the signatures.

    Args:
        document: changed in place.
        role: for messages.
        needs: thresholds, and the keys that count for each; a new root has two: the old root's and its own.
        ring: what can be signed with.

    Raises:
        SigningKeyError: if a threshold cannot be met, or a key does not sign.
    """
    for threshold, keys in needs:
        _require(role, threshold, keys, ring)
    document.signatures.clear()
    payload = document.signed_bytes
    for signer in ring.signers({key.keyid: key for _, keys in needs for key in keys}.values()):
        document.signatures[signer.public_key.keyid] = _signature(signer, role, payload)


def _require(role: str, threshold: int, keys: Sequence[Key], ring: KeyRing) -> None:
    held = [key for key in keys if ring.holds(key.keyid)]
    if len(held) < threshold:
        folders = ", ".join(map(str, ring.folders))
        raise SigningKeyError(
            f"{role} needs {threshold} of the keys {_labels(keys)}; found {_labels(held)} in {folders}: "
            f"mount the folder that holds the others, and name it with --keys"
        )


def _labels(keys: Iterable[Key]) -> str:
    return ", ".join(map(label_of, keys)) or "none"


def _signature(signer: Signer, role: str, payload: bytes) -> Any:
    try:
        return signer.sign(payload)
    except Exception as error:
        raise SigningKeyError(f"{label_of(signer.public_key)} cannot sign {role}: {error}") from error
