"""An adversary between publisher and device: a mirror that lies, and a thief with some of the publisher's keys.

    mirror = Mirror.of(publisher.folder)
    thief = Thief(mirror, ring)
    thief.forge("stable", lambda signed: signed["targets"].clear(), keys=["canary-1"])
    thief.relink(keys=["snapshot-1", "timestamp-1"])
    ReleaseClient(root, mirror, state).refresh()

All is in memory, and reaches a device through the one interface that a real mirror has, `federated.release.Source`. A
thief signs whatever he likes with the keys that he is given by name; whether that is worth anything, the device says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from federated.errors import MissingFile, Unreachable
from federated.manifest import canonical_json, sha256_hex
from federated.release import KeyRing

__all__ = ["Mirror", "Thief"]

_CHUNK = 65_536
Signed = dict[str, Any]


class Mirror:
    """A copy of a release's folder in the adversary's hands; a `federated.release.Source`.

    Args:
        files: bytes by name, such as ``metadata/timestamp.json``; to be changed at will.

    Attributes:
        down: answers nothing any more.
        endless: names of files that never end.
        requests: the names that were asked for.
        sent: bytes that went out.
    """

    label = "mirror"

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.down = False
        self.endless: set[str] = set()
        self.requests: list[str] = []
        self.sent = 0

    @classmethod
    def of(cls, folder: Path) -> Mirror:
        """What a folder holds at this moment."""
        parts = [path for name in ("metadata", "targets") for path in (folder / name).rglob("*") if path.is_file()]
        return cls({path.relative_to(folder).as_posix(): path.read_bytes() for path in parts})

    def read(self, name: str) -> Generator[bytes, None, None]:
        """Send a file, or what the adversary has put in its place.

        Raises:
            Unreachable: while the mirror is down.
            MissingFile: if there is no such file.
        """
        self.requests.append(name)
        if self.down:
            raise Unreachable("the mirror does not answer; the adversary took it down")
        if name not in self.files:
            raise MissingFile(f"mirror has no {name}")
        data = self.files[name]
        for start in range(0, len(data), _CHUNK):
            yield self._send(data[start : start + _CHUNK])
        while name in self.endless:
            yield self._send(b"\0" * _CHUNK)

    def named(self, ending: str) -> str:
        """The one file whose name ends so, as it is asked for.

        Raises:
            LookupError: if it is not one.
        """
        found = [name for name in self.files if name.endswith(ending)]
        if len(found) != 1:
            raise LookupError(f"{len(found)} files end with {ending!r}: {found}")
        return found[0]

    def _send(self, chunk: bytes) -> bytes:
        self.sent += len(chunk)
        return chunk


class Thief:
    """Signs with stolen keys, and puts the outcome on a mirror.

    Args:
        mirror: changed by each method.
        ring: the publisher's; each call says which of its keys were stolen.
    """

    def __init__(self, mirror: Mirror, ring: KeyRing) -> None:
        self.mirror = mirror
        self._ring = ring

    def signed(self, role: str) -> Signed:
        """The signed part of a role's newest metadata on the mirror, a copy."""
        return dict(json.loads(self.mirror.files[self._path(role)])["signed"])

    def forge(
        self, role: str, change: Callable[[Signed], object], *, keys: Sequence[str], version: int | None = None
    ) -> None:
        """A new version of a role's metadata.

        Args:
            role: any.
            change: edits its signed part in place.
            keys: names of the stolen keys to sign with.
            version: its number; default: the next one.
        """
        signed = self.signed(role)
        signed["version"] = signed["version"] + 1 if version is None else version
        change(signed)
        name = "metadata/timestamp.json" if role == "timestamp" else f"metadata/{signed['version']}.{role}.json"
        self.mirror.files[name] = self._sealed(signed, keys)

    def relink(self, *roles: str, keys: Sequence[str], version: int | None = None) -> None:
        """A new snapshot that names the newest metadata of some roles, and a new timestamp that names it.

        Args:
            roles: whose newest metadata on the mirror it names; of others it names what it did.
            keys: names of the stolen keys to sign both with.
            version: number of both; default: the next ones.
        """
        named = {f"{role}.json": self._meta(self._newest(role)) for role in roles}
        self.forge("snapshot", lambda signed: signed["meta"].update(named), keys=keys, version=version)
        snapshot = {"snapshot.json": self._meta(self._newest("snapshot"))}
        self.forge("timestamp", lambda signed: signed.update(meta=snapshot), keys=keys, version=version)

    def _sealed(self, signed: Signed, names: Sequence[str]) -> bytes:
        payload = canonical_json(signed)
        found = [self._ring.named(name) for name in names]
        signers = self._ring.signers(key for key in found if key is not None)
        signatures = [{"keyid": one.public_key.keyid, "sig": one.sign(payload).signature} for one in signers]
        return canonical_json({"signatures": signatures, "signed": signed})

    def _path(self, role: str) -> str:
        return "metadata/timestamp.json" if role == "timestamp" else f"metadata/{self._newest(role)}"

    def _newest(self, role: str) -> str:
        names = [name.removeprefix("metadata/") for name in self.mirror.files if name.endswith(f".{role}.json")]
        return max((name.partition(".")[0] for name in names), key=int) + f".{role}.json"

    def _meta(self, name: str) -> Signed:
        data = self.mirror.files[f"metadata/{name}"]
        return {"hashes": {"sha256": sha256_hex(data)}, "length": len(data), "version": int(name.partition(".")[0])}
