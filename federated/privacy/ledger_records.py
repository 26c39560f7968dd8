"""A ledger's bytes: one line of canonical JSON a record, each naming the digest of the one before.

The first record says whose ledger it is and of which data; each further one is a charge. Every record holds a random
nonce, so that no two histories share a digest, however alike they are. A digest is of the record without the digest
itself. This module reads and makes bytes; `federated.privacy.ledger` puts them on disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from federated.digests import canonical_json, digest_of
from federated.errors import PrivacyError
from federated.privacy.accounting import GaussianSteps

__all__ = ["FORMAT", "ChargeKey", "Chain", "Charge", "charge_body", "opening_body", "read_chain", "sealed"]

FORMAT = "federated-peft privacy ledger 1"

_OPENING = {"digest", "format", "subject", "data_digest", "nonce", "noted_at"}
_CHARGE = {"digest", "number", "previous", "event", "key", "nonce", "noted_at"}
_BEGINNING = b'{"digest":"'


@dataclass(frozen=True)
class ChargeKey:
    """What a charge was for: computing the same once more is a further charge under the same key.

    Args:
        run_id: the run.
        round_number: 1-based.
        phase: exchange within the round, 1-based.
        plan_digest: digest of the train plan that was followed.
    """

    run_id: str
    round_number: int
    phase: int
    plan_digest: str

    def __post_init__(self) -> None:
        whole = (self.round_number, self.phase)
        if not all(type(one) is int and one >= 1 for one in whole) or not (
            isinstance(self.run_id, str) and isinstance(self.plan_digest, str)
        ):
            raise PrivacyError(
                "the key of a charge: expected texts run_id and plan_digest, and a round and phase from 1"
            )

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Rebuild from plain data.

        Raises:
            PrivacyError: if it is no key.
        """
        names = {"run_id", "round_number", "phase", "plan_digest"}
        if not isinstance(value, Mapping) or set(value) != names:
            raise PrivacyError("not the key of a charge")
        return cls(**value)


@dataclass(frozen=True)
class Charge:
    """One charge as the ledger holds it; ``digest`` is the ledger's head after it."""

    digest: str
    event: GaussianSteps
    key: ChargeKey


@dataclass(frozen=True)
class Chain:
    """What a ledger's bytes say.

    Args:
        opening: digest of the first record.
        charges: in order.
        size: bytes up to the end of the last whole record.
        ended: whether that record's line has its end; a crash may have come between.
    """

    opening: str
    charges: tuple[Charge, ...]
    size: int
    ended: bool


def opening_body(subject: str, data_digest: str, *, nonce: str, noted_at: float) -> dict[str, Any]:
    """The first record, before it is sealed."""
    return {"format": FORMAT, "subject": subject, "data_digest": data_digest, "nonce": nonce, "noted_at": noted_at}


def charge_body(event: GaussianSteps, key: ChargeKey, **rest: Any) -> dict[str, Any]:
    """A charge, before it is sealed; ``rest`` is its number, previous, nonce and noted_at."""
    return {"event": event.to_dict(), "key": asdict(key), **rest}


def sealed(body: Mapping[str, Any]) -> tuple[str, bytes]:
    """A record's digest, and its line."""
    digest = digest_of(dict(body))
    return digest, canonical_json({**body, "digest": digest}) + b"\n"


def read_chain(data: bytes, *, subject: str, data_digest: str) -> Chain:
    """Check every record, and that they follow each other.

    A last line without its end was being written when the process ended. If it is a whole record it counts, for what it
    charges may have been computed; it is left out only if it is the beginning of one, for then it had not been granted.

    Raises:
        PrivacyError: if the ledger is another subject's or another data set's, or a record is damaged, edited, missing
            or out of order; it names the line.
    """
    *lines, tail = data.split(b"\n")
    torn = bool(tail) and _torn(tail, len(lines) + 1)
    if tail and not torn:
        lines.append(tail)
    if not lines:
        raise _damaged(1, "the ledger's first record is not there")
    opening = _opening(lines[0], subject=subject, data_digest=data_digest)
    head, charges = opening, []
    for number, line in enumerate(lines[1:], start=1):
        charges.append(_charge(line, number, previous=head))
        head = charges[-1].digest
    ended = not tail or torn
    return Chain(opening, tuple(charges), sum(map(len, lines)) + len(lines) - (not ended), ended)


def _torn(tail: bytes, line: int) -> bool:
    """Whether a last line without its end is only the beginning of a record (zeros: bytes that never reached it)."""
    if _parsed(tail) is not None:
        return False
    written = tail.rstrip(b"\0")
    if written.startswith(_BEGINNING) or _BEGINNING.startswith(written):
        return True
    raise _damaged(line, "not a record, nor the beginning of one")


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None


def _opening(line: bytes, *, subject: str, data_digest: str) -> str:
    record = _record(line, 1, expected=_OPENING)
    if record["format"] != FORMAT:
        raise _damaged(1, f"expected the format {FORMAT!r}")
    if record["subject"] != subject:
        raise PrivacyError("this privacy ledger is another subject's: open the one of this client or server")
    if record["data_digest"] != data_digest:
        found, wanted = str(record["data_digest"])[:12], data_digest[:12]
        raise PrivacyError(
            f"this privacy ledger is of another data set (digest {found}, expected {wanted}): rows were added, taken "
            "out or changed, and what was spent on them is not known of the new set; put the rows back, or start over "
            "under another client_id with rows that were never trained on"
        )
    return str(record["digest"])


def _charge(line: bytes, number: int, *, previous: str) -> Charge:
    record = _record(line, number + 1, expected=_CHARGE)
    if record["number"] != number or record["previous"] != previous:
        raise _damaged(number + 1, "it does not follow the record before it: one was taken out, put in or moved")
    try:
        event, key = GaussianSteps.from_dict(record["event"]), ChargeKey.from_dict(record["key"])
    except PrivacyError as error:
        raise _damaged(number + 1, str(error)) from None
    return Charge(str(record["digest"]), event, key)


def _record(line: bytes, number: int, *, expected: set[str]) -> dict[str, Any]:
    record = _parsed(line)
    if not isinstance(record, dict) or set(record) != expected:
        raise _damaged(number, f"expected a record of {', '.join(sorted(expected))}")
    try:
        digest, written = sealed({key: value for key, value in record.items() if key != "digest"})
    except ValueError:  # NaN, infinity, half of a surrogate pair
        raise _damaged(number, "it holds what no record can") from None
    if digest != record["digest"] or written != line + b"\n":
        raise _damaged(number, "its digest is not that of what it says: it was edited or damaged")
    return record


def _damaged(line: int, why: str) -> PrivacyError:
    return PrivacyError(
        f"the privacy ledger is damaged at line {line}: {why}; restore the newest copy of it, or count this data as "
        "spent: nothing is trained on it under a promise that cannot be kept"
    )
