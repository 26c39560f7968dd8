"""TUF's client workflow (specification 1.0.34, section 5): from a trusted root to the one file that was asked for.

    root N, N+1 ... -> timestamp -> snapshot -> targets -> channel -> hash bin

Each step is verified by the library's own trusted set before the next one is looked at. What this module adds is where
bytes come from (`Source`), where they are kept (`Store`), how many there may be, by which clock they are judged, and
the name of what is refused. One object is one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import cast
from urllib.parse import quote

from tuf.api.exceptions import (
    BadVersionNumberError,
    EqualVersionNumberError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
)
from tuf.api.metadata import Metadata, Root, Signed, Snapshot, TargetFile, Targets, Timestamp
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType

from federated.errors import EndlessData, MissingFile, MixAndMatch, WrongClock
from federated.release.documents import signed_at
from federated.release.refusals import TUF_ERRORS, expired, mismatched, refused
from federated.release.roles import ROOT, SNAPSHOT, TARGETS, TIMESTAMP, channel_of
from federated.release.source import Source, read_all
from federated.release.store import Store

__all__ = ["Limits", "Workflow"]

_NO_CLOCK = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Limits:
    """The most that is read, in bytes, whatever was signed; a source that sends more is cut off.

    Args:
        root, timestamp, snapshot, targets: of one such file; a snapshot names all hash bins.
        file: of one file of a version.
        roots: new roots in one pass.
        delegations: roles looked into for one file.
        clock: by how much the clock may be behind the last signature.
    """

    root: int = 512_000
    timestamp: int = 16_384
    snapshot: int = 4_000_000
    targets: int = 8_000_000
    file: int = 2 * 1024**3
    roots: int = 256
    delegations: int = 32
    clock: timedelta = timedelta(days=1)


class Workflow:
    """One pass.

    Args:
        trusted_root: root metadata that are trusted without proof: they came with the device.
        source: not trusted.
        store: what earlier passes verified.
        now: the time by which expiry is judged; None judges no expiry (a publisher looks at its own old metadata).
        limits: see there.

    Raises:
        WrongContent, WrongSignature: if the trusted root itself is none.
    """

    def __init__(
        self, trusted_root: bytes, source: Source, store: Store, *, now: datetime | None, limits: Limits
    ) -> None:
        self._source = source
        self._store = store
        self._now = now
        self._limits = limits
        try:
            self._set = TrustedMetadataSet(trusted_root, EnvelopeType.METADATA)
        except TUF_ERRORS as error:
            raise refused(error, ROOT, "this machine (the trusted root)") from error
        self._set.reference_time = now or _NO_CLOCK
        self._roles: dict[str, Targets] = {}

    @property
    def root(self) -> Root:
        """The newest root."""
        return self._set.root

    @property
    def timestamp(self) -> Timestamp:
        """The verified timestamp."""
        return self._set.timestamp

    @property
    def snapshot(self) -> Snapshot:
        """The verified snapshot."""
        return self._set.snapshot

    @property
    def targets(self) -> Targets:
        """The verified top-level targets."""
        return self._set.targets

    def refresh(self) -> None:
        """Bring the top-level metadata up to date.

        Raises:
            UntrustedRelease: by name; what was verified before stays.
            Unreachable: if the source does not answer.
            WrongClock: if the clock is behind the newest signature.
            ReleaseError: if the store cannot be written.
        """
        self._roots()
        if self.root.is_expired(self._set.reference_time):
            raise expired(ROOT, self.root, self._set.reference_time)
        self._take_timestamp()
        self._take_snapshot()
        self.role(TARGETS, ROOT)

    def role(self, name: str, delegator: str) -> Targets:
        """The metadata of a targets role, from the store or the source.

        Args:
            name: of the role.
            delegator: the role that names its keys, which must be loaded.

        Raises:
            UntrustedRelease: by name.
            Unreachable: if the source does not answer.
        """
        if not self._set.contains(name, delegator):
            self._roles[name] = self._kept_role(name, delegator) or self._fetched_role(name, delegator)
        return self._roles[name]

    def valid_until(self, channel: str, now: datetime) -> datetime:
        """When the first of the signatures ends that a channel's files rest on, as far as they were looked at.

        Raises:
            ExpiredMetadata, FreezeAttack: if that was before ``now``.
        """
        signed: dict[str, Signed] = {ROOT: self.root, TIMESTAMP: self.timestamp, SNAPSHOT: self.snapshot}
        signed |= {name: role for name, role in self._roles.items() if channel_of(name) in (TARGETS, channel)}
        for name, one in signed.items():
            if one.is_expired(now):
                raise expired(name, one, now)
        return min(one.expires for one in signed.values())

    def find(self, path: str) -> TargetFile | None:
        """Who may speak for a path is asked in order, from the most trusted down; None if nobody signed it.

        Raises:
            UntrustedRelease, Unreachable: see `role`.
        """
        waiting = [(TARGETS, ROOT)]
        seen: set[str] = set()
        while waiting and len(seen) <= self._limits.delegations:
            name, delegator = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            targets = self.role(name, delegator)
            if path in targets.targets:
                return targets.targets[path]
            children, ends = _children(targets, path)
            if ends:
                waiting.clear()
            waiting += [(child, name) for child in reversed(children)]
        return None

    def _roots(self) -> None:
        first = self.root.version + 1
        for version in range(first, first + self._limits.roots):
            kept = self._store.root(version)
            if kept is not None:
                with suppress(*TUF_ERRORS):
                    self._set.update_root(kept)
                    continue
            try:
                data = self._read(ROOT, version, self._limits.root)
            except MissingFile:
                return
            self._verify(ROOT, data, self.root, self._set.update_root)
            self._store.keep_root(version, data)
        raise EndlessData(
            f"{self._source.label} has more than {self._limits.roots} roots after version {first - 1}; install a newer "
            f"trusted root"
        )

    def _take_timestamp(self) -> None:
        kept = self._store.role(TIMESTAMP)
        if kept is not None:
            with suppress(*TUF_ERRORS):  # an expired one is loaded all the same, and protects from older ones
                self._set.update_timestamp(kept)
        known = self._set.get(TIMESTAMP)
        data = self._read(TIMESTAMP, None, self._limits.timestamp)
        with suppress(EqualVersionNumberError):  # then the known one stays
            self._verify(TIMESTAMP, data, self.root, self._set.update_timestamp)
        self._check_clock(self.timestamp)
        if self.timestamp.is_expired(self._set.reference_time):
            raise expired(TIMESTAMP, self.timestamp, self._set.reference_time)
        if self.timestamp is not known:
            self._store.keep_role(TIMESTAMP, data)

    def _check_clock(self, timestamp: Timestamp) -> None:
        signed = signed_at(timestamp)
        if self._now is not None and signed is not None and self._now < signed - self._limits.clock:
            raise WrongClock(
                f"the clock here says {self._now:%Y-%m-%d %H:%M} UTC, and timestamp from {self._source.label} was "
                f"signed at {signed:%Y-%m-%d %H:%M}: set the clock; if it is right, the publisher's was wrong"
            )

    def _take_snapshot(self) -> None:
        kept = self._store.role(SNAPSHOT)
        if kept is not None:
            with suppress(*TUF_ERRORS):  # an older one is loaded all the same, and protects from older parts
                self._set.update_snapshot(kept, trusted=True)
                return
        named = self.timestamp.snapshot_meta
        data = self._read(SNAPSHOT, named.version, _least(named.length, self._limits.snapshot))
        self._verify(SNAPSHOT, data, self.root, self._set.update_snapshot)
        self._store.keep_role(SNAPSHOT, data)

    def _kept_role(self, name: str, delegator: str) -> Targets | None:
        kept = self._store.role(name)
        if kept is not None:
            with suppress(*TUF_ERRORS):  # an older version, or one whose keys were replaced
                return self._set.update_delegated_targets(kept, name, delegator)
        return None

    def _fetched_role(self, name: str, delegator: str) -> Targets:
        named = self.snapshot.meta.get(f"{name}.json")
        if named is None:
            raise MixAndMatch(f"{delegator} names a role {name}, and the snapshot from {self._source.label} does not")
        data = self._read(name, named.version, _least(named.length, self._limits.targets))
        above = cast("Root | Targets", self._set[delegator])
        self._verify(name, data, above, lambda new: self._set.update_delegated_targets(new, name, delegator))
        self._store.keep_role(name, data)
        return cast("Targets", self._set[name])

    def _verify(self, role: str, data: bytes, above: Root | Targets, update: Callable[[bytes], object]) -> None:
        """Hand bytes to the trusted set; what it refuses gets its name here."""
        before, source = self._set.get(role), self._source.label
        try:
            update(data)
        except EqualVersionNumberError:
            raise
        except LengthOrHashMismatchError as error:
            raise mismatched(data, role, above, source) from error
        except ExpiredMetadataError as error:
            if role != TIMESTAMP:  # which is judged after the clock
                raise expired(role, Metadata.from_bytes(data).signed, self._set.reference_time) from error
        except BadVersionNumberError as error:
            if role == SNAPSHOT and self._set.get(role) is not before:  # no older parts: another snapshot
                raise MixAndMatch(f"{role} from {source} is not the one that timestamp names ({error})") from error
            raise refused(error, role, source) from error
        except TUF_ERRORS as error:
            raise refused(error, role, source) from error

    def _read(self, role: str, version: int | None, limit: int) -> bytes:
        name = quote(role, safe="")
        prefix = "" if version is None else f"{version}."
        return read_all(self._source, f"metadata/{prefix}{name}.json", limit)


def _least(signed: int | None, limit: int) -> int:
    return limit if signed is None else min(signed, limit)


def _children(targets: Targets, path: str) -> tuple[list[str], bool]:
    """The roles that a role delegates a path to, and whether nobody else is to be asked after them."""
    children = []
    if targets.delegations is not None:
        for child, terminating in targets.delegations.get_roles_for_target(path):
            children.append(child)
            if terminating:
                return children, True
    return children, False
