"""When a device's owner lets it train: idle, charging, on a network that costs nothing, at some hours, with room left.

A condition that does not hold is answered with "not now", which is no failure: the server asks somebody else, and asks
again later. It is told which condition it was and when to ask again, and nothing of what was measured.

Called by `federated.flower.client` before anything else is done for a message; `federated.flower.host` looks.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, ConfigDict, Field

from federated.errors import NotNow
from federated.flower.host import Host

__all__ = ["Conditions", "require"]

_LOG = logging.getLogger(__name__)
_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")
_DAY = 24 * 60
_LONGEST = 3600.0
"""Seconds after which the server may ask again in any case: clocks are put right, and seasons change."""


def _minutes(text: str) -> tuple[int, int]:
    """Begin and end of hours, in minutes after midnight.

    >>> _minutes("22:00-06:30")
    (1320, 390)
    """
    found = _HOURS.fullmatch(text)
    hours = [int(part) for part in found.groups()] if found else []
    if hours[:2] == hours[2:]:
        raise ValueError(f"found {text[:20]!r}, expected two different times of the day such as '22:00-06:00'")
    return 60 * hours[0] + hours[1], 60 * hours[2] + hours[3]


def _checked(text: str) -> str:
    if text:
        _minutes(text)
    return text


@dataclass(frozen=True)
class Conditions:
    """What must hold; what is not given is not asked.

    Args:
        idle: largest load per core, mean over the last minute; this client's own training is part of it.
        charging: the machine does not live on a battery.
        unmetered: the network of the default route costs nothing, as NetworkManager says.
        metered_interfaces: those that cost; NetworkManager is not asked then.
        hours: of the day, local time; over midnight where the end is earlier.
        free_disk_mb: least room where the client's store is, in 10^6 bytes.
        ask_again: seconds after which the server may ask again.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")  # a condition misspelt is none

    idle: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    charging: bool = False
    unmetered: bool = False
    metered_interfaces: tuple[str, ...] = ()
    hours: Annotated[str, AfterValidator(_checked)] = ""
    free_disk_mb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    ask_again: Annotated[float, Field(ge=1, le=_LONGEST)] = 300.0


def require(conditions: Conditions, store: Path, host: Host | None = None) -> None:
    """Refuse to work now, unless all conditions hold.

    Args:
        conditions: the owner's.
        store: the client's folder.
        host: where to look; default: this machine.

    Raises:
        NotNow: naming the first condition that does not hold.
        ConfigError: if one cannot be looked at: it does not count as holding.
    """
    for name, found, seconds in _unmet(conditions, store, host or Host()):
        _LOG.info("not now: %s: %s", name, found)
        raise NotNow(name, seconds=seconds)


def _unmet(wanted: Conditions, store: Path, host: Host) -> Iterator[tuple[str, str, float]]:
    """Name, what was found (for the client's own log alone), and seconds until it is worth asking again."""
    again = wanted.ask_again
    if wanted.hours and (wait := _wait(wanted.hours, host.clock())):
        yield "hours", f"it is {host.clock():%H:%M}, the hours are {wanted.hours}", min(wait, _LONGEST)
    if wanted.charging and not host.is_charging():
        yield "charging", "the machine lives on its battery", again
    named = wanted.metered_interfaces
    if wanted.unmetered or named:
        interface = host.route()
        if interface in named if named else host.is_metered(interface):
            yield "unmetered", f"traffic over {interface} costs", again
    if wanted.idle is not None and (load := host.load_per_core()) > wanted.idle:
        yield "idle", f"the load is {load:.2f} per core, at most {wanted.idle:g} is allowed", again
    if wanted.free_disk_mb is not None and (free := host.free_mb(store)) < wanted.free_disk_mb:
        yield "free_disk_mb", f"{free:.0f} MB are free, {wanted.free_disk_mb:g} are wanted", again


def _wait(hours: str, now: datetime) -> float:
    """Seconds until the hours begin; 0 within them."""
    begin, end = _minutes(hours)
    minute = 60 * now.hour + now.minute
    if (minute - begin) % _DAY < (end - begin) % _DAY:
        return 0.0
    return max(1.0, 60.0 * ((begin - minute) % _DAY) - now.second)
