"""Who signs what: the roles, their names, how long their signatures last, and which files a channel may speak for.

    root ── targets ── dev, canary, stable ... ── hash bins (once a channel is large)
         ├─ snapshot
         └─ timestamp

Root and targets keys stay offline; snapshot and timestamp are signed by a machine, all the time. Each channel is a
delegated role with keys of its own, and may speak for ``CHANNEL/*`` and ``CHANNEL/*/*`` alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from federated.errors import ReleaseError

__all__ = [
    "CURRENT",
    "FLOORS",
    "MANIFEST",
    "ONLINE",
    "PROBES",
    "ROOT",
    "SNAPSHOT",
    "TARGETS",
    "TIMESTAMP",
    "TOP",
    "WEIGHTS",
    "Plan",
    "Quorum",
    "bin_prefix",
    "channel_of",
    "check_channel",
    "check_file",
    "current_path",
    "file_name",
    "group_of",
    "patterns_of",
    "target_path",
]

ROOT, TARGETS, SNAPSHOT, TIMESTAMP = "root", "targets", "snapshot", "timestamp"
TOP = (ROOT, TARGETS, SNAPSHOT, TIMESTAMP)
ONLINE = (SNAPSHOT, TIMESTAMP)

CURRENT = "current.json"
"""Under a channel: which version it points at."""

MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"
"""Under a version: its record, whose SHA-256 is the version's id, and the full canonical weights."""

PROBES = "probes.json"
"""Under a version, where the publisher made them: inputs with what adapter and base alone must answer to them."""

FLOORS = "security-floors.json"
"""The top-level target that carries the least release counters that may still be installed."""

_CHANNEL = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_READS_AS_VERSION = re.compile(r"v[0-9]{1,9}|[0-9a-f]{6,64}|latest|null")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
_BIN = ".bin"


@dataclass(frozen=True)
class Quorum:
    """``threshold`` of ``keys`` signatures are needed.

    Raises:
        ReleaseError: if that can never be met, or means nothing.
    """

    threshold: int = 1
    keys: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.threshold <= self.keys <= 32:
            raise ReleaseError(
                f"{self.threshold} of {self.keys} signatures; expected 1 <= threshold <= keys <= 32, such as 2/3"
            )


_DAYS: Mapping[str, int] = {ROOT: 365, TARGETS: 180, SNAPSHOT: 14, TIMESTAMP: 3}
_CHANNEL_DAYS = 90


@dataclass(frozen=True)
class Plan:
    """What a new repository is to be; each part is written into the signed metadata and read from there later.

    Args:
        channels: names of the delegated roles.
        quorums: by role, where it is not one of one; root's is two of three unless said otherwise.
        days: by role, how long a signature lasts, where it is not root 365, targets 180, a channel 90, snapshot 14,
            timestamp 3.
        bins: hash bins of a large channel, a power of two.
        bins_past: files of a channel, from which on it is split into bins; 0: from the start. A listed version costs a
            device 0.7 kB at each update, a bin 36 bytes.

    Raises:
        ReleaseError: if a name or number cannot be.
    """

    channels: tuple[str, ...] = ("dev", "canary", "stable")
    quorums: Mapping[str, Quorum] = field(default_factory=dict)
    days: Mapping[str, int] = field(default_factory=dict)
    bins: int = 64
    bins_past: int = 40

    def __post_init__(self) -> None:
        for channel in self.channels:
            check_channel(channel)
        unknown = {*self.quorums, *self.days} - {*TOP, *self.channels}
        if unknown or len(set(self.channels)) != len(self.channels) or not self.channels:
            names = ", ".join((*TOP, *self.channels))
            raise ReleaseError(f"channels {self.channels} and no role {sorted(unknown)}; expected each once of {names}")
        if min((*self.days.values(), 1)) < 1 or self.bins_past < 0:
            raise ReleaseError("a signature lasts at least one day, and a channel has at least 0 files before its bins")
        if not (2 <= self.bins <= 2**20 and self.bins.bit_count() == 1):
            raise ReleaseError(f"{self.bins} hash bins; expected a power of two from 2 to {2**20}")

    def quorum(self, role: str) -> Quorum:
        """Of a role."""
        return self.quorums.get(role, Quorum(2, 3) if role == ROOT else Quorum())

    def days_of(self, role: str) -> int:
        """How long a signature of a role lasts."""
        return self.days.get(role, _DAYS.get(role, _CHANNEL_DAYS))


def check_channel(name: str) -> None:
    """Refuse a name that no channel can have.

    Raises:
        ReleaseError: naming the rule.
    """
    if not _CHANNEL.fullmatch(name) or _READS_AS_VERSION.fullmatch(name) or name in TOP:
        raise ReleaseError(
            f"{name!r} cannot name a channel; expected up to 64 of a-z, 0-9 and '-', which read as no version and no "
            f"role, such as dev, canary or stable"
        )


def check_file(name: str) -> None:
    """Refuse a file name that could lead anywhere but into its version's folder.

    Raises:
        ReleaseError: naming the rule.
    """
    if not _FILE.fullmatch(name) or len(name) > 100:
        raise ReleaseError(
            f"{name!r} cannot name a file of a release; expected up to 100 letters, digits and any of . _ -, no '..'"
        )


def current_path(channel: str) -> str:
    """The target that says where a channel points."""
    return f"{channel}/{CURRENT}"


def target_path(channel: str, version_id: str, name: str) -> str:
    """A file of a version on a channel."""
    return f"{channel}/{version_id}/{name}"


def file_name(path: str, digest: str) -> str:
    """Where a target's bytes lie in the folder: each content under a name of its own (consistent snapshots)."""
    folder, slash, name = path.rpartition("/")
    return f"targets/{folder}{slash}{digest}.{name}"


def patterns_of(channel: str) -> list[str]:
    """The paths that a channel may speak for."""
    return [f"{channel}/*", f"{channel}/*/*"]


def bin_prefix(channel: str) -> str:
    """How the names of a channel's hash bins begin; no channel's name has a dot."""
    return f"{channel}{_BIN}"


def channel_of(role: str) -> str:
    """The channel that a role is, or is a bin of."""
    return role.partition(_BIN)[0]


def group_of(role: str) -> str:
    """The folder of a role's keys: who holds one of these should hold no other."""
    return "online" if role in ONLINE else role if role in TOP else f"channels/{role}"
