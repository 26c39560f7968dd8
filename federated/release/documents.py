"""Signed documents: mark, sign, read, and what this library writes into them besides TUF's own fields.

What holds for a role stands where the role is delegated, signed by who delegates: ``x-fedpeft-days``, how long its
signatures last, and a channel's ``x-fedpeft-bins`` and ``x-fedpeft-bins-past``. So a repository needs no settings of
its own, and who steals a role's key does not decide them. ``x-fedpeft-signed`` says when a document was signed: a
clock that is behind it is wrong. Other TUF clients ignore these fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from securesystemslib.signer import Key, Signer
from tuf.api.metadata import Metadata, Signed

from federated.errors import SigningKeyError, WrongContent
from federated.release.keys import KeyRing, label_of

__all__ = ["BINS", "BINS_PAST", "COUNTER", "DAYS", "mark", "number", "sign", "signed_at"]

DAYS, BINS, BINS_PAST = "x-fedpeft-days", "x-fedpeft-bins", "x-fedpeft-bins-past"
COUNTER = "x-fedpeft-counter"
_SIGNED = "x-fedpeft-signed"


def mark(signed: Signed, now: datetime, *, days: int) -> None:
    """Make it the next version, signed now, lasting so many days."""
    moment = now.astimezone(UTC).replace(microsecond=0)
    signed.version += 1
    signed.expires = moment + timedelta(days=days)
    signed.unrecognized_fields[_SIGNED] = moment.isoformat()


def signed_at(signed: Signed) -> datetime | None:
    """When it was signed; None if it does not say."""
    try:
        return datetime.fromisoformat(signed.unrecognized_fields[_SIGNED]).astimezone(UTC)
    except (KeyError, TypeError, ValueError):
        return None


def number(fields: Mapping[str, Any], name: str, default: int) -> int:
    """A number of this library's in signed metadata.

    Raises:
        WrongContent: if somebody wrote something else there.
    """
    value = fields.get(name, default)
    if type(value) is not int or not 0 <= value < 2**63:
        raise WrongContent(f"signed metadata say {name} = {value!r}; expected a whole number")
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
