"""One edition of a repository: all its signed metadata, verified, being changed, signed anew and written.

The folder is not trusted, not even by the publisher: what is in it is verified by the publisher's own trusted root and
by what was seen last (``keys/trusted/``) before anything of it is signed again. Nothing is written before everything is
signed, and the timestamp last: a kill leaves the old edition or the new one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from securesystemslib.signer import Key
from tuf.api.metadata import Delegations, Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from federated.errors import ReleaseError, WrongContent
from federated.release.disk import read_file, translated, write_file
from federated.release.documents import DAYS, mark, number, sign
from federated.release.keys import KeyRing
from federated.release.roles import ONLINE, ROOT, SNAPSHOT, TARGETS, TIMESTAMP, TOP, channel_of, file_name
from federated.release.source import FolderSource
from federated.release.store import Store
from federated.release.workflow import Limits, Workflow

__all__ = ["Edition", "Need", "trusted_root_of"]

Need = tuple[int, Sequence[Key]]
"""A threshold, and the keys that count for it."""


def trusted_root_of(ring: KeyRing) -> Path:
    """The root metadata that this publisher, and every device, trusts without proof."""
    return ring.home / "trusted" / "root.json"


class Edition:
    """See the module.

    Args:
        root, timestamp, snapshot, targets: of the last edition; copied, because what was verified goes on verifying.
        load: gives a delegated role's metadata by its name and its delegator's.
    """

    def __init__(
        self,
        root: Root,
        timestamp: Timestamp,
        snapshot: Snapshot,
        targets: Targets,
        *,
        load: Callable[[str, str], Targets],
    ) -> None:
        self.root = root
        self.timestamp = deepcopy(timestamp)
        self.snapshot = deepcopy(snapshot)
        self._roles: dict[str, Targets] = {TARGETS: targets}
        self._load = load
        self._changed: set[str] = set()
        self._files: dict[str, bytes] = {}
        self._before: Root | None = None

    @classmethod
    def open(cls, folder: Path, ring: KeyRing) -> Edition:
        """The newest edition in a folder; out of date or not.

        Raises:
            ReleaseError: if there is no repository, or this publisher has no trusted root.
            UntrustedRelease: if somebody changed the folder, or put an older state there.
        """
        with translated("read the trusted root"):
            root = read_file(trusted_root_of(ring))
        if root is None:
            raise ReleaseError(
                f"there is no {trusted_root_of(ring)}: make a repository with `fedpeft release keys init`, or put the "
                f"root.json there that your devices were given"
            )
        seen = Workflow(root, FolderSource(folder), Store(ring.home / "trusted"), now=None, limits=Limits())
        seen.refresh()
        return cls(seen.root, seen.timestamp, seen.snapshot, seen.targets, load=seen.role)

    @property
    def delegations(self) -> Delegations:
        """From the top-level targets to the channels."""
        delegations = self.role(TARGETS).delegations
        if delegations is None or delegations.roles is None:
            raise ReleaseError("this repository delegates to no channel: it was not made by this library")
        return delegations

    @property
    def channels(self) -> list[str]:
        """Their names, in the order of delegation."""
        return list(self.delegations.roles or ())

    def role(self, name: str) -> Targets:
        """A targets role, for reading."""
        if name not in self._roles:
            delegator = TARGETS if name in self.channels else channel_of(name)
            self._roles[name] = self._load(name, delegator)
        return self._roles[name]

    def channel(self, name: str) -> Targets:
        """A channel's role, for reading.

        Raises:
            ReleaseError: naming those that there are.
        """
        if name not in self.channels:
            raise ReleaseError(f"there is no channel {name!r} in this repository; there are {', '.join(self.channels)}")
        return self.role(name)

    def change(self, name: str) -> Targets:
        """A targets role, for changing: it is signed with this edition."""
        if name not in self._changed:
            self._roles[name] = deepcopy(self.role(name))
        self._changed.add(name)
        return self._roles[name]

    def start(self, name: str) -> Targets:
        """A targets role with nothing in it, for changing: a new one, or one whose content is not to be trusted.

        Its versions go on from those that devices have seen.
        """
        role, seen = Targets(), self.snapshot.meta.get(f"{name}.json")
        role.version = 0 if seen is None else seen.version
        self._roles[name] = role
        self._changed.add(name)
        return role

    def change_root(self) -> Root:
        """The root, for changing: it is signed with the old keys and the new ones."""
        if self._before is None:
            self._before, self.root = self.root, deepcopy(self.root)
        return self.root

    def renew(self, name: str) -> None:
        """Sign a role again with this edition, unchanged."""
        if name == ROOT:
            self.change_root()
        elif name in ONLINE:
            self._changed.add(name)
        else:
            self.change(name)

    def term(self, role: str, name: str, default: int) -> int:
        """A number that stands where a role (or the channel of a hash bin) is delegated; see `documents`.

        Raises:
            WrongContent: if it is none.
        """
        delegated = self.root.roles[role] if role in TOP else (self.delegations.roles or {})[channel_of(role)]
        return number(delegated.unrecognized_fields, name, default)

    def add_file(self, path: str, data: bytes, custom: Any = None) -> TargetFile:
        """A file that is written with this edition; what is signed of it."""
        digest = hashlib.sha256(data).hexdigest()
        self._files[file_name(path, digest)] = data
        return TargetFile(len(data), {"sha256": digest}, path, {} if custom is None else {"custom": custom})

    def needs(self, role: str) -> Need:
        """What a role's signatures must be.

        Raises:
            WrongContent: if nobody delegates to it, or to keys that are not there.
        """
        delegator: Root | Targets = self.root
        if role not in TOP:
            delegator = self.role(TARGETS if role in self.channels else channel_of(role))
        try:
            delegated = delegator.get_delegated_role(role)
            return delegated.threshold, [delegator.get_key(keyid) for keyid in delegated.keyids]
        except ValueError as error:
            raise WrongContent(f"nobody delegates to {role} as it must be ({error})") from error

    def signed(self, ring: KeyRing, now: datetime, *, days: int = 0) -> dict[str, bytes]:
        """Sign what changed, and what must follow; the files by name, in the order in which they must be written.

        Args:
            ring: must hold the keys of all that changed, and the online ones.
            now: of the signatures.
            days: snapshot and timestamp last at least so long.

        Raises:
            SigningKeyError: if a key is not there, or does not open; nothing was written.
        """
        files, self._files = self._files, {}
        roles = sorted(self._changed - set(TOP)) + sorted(self._changed & {TARGETS})
        for name in roles:
            data = self._sign(name, self.role(name), ring, now)
            files[f"metadata/{self.role(name).version}.{name}.json"] = data
            self.snapshot.meta[f"{name}.json"] = _meta(self.role(name).version, data, brief=name != channel_of(name))
        short = self.snapshot.expires < now + timedelta(days=days)
        if roles or short or SNAPSHOT in self._changed or self._before is not None:
            data = self._sign(SNAPSHOT, self.snapshot, ring, now, days=days)
            files[f"metadata/{self.snapshot.version}.snapshot.json"] = data
            self.timestamp.snapshot_meta = _meta(self.snapshot.version, data)
        if self._before is not None:
            files[f"metadata/{self._before.version + 1}.root.json"] = self._sign(ROOT, self.root, ring, now)
        files["metadata/timestamp.json"] = self._sign(TIMESTAMP, self.timestamp, ring, now, days=days)
        self._changed, self._before = set(), None
        return files

    def commit(self, folder: Path, ring: KeyRing, now: datetime) -> None:
        """Sign, write, and verify the outcome as a device would.

        Raises:
            SigningKeyError: if a key is not there, or does not open; nothing was written.
            ReleaseError: if the folder cannot be written.
        """
        files = self.signed(ring, now)
        with translated("write the release"):
            for name, data in files.items():
                if not (name.startswith("targets/") and read_file(folder / name) == data):
                    write_file(folder / name, data)
        self.open(folder, ring)

    def _sign(
        self, role: str, signed: Root | Timestamp | Snapshot | Targets, ring: KeyRing, now: datetime, *, days: int = 0
    ) -> bytes:
        mark(signed, now, days=max(days, self.term(role, DAYS, 1)))
        document: Metadata[Any] = Metadata(signed)
        needs = [self.needs(role)]
        if role == ROOT and self._before is not None:
            old = self._before.roles[ROOT]
            needs.append((old.threshold, [self._before.keys[keyid] for keyid in old.keyids]))
        sign(document, role, needs, ring)
        return document.to_bytes()


def _meta(version: int, data: bytes, *, brief: bool = False) -> MetaFile:
    """What names a document. A hash bin has its version alone: there are thousands of them in one snapshot."""
    return MetaFile(version) if brief else MetaFile(version, len(data), {"sha256": hashlib.sha256(data).hexdigest()})
