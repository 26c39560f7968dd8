"""Numbers, sizes, dates and digests as text, for the report's page."""

from __future__ import annotations

import json
from datetime import UTC, datetime

__all__ = [
    "byte_size",
    "figure",
    "is_share",
    "metric",
    "moment",
    "number",
    "percent",
    "setting",
    "short_digest",
    "words",
]

_SHARES = ("energy_kept", "residual_kept", "remainder_carried", "remainder_lost")
"""What rules report as a share of one."""


def words(name: str) -> str:
    """A key as words: underscores become spaces."""
    return name.replace("_", " ")


def is_share(name: str) -> bool:
    """Whether a metric of this name is a share of one, to be shown in percent."""
    return name.endswith(("accuracy", "f1"))


def metric(value: float | None, name: str) -> str:
    """A loss or metric: percent for shares, whole counts, else three decimals; a dash for None."""
    if is_share(name):
        return percent(value, 1)
    if "_num_" in f"_{name}":
        return number(value, 12)
    return f"{value:.3f}" if value is not None and 1e-3 <= abs(value) < 1e4 else number(value)


def figure(value: float | None, name: str) -> str:
    """What a rule reports of a round: percent for shares, decimal units for bytes, else a number; a dash for None."""
    if name in _SHARES:
        return percent(value, 2)
    return byte_size(value) if name.endswith("_bytes") else number(value)


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits; a dash for None."""
    return "-" if value is None else f"{value:,.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"


def percent(value: float | None, decimals: int = 1) -> str:
    """A share of one in percent; a dash for None."""
    return "-" if value is None else f"{value:.{decimals}%}".replace("%", " %")


def byte_size(value: float | None) -> str:
    """Bytes in decimal units, so that they compare with a disk's or a network's; a dash for None."""
    if value is None:
        return "-"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.{0 if value >= 100 * size else 1}f} {unit}"
    return f"{value:.0f} B"


def moment(value: float | str | None) -> str:
    """Seconds since the epoch, or a date as text, in UTC."""
    if isinstance(value, int | float):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return "-" if value is None else str(value)[:19].replace("T", " ")


def setting(value: object) -> str:
    """A configuration's value as YAML would have it on one line; text without quotes unless it is empty."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)


def short_digest(digest: str | None) -> str:
    """The first twelve characters of a digest; a dash for none."""
    return "-" if not digest else str(digest)[:12]
