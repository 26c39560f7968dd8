"""How the agent reaches releases: one `ReleaseClient`, over a source that is held to a rate and can be told to stop.

Resuming, hashes and limits are `federated.release.transfer`'s business; what is asked for, and when, is
`federated.device.agent`'s. All of a version's files are fetched in one place, `Releases.fetch`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from federated.device.agent_config import DeviceConfig
from federated.device.probes import MAX_BYTES
from federated.errors import EndlessData, Unreachable
from federated.manifest import VersionManifest
from federated.release import Limits, ReleaseClient, ReleasedVersion, ReleaseRecord, Source
from federated.release.disk import translated
from federated.release.roles import PROBES
from federated.release.source import open_source, rest_of

__all__ = ["Fetched", "Releases", "SteadySource"]


@dataclass(frozen=True)
class Fetched:
    """A version's files, verified.

    Args:
        manifest: its record.
        weights: file of its full canonical weights.
        probes: the release's; None if it has none.
        way: how the weights came: the full file, a codec, or from what was held; see `Download`.
        nbytes: what came for them.
    """

    manifest: VersionManifest
    weights: Path
    probes: bytes | None
    way: str
    nbytes: int


class SteadySource:
    """A source at a bounded rate: a bucket of one second's bytes, which every byte that comes is taken from.

    Args:
        source: not trusted.
        rate: bytes per second; 0: no limit.
        monotonic: seconds that never go back.
        wait: called after each piece; waits so many seconds, and says whether to stop.
    """

    def __init__(
        self, source: Source, rate: int, *, monotonic: Callable[[], float], wait: Callable[[float], bool]
    ) -> None:
        self.label = source.label
        self._source = source
        self._rate = rate
        self._monotonic = monotonic
        self._wait = wait
        self._tokens = float(rate)
        self._at = monotonic()

    def read(self, name: str) -> Generator[bytes, None, None]:
        """See `federated.release.Source.read`."""
        return self._steady(self._source.read(name))

    def read_from(self, name: str, start: int) -> Generator[bytes, None, None]:
        """See `federated.release.source.Resumable.read_from`."""
        return self._steady(rest_of(self._source, name, start))

    def _steady(self, chunks: Generator[bytes, None, None]) -> Generator[bytes, None, None]:
        with closing(chunks):
            for chunk in chunks:
                yield chunk
                if self._wait(self._owed(len(chunk))):
                    raise Unreachable(f"the transfer from {self.label} was stopped here; it goes on from there later")

    def _owed(self, count: int) -> float:
        """Seconds until these bytes were within the rate."""
        if not self._rate:
            return 0.0
        now = self._monotonic()
        self._tokens = min(self._rate, self._tokens + (now - self._at) * self._rate) - count
        self._at = now
        return max(0.0, -self._tokens / self._rate)


class Releases:
    """What a device can get.

    Args:
        config: source, channel, root, limits.
        source: in place of the config's, such as a peer.
        clock: the time, with its zone.
        monotonic: seconds that never go back.
        wait: waits so many seconds, and says whether to stop.

    Raises:
        ReleaseError: if root or source cannot be used.
    """

    def __init__(
        self,
        config: DeviceConfig,
        *,
        source: Source | None,
        clock: Callable[[], datetime],
        monotonic: Callable[[], float],
        wait: Callable[[float], bool],
    ) -> None:
        self._folder = config.state / "release"
        self._channel = config.channel
        steady = SteadySource(source or open_source(config.source), config.bandwidth, monotonic=monotonic, wait=wait)
        limits = Limits(file=config.limits.max_bytes)
        self._client = ReleaseClient(config.root, steady, self._folder, clock=clock, limits=limits)

    def refresh(self) -> None:
        """See `ReleaseClient.refresh`."""
        self._client.refresh()

    def resolve(self, version_id: str | None = None) -> ReleasedVersion:
        """The channel's current version, or one of its others; see `ReleaseClient.resolve`."""
        return self._client.resolve(self._channel, version_id)

    def require_allowed(self, record: ReleaseRecord) -> None:
        """See `ReleaseClient.require_allowed`; needs no source."""
        self._client.require_allowed(record)

    def fetch(self, version: ReleasedVersion, holding: Sequence[Path]) -> Fetched:
        """All that a device needs of a version, verified; goes on where an earlier fetch broke off.

        What comes out is always the version's very weights: a runtime installs no others under its name.

        Args:
            version: as `resolve` gave it.
            holding: files of weights on this device, from which a smaller file may lead to the new ones.

        Raises:
            UntrustedRelease, Unreachable, ReleaseError: see `ReleaseClient.download`.
        """
        probes = None
        if PROBES in version.sizes:
            if version.sizes[PROBES] > MAX_BYTES:
                raise EndlessData(
                    f"the release's probes have {version.sizes[PROBES]} bytes; at most {MAX_BYTES} are read"
                )
            path = self._client.fetch(version, PROBES)
            with translated("read the probes"):
                probes = path.read_bytes()
        files = self._client.download(version, holding=holding)
        return Fetched(files.manifest, files.weights, probes, files.way, files.nbytes)

    def sweep(self, keep: str = "") -> None:
        """Remove fetched files and parts, but those of one version: they are on the shelf, or not wanted any more.

        Raises:
            ReleaseError: if the disk refuses.
        """
        folder = self._folder / "files"
        with translated("remove fetched files"):
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.name != keep:
                    shutil.rmtree(path)
