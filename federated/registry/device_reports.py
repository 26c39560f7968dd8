"""What a device wrote about itself: ``fedpeft device report`` makes the file, ``fedpeft registry devices`` reads it.

The file is not signed. Who hands it in answers for it; the audit log says who that was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from federated.errors import RegistryError

__all__ = ["DeviceReport", "Held", "device_report"]

_LONGEST = 4_000_000
_MOST = 1000


@dataclass(frozen=True)
class Held:
    """That the device held a version.

    Args:
        version_id: in full.
        first_at, last_at: from when to when, each with its zone.
    """

    version_id: str
    first_at: datetime
    last_at: datetime


@dataclass(frozen=True)
class DeviceReport:
    """A device's report.

    Args:
        device_id: its stable name.
        held: what it held.
        failed: by version id, why the device refused or left it.
    """

    device_id: str
    held: tuple[Held, ...]
    failed: Mapping[str, str]


def device_report(data: bytes) -> DeviceReport:
    """Read a report; keys of a newer library are passed over.

    Raises:
        RegistryError: if it is none.
    """
    try:
        if len(data) > _LONGEST:
            raise ValueError(f"{len(data)} bytes")
        told = json.loads(data)
        if told["format"] != 1:
            raise ValueError(f"format {told['format']!r}")
        versions = list(told["versions"])[:_MOST]
        held = tuple(_held(one) for one in versions if "held" in one)
        failed = {_text(one["version_id"]): _text(one["reason"]) for one in versions if one["state"] == "failed"}
        return DeviceReport(_text(told["device_id"]), held, failed)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RegistryError(
            f"that is no device's report ({type(error).__name__}: {error}); expected what 'fedpeft device report' wrote"
        ) from None


def _held(one: Any) -> Held:
    first, last = (datetime.fromisoformat(_text(one["held"][name])) for name in ("from", "to"))
    if first.tzinfo is None or last.tzinfo is None:
        raise ValueError("a time without a zone")
    return Held(_text(one["version_id"]), first, last)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
