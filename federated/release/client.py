"""What a device trusts: `ReleaseClient` finds, checks and fetches released versions.

    client = ReleaseClient(Path("root.json"), "https://releases.example.org", Path("state"))
    client.refresh()
    released = client.resolve("stable")
    files = client.download(released)

The device brings one thing that is trusted without proof, the root metadata that it was installed with. The source is
not trusted, TLS is not needed. A refusal changes nothing: what is installed stays. Imports neither torch nor
SQLAlchemy; installs nothing, `federated.device` does.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tuf.api.metadata import Metadata, TargetFile, Targets

from federated.errors import BelowSecurityFloor, NotReleased, ReleaseError, WrongContent
from federated.manifest import VersionManifest
from federated.release.disk import locked, translated
from federated.release.fetching import fetched, held_in, kept_name
from federated.release.records import ReleaseRecord, floors_of
from federated.release.refusals import TUF_ERRORS
from federated.release.roles import MANIFEST, TARGETS, WEIGHTS, check_channel, current_path, target_path
from federated.release.source import Source, open_source, rest_of
from federated.release.store import Store
from federated.release.transfer import digest_of_target, holds, transfer
from federated.release.ways import EXACT, accepted, ways_to
from federated.release.workflow import Limits, Workflow

__all__ = ["Download", "ReleaseClient", "ReleasedVersion"]


_DIGEST = re.compile(r"[0-9a-f]{64}")


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class ReleasedVersion:
    """A version that a channel's keyholders signed, and that is not revoked.

    Args:
        channel: where it was found.
        record: what was signed of it.
        valid_until: when the first of the signatures that this rests on ends; UTC.
        sizes: bytes of each of its files, by name.
    """

    channel: str
    record: ReleaseRecord
    valid_until: datetime
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Download:
    """A version's files on this device, checked.

    Args:
        version: what was asked for.
        manifest: its record.
        weights: path of canonical weights that are signed as this version's.
        weights_digest: of them: the manifest's, unless a lossy variant would do.
        way: how they came: ``"weights"`` (the full file), ``"held"`` (they were here), or a codec's name.
        nbytes: what the source sent for them, in vain or not.
        setbacks: ways that were tried before and failed, and why.
    """

    version: ReleasedVersion
    manifest: VersionManifest
    weights: Path
    weights_digest: str = ""
    way: str = "weights"
    nbytes: int = 0
    setbacks: tuple[str, ...] = ()


class _Metered:
    """A source that counts what it sends."""

    def __init__(self, source: Source) -> None:
        self.label = source.label
        self.nbytes = 0
        self._source = source

    def read(self, name: str) -> Generator[bytes, None, None]:
        return self._counted(self._source.read(name))

    def read_from(self, name: str, start: int) -> Generator[bytes, None, None]:
        return self._counted(rest_of(self._source, name, start))

    def _counted(self, chunks: Generator[bytes, None, None]) -> Generator[bytes, None, None]:
        with closing(chunks):
            for chunk in chunks:
                self.nbytes += len(chunk)
                yield chunk


class ReleaseClient:
    """Asks one source for releases.

    Args:
        trusted_root: root metadata, or their file: the publisher's ``root.json``, brought along on another way.
        source: the release's folder, its URL, or a `Source` of your own.
        state_dir: the device's own folder; whoever can write to it can undo rollback protection.
        clock: the time, with its zone.
        limits: the most that is read.

    Raises:
        ReleaseError: if the root cannot be read, or the source's name is malformed.
    """

    def __init__(
        self,
        trusted_root: bytes | Path,
        source: str | Path | Source,
        state_dir: Path,
        *,
        clock: Callable[[], datetime] = _utc_now,
        limits: Limits | None = None,
    ) -> None:
        if isinstance(trusted_root, Path):
            with translated("read the trusted root"):
                trusted_root = trusted_root.read_bytes()
        self._root = trusted_root
        self._source = open_source(source)
        self._folder = state_dir
        self._store = Store(state_dir)
        self._clock = clock
        self._limits = limits or Limits()
        self._last: Workflow | None = None

    @property
    def security_floors(self) -> dict[str, int]:
        """By adapter, the least release counter that may run here, as of the last `refresh`; needs no source.

        Raises:
            ReleaseError: if the state cannot be read.
        """
        kept = self._store.role(TARGETS)
        if kept is None:
            return {}
        try:
            return floors_of(Metadata[Targets].from_bytes(kept).signed)
        except TUF_ERRORS as error:
            raise WrongContent(f"the state in {self._folder} is damaged ({error}); refresh to mend it") from error

    def refresh(self) -> None:
        """Fetch and verify what is new; nothing that was verified before is lost if that fails.

        Raises:
            UntrustedRelease: by name.
            Unreachable: if the source does not answer.
            WrongClock: if this clock is behind what was signed.
            ReleaseError: if the state cannot be written.
        """
        self._refreshed()

    def resolve(self, channel: str, version_id: str | None = None) -> ReleasedVersion:
        """What a channel points at; or one of its other versions. Refreshes first if nothing did so far.

        Args:
            channel: its name.
            version_id: in full; None is the current one.

        Raises:
            NotReleased: if no keyholder of this channel signed such a version.
            BelowSecurityFloor: if it was revoked.
            ExpiredMetadata, FreezeAttack: if what was verified has gone out of date since.
            UntrustedRelease, Unreachable, WrongClock, ReleaseError: as `refresh` raises them.
        """
        check_channel(channel)
        verified = self._last or self._refreshed()
        with locked(self._folder):
            record = self._record(verified, channel, version_id)
            self.require_allowed(record)
            files = {name: self._target(verified, channel, record, name) for name in (MANIFEST, WEIGHTS, *record.files)}
            until = verified.valid_until(channel, self._clock())
        return ReleasedVersion(channel, record, until, {name: file.length for name, file in files.items()})

    def require_allowed(self, record: ReleaseRecord) -> None:
        """Check that a version was not revoked: also before a device goes back to one that it still holds.

        Raises:
            BelowSecurityFloor: if it was.
            ReleaseError: if the state cannot be read.
        """
        floor = self.security_floors.get(record.adapter_id, 0)
        if record.release_counter < floor:
            raise BelowSecurityFloor(
                f"version {record.version_id[:12]} was revoked: its release counter is {record.release_counter}, the "
                f"signed security floor of adapter {record.adapter_id!r} is {floor}; keep what runs, or serve the base "
                f"model alone"
            )

    def download(self, version: ReleasedVersion, *, prefer: str = EXACT, holding: Sequence[Path] = ()) -> Download:
        """Fetch a version's record and weights on the way of fewest bytes, and check that they belong together.

        Weights that are here already are hashed, not fetched. A diff that fails is followed by the full file that gives
        the same bits, and that by the version's own full weights; each such step is in the outcome and in a warning.
        Refreshes first if nothing did so far.

        Args:
            version: as `resolve` gave it.
            prefer: ``"exact"``: the version's very weights; ``"smallest"``: any that are signed as its, which may be
                lossy, measured by the publisher; or a full codec's name, for what it gives if the version has it.
            holding: files of weights on this device from which a diff may start.

        Raises:
            WrongContent: if the bytes are not those that were signed, or record and signature contradict each other.
            EndlessData: if the source sends more than was signed.
            Unreachable: if it does not answer.
            ReleaseError: if the disk refuses, or nothing can be preferred by that name.
        """
        digests = accepted(version.record, prefer)
        manifest = self._manifest(version)
        record = version.record
        told = dataclasses.replace(
            record,
            version_id=manifest.version_id,
            base_digest=manifest.base_digest,
            weights_digest=manifest.weights_digest,
            adapter_id=manifest.adapter_id,
            release_counter=manifest.release_counter or record.release_counter,  # 0: the repository counted
        )
        if told != record:
            raise WrongContent(
                f"the signed record of {record.version_id[:12]} and its manifest ({manifest.version_id[:12]}) "
                f"contradict each other; tell the publisher"
            )
        return self._weights(version, manifest, digests, holding)

    def fetch(self, version: ReleasedVersion, name: str) -> Path:
        """One file of a version, checked.

        Args:
            version: as `resolve` gave it.
            name: one of ``version.sizes``.

        Raises:
            NotReleased: if the version has no such file.
            WrongContent, EndlessData, Unreachable, ReleaseError: see `download`.
        """
        return self._fetch(version, name, self._source)

    def _weights(
        self, version: ReleasedVersion, manifest: VersionManifest, digests: frozenset[str], holding: Sequence[Path]
    ) -> Download:
        record, limit = version.record, min(version.sizes[WEIGHTS], self._limits.file)
        folder = self._folder / "files" / record.version_id
        here = [path for one in digests if (path := folder / kept_name(record, one)).is_file()]
        held = held_in([*here, *holding], limit)
        ready = [one for one in (record.weights_digest, *sorted(digests)) if one in digests & held.keys()]
        if ready:
            self.require_allowed(record)
            return Download(version, manifest, held[ready[0]], ready[0], "held")
        source = _Metered(self._source)
        found = fetched(
            ways_to(record, version.sizes, digests, held),
            lambda name: self._fetch(version, name, source),
            lambda digest: folder / kept_name(record, digest),
            held=held,
            limit=limit,
        )
        return Download(version, manifest, found.path, found.weights_digest, found.way, source.nbytes, found.setbacks)

    def _fetch(self, version: ReleasedVersion, name: str, source: Source) -> Path:
        if name not in version.sizes:
            raise NotReleased(f"version {version.record.version_id[:12]} has no {name}; it has {sorted(version.sizes)}")
        verified = self._last or self._refreshed()
        self.require_allowed(version.record)
        with locked(self._folder):
            target = self._target(verified, version.channel, version.record, name)
            path = self._folder / "files" / version.record.version_id / name
            if not holds(path, target):
                transfer(source, target, path, limit=self._limits.file)
        return path

    def _refreshed(self) -> Workflow:
        with locked(self._folder):
            fresh = Workflow(self._root, self._source, self._store, now=self._clock(), limits=self._limits)
            fresh.refresh()
            floors_of(fresh.targets)
            self._last = fresh
        return fresh

    def _record(self, verified: Workflow, channel: str, version_id: str | None) -> ReleaseRecord:
        if version_id is not None and not _DIGEST.fullmatch(version_id):
            raise NotReleased(f"{version_id!r} is no version's id; expected all 64 hexadecimal characters")
        path = current_path(channel) if version_id is None else target_path(channel, version_id, MANIFEST)
        found = verified.find(path)
        if found is None:
            raise NotReleased(
                f"{self._source.label}: nobody who may sign for channel {channel!r} signed {path}; nothing was "
                f"released there, or the channel has another name"
            )
        record = ReleaseRecord.from_custom(found.custom, path)
        if version_id not in (None, record.version_id):
            raise WrongContent(f"{path} is signed as version {record.version_id}; tell the publisher")
        return record

    def _target(self, verified: Workflow, channel: str, record: ReleaseRecord, name: str) -> TargetFile:
        path = target_path(channel, record.version_id, name)
        found = verified.find(path)
        if found is None:
            raise NotReleased(f"{self._source.label}: nobody who may sign for channel {channel!r} signed {path}")
        expected = {MANIFEST: record.version_id, WEIGHTS: record.weights_digest}.get(name)
        if expected not in (None, digest_of_target(found)):
            raise WrongContent(
                f"{path} is signed with SHA-256 {digest_of_target(found)}, and its record says {expected}; tell the "
                f"publisher"
            )
        return found

    def _manifest(self, version: ReleasedVersion) -> VersionManifest:
        path = self.fetch(version, MANIFEST)
        with translated("read the manifest"):
            data = path.read_bytes()
        try:
            return VersionManifest.from_dict(json.loads(data))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ReleaseError(
                f"version {version.record.version_id[:12]} has a manifest that this library cannot read ({error}); "
                f"upgrade federated-peft"
            ) from error
