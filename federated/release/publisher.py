"""The publisher: makes a repository of signed releases in a folder, and keeps it.

    publisher = Publisher.create(Path("releases"), KeyRing(Path("keys"), passphrase=ask))
    publisher.publish("dev", Artefact.of(registry, "v3"))

The folder holds static files that any web server or object store can serve: ``metadata/`` and ``targets/``. It is the
publisher's master copy; serve a copy of it, uploaded in the order ``targets``, ``metadata``, ``timestamp.json``.
Called by `federated.cli`; knows no registry and no database.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from federated.errors import ReleaseError, WrongClock
from federated.release import shelf
from federated.release.artefact import Artefact
from federated.release.bundle import Bundle, write_bundle
from federated.release.ceremony import found, replace_keys
from federated.release.disk import locked, translated, write_file
from federated.release.documents import DAYS, signed_at
from federated.release.edition import Edition, trusted_root_of
from federated.release.holdings import weights_on
from federated.release.keys import KeyRing
from federated.release.records import ReleaseRecord
from federated.release.roles import SNAPSHOT, TIMESTAMP, TOP, Plan
from federated.release.status import Status, status_of

__all__ = ["Publisher"]

_TOLERANCE = timedelta(days=1)


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Publisher:
    """Publishes into one folder; several processes may, one waits for the other.

    Args:
        folder: of the repository.
        ring: the keys that are at hand; each method says which it needs.
        clock: the time, with its zone.
        trust_clock: sign even if the last signature seems to be in the future: after a clock was wrong.
    """

    def __init__(
        self,
        folder: Path,
        ring: KeyRing,
        *,
        clock: Callable[[], datetime] = _utc_now,
        trust_clock: bool = False,
    ) -> None:
        self.folder = folder
        self._ring = ring
        self._clock = clock
        self._trust_clock = trust_clock

    @classmethod
    def create(
        cls, folder: Path, ring: KeyRing, plan: Plan | None = None, *, clock: Callable[[], datetime] = _utc_now
    ) -> Self:
        """Make a repository and its keys; keys of the ring that have the right names are used.

        Raises:
            ReleaseError: if there is one in that folder or for those keys, or the folder cannot be written.
            SigningKeyError: if a key cannot be made or does not open.
        """
        made = cls(folder, ring, clock=clock)
        with locked(folder):
            for there in (folder / "metadata", trusted_root_of(ring)):
                if there.exists():
                    raise ReleaseError(f"there is a repository already: {there}; choose other folders")
            files = found(ring, plan or Plan()).signed(ring, clock())
            with translated("write the repository"):
                for name, data in files.items():
                    write_file(folder / name, data)
                write_file(trusted_root_of(ring), files["metadata/1.root.json"])
            Edition.open(folder, ring)
        return made

    @property
    def trusted_root(self) -> Path:
        """The root metadata to give to devices; never secret."""
        return trusted_root_of(self._ring)

    def publish(self, channel: str, *artefacts: Artefact, audit_head: str = "") -> list[ReleaseRecord]:
        """Put versions on a channel, the last one as its current version.

        A version that was released before keeps its release counter: publishing it again is a rollback. Needs the
        channel's keys and the online ones.

        Args:
            channel: its name.
            artefacts: at least one.
            audit_head: the registry's audit log at this moment, signed along.

        Raises:
            BelowSecurityFloor: if a version was revoked.
            SigningKeyError: if a key is missing or does not open; nothing was written.
            WrongClock: if the clock is behind the last signature.
            ReleaseError: if there is no such channel, or the folder cannot be written.
            UntrustedRelease: if somebody changed the folder.
        """
        with self._changing() as edition:
            return shelf.add(edition, channel, artefacts, audit_head=audit_head)

    def held(self, channel: str, *version_ids: str) -> list[bytes]:
        """Weights that devices of a channel may hold, for diffs: each once, in the order in which versions are named.

        Args:
            channel: its name.
            version_ids: in full; without any, what the channel points at now. Versions that it never had are left out.

        Raises:
            ReleaseError, UntrustedRelease: if a file is gone or changed, or see `publish`.
        """
        with locked(self.folder):
            edition = Edition.open(self.folder, self._ring)
            records = [shelf.known(edition, one, [channel]) for one in version_ids]
            if not version_ids:
                records = [shelf.current(edition, channel)]
            found = [weights_on(edition, self.folder, channel, one) for one in records if one is not None]
        return list(dict.fromkeys(weights for each in found for weights in each))

    def rollback(self, channel: str, version_id: str) -> ReleaseRecord:
        """Point a channel at a version that it has: new metadata, an old target. Needs the same keys as `publish`.

        Raises:
            NotReleased: if the channel never had it.
            BelowSecurityFloor: if it was revoked.
            SigningKeyError, WrongClock, ReleaseError, UntrustedRelease: see `publish`.
        """
        with self._changing() as edition:
            return shelf.point(edition, channel, version_id)

    def renew(self, *roles: str) -> list[str]:
        """Sign roles again, unchanged, so that they last; without names what the online keys must do regularly.

        Returns:
            What was signed.

        Raises:
            SigningKeyError, WrongClock, ReleaseError, UntrustedRelease: see `publish`.
        """
        with self._changing() as edition:
            names = [*roles] or [TIMESTAMP, *([SNAPSHOT] if self._is_old(edition) else [])]
            for name in names:
                for part in [name] if name in TOP else shelf.roles_of(edition, name):
                    edition.renew(part)
            return names

    def rotate(self, role: str, *, key: str | None = None) -> list[str]:
        """Replace a role's keys, as planned; what they signed is signed by the new ones.

        Needs root's keys for a top-level role, targets' for a channel, and the online ones.

        Args:
            role: a top-level role or a channel.
            key: name of one key; None replaces all of them.

        Returns:
            The new keys' names.

        Raises:
            SigningKeyError, WrongClock, ReleaseError, UntrustedRelease: see `publish`.
        """
        with self._changing() as edition:
            return replace_keys(edition, self._ring, role, key)

    def revoke(self, role: str, *, key: str | None = None) -> list[str]:
        """Replace keys that somebody else may have: `rotate`, and a channel is emptied besides.

        What an attacker put on a channel would otherwise be signed by the new keys. Publish there again.

        Raises:
            SigningKeyError, WrongClock, ReleaseError, UntrustedRelease: see `publish`.
        """
        with self._changing() as edition:
            return replace_keys(edition, self._ring, role, key, empty=True)

    def revoke_version(self, version_id: str) -> int:
        """Raise an adapter's security floor above a version: it and all before it are refused from now on.

        Needs the targets' keys and the online ones.

        Returns:
            The new floor.

        Raises:
            ReleaseError: if no channel has such a version, or see `publish`.
        """
        with self._changing() as edition:
            record = shelf.known(edition, version_id, edition.channels)
            if record is None:
                raise ReleaseError(f"no channel has version {version_id}; give a released version's whole id")
            least = max(shelf.floors(edition).get(record.adapter_id, 0), record.release_counter + 1)
            shelf.set_floor(edition, record.adapter_id, least)
            return least

    def set_floor(self, least: int, *, adapter_id: str = "") -> None:
        """Sign an adapter's security floor, also a lower one: after somebody with the targets' keys drove it up.

        Raises:
            ReleaseError: if it is no release counter, or see `publish`.
        """
        with self._changing() as edition:
            shelf.set_floor(edition, adapter_id, least)

    def status(self) -> Status:
        """What is signed now, until when, and by which keys; needs none.

        Raises:
            ReleaseError, UntrustedRelease: see `publish`.
        """
        with locked(self.folder):
            return status_of(Edition.open(self.folder, self._ring), self._ring, self._clock())

    def bundle(self, channel: str, into: Path, *, days: int = 0) -> Bundle:
        """Copy what a device needs to install a channel's current version without a network.

        Args:
            channel: its name.
            into: a new folder.
            days: snapshot and timestamp in the bundle last at least so long; 0 copies them as they are, for which no
                key is needed. Else the online keys are.

        Raises:
            NotReleased: if the channel is empty.
            BelowSecurityFloor: if its version was revoked.
            SigningKeyError, WrongClock, ReleaseError, UntrustedRelease: see `publish`.
        """
        with locked(self.folder):
            edition = self._opened()
            return write_bundle(edition, channel, self.folder, into, ring=self._ring, now=self._clock(), days=days)

    @contextmanager
    def _changing(self) -> Iterator[Edition]:
        with locked(self.folder):
            edition = self._opened()
            yield edition
            edition.commit(self.folder, self._ring, self._clock())

    def _opened(self) -> Edition:
        edition = Edition.open(self.folder, self._ring)
        signed, now = signed_at(edition.timestamp), self._clock()
        if signed is not None and now < signed - _TOLERANCE and not self._trust_clock:
            raise WrongClock(
                f"the clock here says {now:%Y-%m-%d %H:%M} UTC, and the last signature is of {signed:%Y-%m-%d %H:%M}: "
                f"set the clock; if it is right and was wrong then, say so with --trust-clock"
            )
        return edition

    def _is_old(self, edition: Edition) -> bool:
        left = edition.snapshot.expires - self._clock()
        return left < timedelta(days=edition.term(SNAPSHOT, DAYS, 1)) / 2
