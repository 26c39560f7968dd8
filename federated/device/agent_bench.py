"""Where a version from the shelf becomes a slot, if it may run here, and is proved: the agent's hand on the runtime.

Keeps no journal: `federated.device.agent_steps` does. Imports neither torch nor SQLAlchemy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from federated.device.agent_config import DeviceConfig
from federated.device.agent_fetch import Releases
from federated.device.probes import probes_from, prove, prove_effect
from federated.device.shelf import Shelf, Stored
from federated.device.slots import NULL, AdapterRuntime
from federated.errors import (
    BaseMismatch,
    BelowSecurityFloor,
    DeviceError,
    FederatedError,
    NoRuntime,
    ProbeFailed,
    ReleaseError,
)
from federated.manifest import VersionManifest

__all__ = ["Bench", "RuntimeOf", "is_blameless"]

RuntimeOf = Callable[[VersionManifest], AdapterRuntime]
"""Gives the runtime to install a version into; asked once, for the first version that is loaded."""


def is_blameless(error: FederatedError) -> bool:
    """Whether an error says nothing against the version that it came with: a full disk, a source, a missing base."""
    return isinstance(error, ReleaseError | NoRuntime) and not isinstance(error, BelowSecurityFloor)


class Bench:
    """See the module.

    Args:
        config: the device's.
        shelf, releases: of the state folder.
        runtime_of: see `RuntimeOf`.
    """

    def __init__(self, config: DeviceConfig, shelf: Shelf, releases: Releases, runtime_of: RuntimeOf) -> None:
        self._config = config
        self._shelf = shelf
        self._releases = releases
        self._runtime_of = runtime_of
        self._runtime: AdapterRuntime | None = None

    @property
    def runtime(self) -> AdapterRuntime | None:
        """The runtime; None until a first version was loaded."""
        return self._runtime

    def fits(self, base_digest: str) -> bool:
        """Whether a version for that base model can run here, as far as it is known before anything is loaded."""
        return self._runtime is None or self._runtime.backend.base_digest == base_digest

    def point(self, digest: str) -> None:
        """Move the runtime's pointer to a resident slot."""
        if self._runtime is not None:
            self._runtime.activate(digest)

    @contextmanager
    def held(self, version_id: str) -> Iterator[str]:
        """Make a version resident, if it may run here, and hold it there: a server may install others meanwhile.

        Yields:
            Its slot's name.

        Raises:
            BelowSecurityFloor: if it was revoked.
            BaseMismatch, DeviceError, WireError: if it cannot be run, or is not on the shelf.
            NoRuntime, ReleaseError: if that is not the version's fault.
        """
        digest = self._load(version_id)
        with nullcontext() if self._runtime is None else self._runtime.pin(digest):
            yield digest

    def open_base(self, manifest: VersionManifest) -> None:
        """Open the runtime that a version is for, if none is open; nothing is installed.

        Raises:
            BaseMismatch, DeviceError: if the record does not lead to a base.
            NoRuntime: if the base cannot be opened.
        """
        with _translated(manifest.version_id):
            self._opened(manifest)

    def _load(self, version_id: str) -> str:
        if version_id == NULL:
            return NULL
        for slot in self._runtime.slots if self._runtime else ():
            if slot.version_id == version_id:
                record = self._shelf.record(version_id)
                if record is not None:
                    self._releases.require_allowed(record)
                    return slot.digest
        stored = self._stored(version_id)
        self._releases.require_allowed(stored.record)
        with _translated(version_id):
            runtime = self._opened(stored.manifest)
            return runtime.install(stored.manifest, stored.weights, version_id=version_id).digest

    def _opened(self, manifest: VersionManifest) -> AdapterRuntime:
        if self._runtime is None:
            try:
                self._runtime = self._runtime_of(manifest)
            except (BaseMismatch, DeviceError):
                raise  # the version is for another base, or does not say how to rebuild its model
            except Exception as error:  # no memory, no file, a library's own: none of it is the version's fault
                said = f"{error}" if isinstance(error, FederatedError) else f"{type(error).__name__}: {error}"
                raise NoRuntime(f"the base model cannot be opened: {said}") from error
        return self._runtime

    def _stored(self, version_id: str) -> Stored:
        stored = self._shelf.get(version_id)
        if stored is None:
            raise DeviceError(f"version {version_id[:12]} is not on this device, or its files are damaged; install it")
        return stored

    def prove(self, version_id: str, digest: str) -> None:
        """Check what a resident version answers.

        Raises:
            ProbeFailed: if it is not what it must be.
            DeviceError: if it cannot be run, or is not on the shelf.
            NoRuntime, ReleaseError: if that is not the version's fault.
        """
        stored = self._stored(version_id)
        if stored.probes is None and self._config.probes == "required":
            raise ProbeFailed("the release has no probes, and this device's configuration says probes: required")
        with _translated(version_id):
            runtime = self._opened(stored.manifest)
            if stored.probes is not None:
                prove(runtime, digest, probes_from(stored.probes))
            else:
                prove_effect(runtime, digest, stored.manifest)


@contextmanager
def _translated(version_id: str) -> Iterator[None]:
    """Whatever a backend raises becomes one clear error: loading one version must never end the service."""
    try:
        yield
    except FederatedError:
        raise
    except Exception as error:
        raise DeviceError(f"version {version_id[:12]} cannot be run here ({type(error).__name__}: {error})") from error
