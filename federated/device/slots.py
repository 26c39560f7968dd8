"""Immutable adapter slots, and the routing that says which one answers.

An installed adapter version lives in a slot named by the digest of its weights. A request pins one slot for its
whole life, so that it is answered by exactly one adapter; activation and rollback move a pointer and touch no
model. The null adapter (the base alone) is always there under the name ``null``.

Not here: where versions come from (`federated.registry`), how a model is built or run (`federated.device.backends`).
Imports neither torch nor SQLAlchemy. Called by `federated.cli`, and by whoever serves.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from federated.device.backends.protocol import Backend
from federated.device.intake import decode, verify
from federated.errors import DeviceError
from federated.manifest import VersionManifest

__all__ = ["NULL", "Activation", "AdapterRuntime", "Served", "Slot"]

NULL = "null"
"""Name of the null adapter's slot."""


@dataclass(frozen=True)
class Slot:
    """One adapter, ready to answer; nothing in it ever changes.

    Args:
        digest: digest of the adapter's weights, or ``"null"``.
        version_id: the version that it was installed as; ``"null"`` for the null adapter.
        label: short name for people (``"v3"``).
        manifest: the version's record; None for the null adapter.
        handle: the backend's model.
    """

    digest: str
    version_id: str
    label: str
    manifest: VersionManifest | None = field(repr=False, hash=False)
    handle: Any = field(repr=False, compare=False)


@dataclass(frozen=True)
class Activation:
    """A change of the routing.

    Args:
        kind: what was asked: ``"activate"`` a version, ``"null"`` (activate the null adapter) or ``"rollback"``.
        digest: slot that answers from now on.
        previous: slot that answered until now.
        milliseconds: wall time that it took.
    """

    kind: Literal["activate", "null", "rollback"]
    digest: str
    previous: str
    milliseconds: float


@dataclass(frozen=True)
class Served:
    """Predictions, with the slot that made all of them."""

    slot: Slot
    predictions: Sequence[Any]


class AdapterRuntime:
    """Slots over one base model; every method may be called from any thread.

    Its lock guards the routing and the reference counts only: models are built and run outside it, so that
    installing never stops service and two versions can serve at once.

    Args:
        backend: builds and runs models.
        capacity: adapters to keep. Beyond it, the least recently used go, but never one that is pinned, active,
            the next to roll back to, or the newest installed: while those are more, the runtime holds more. The
            null adapter is not counted.

    Raises:
        DeviceError: if the capacity is below 1.
    """

    def __init__(self, backend: Backend, *, capacity: int = 4) -> None:
        if capacity < 1:
            raise DeviceError(f"a runtime with room for {capacity} adapters cannot serve; expected capacity >= 1")
        self._backend = backend
        self._capacity = capacity
        self._installing = threading.Lock()  # one at a time; service does not wait for it
        self._lock = threading.Lock()
        self._null = Slot(NULL, NULL, NULL, None, backend.null())
        self._slots: dict[str, Slot] = {}  # least recently used first
        self._pins: Counter[str] = Counter()
        self._active = self._null
        self._history: list[Slot] = []
        self._newest: str | None = None

    @property
    def backend(self) -> Backend:
        """What builds and runs the models."""
        return self._backend

    @property
    def active(self) -> Slot:
        """The slot that answers new requests."""
        return self._active

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The null adapter, then the resident ones, least recently used first."""
        with self._lock:
            return (self._null, *self._slots.values())

    @property
    def history(self) -> tuple[Slot, ...]:
        """Where rollbacks lead, the next one last; after these comes the null adapter. Evicted slots drop out."""
        with self._lock:
            return tuple(self._history)

    @property
    def pins(self) -> Mapping[str, int]:
        """Requests under way for each pinned slot."""
        with self._lock:
            return dict(self._pins)

    def install(self, manifest: VersionManifest, weights: bytes, *, version_id: str, label: str = "") -> Slot:
        """Verify a version and make it a slot; the routing stays as it is.

        Weights that are resident already share their model under the new version's name. A version that is
        refused leaves everything as it was.

        Args:
            manifest: the version's record.
            weights: its canonical safetensors bytes.
            version_id: digest of ``manifest`` by which the version was asked for.
            label: short name for people; default: the first 12 characters of ``version_id``.

        Returns:
            The slot. It answers only once it is activated, or pinned by its digest.

        Raises:
            BaseMismatch: if the version belongs to another base model.
            DeviceError: if record, digest, values or spec do not agree, or the version cannot be served.
            WireError: if the bytes are no tensors of this protocol.
        """
        with self._installing:
            verify(manifest, weights, version_id=version_id, base_digest=self._backend.base_digest)
            self._backend.check(manifest)
            handle = self._shared(manifest)
            if handle is None:
                handle = self._backend.build(manifest.spec, decode(weights))
            slot = Slot(manifest.weights_digest, version_id, label or version_id[:12], manifest, handle)
            self._place(slot)
        return slot

    def activate(self, digest: str) -> Activation:
        """Route new requests to a resident slot; requests under way keep theirs.

        Args:
            digest: of a resident slot, or ``"null"``.

        Raises:
            DeviceError: if no such slot is resident; the routing stays as it was.
        """
        begin = time.perf_counter()
        with self._lock:
            target, previous = self._find(digest), self._active
            if target.digest != previous.digest:
                self._history = [*self._without(target, previous), previous]
            self._active = target
            self._evict()
        kind: Literal["activate", "null"] = "null" if digest == NULL else "activate"
        return Activation(kind, target.digest, previous.digest, (time.perf_counter() - begin) * 1000)

    def rollback(self) -> Activation:
        """Route new requests to the slot that was active before.

        Several rollbacks walk back through `history` and end at the null adapter, where a further one changes
        nothing. What was rolled back from is not in the history any more, so that rollbacks never lead to it.
        """
        begin = time.perf_counter()
        with self._lock:
            previous = self._active
            self._active = self._history.pop() if self._history else self._null
            target = self._active
            self._evict()
        return Activation("rollback", target.digest, previous.digest, (time.perf_counter() - begin) * 1000)

    @contextmanager
    def pin(self, digest: str | None = None) -> Iterator[Slot]:
        """Hold one slot for the life of a request; it is not evicted meanwhile.

        Args:
            digest: of a resident slot, or ``"null"``; None takes the one that is active at this moment.

        Yields:
            The slot, the same one whatever is activated meanwhile.

        Raises:
            DeviceError: if no such slot is resident.
        """
        with self._lock:
            slot = self._active if digest is None else self._find(digest)
            self._pins[slot.digest] += 1
            self._touch(slot.digest)
        try:
            yield slot
        finally:
            with self._lock:
                self._release(slot.digest)

    def predict(self, rows: Sequence[Mapping[str, Any]], *, digest: str | None = None) -> Served:
        """Answer rows with one pinned slot.

        Args:
            rows: the task's rows, such as ``{"text": "..."}``.
            digest: as in `pin`.

        Raises:
            DeviceError: if no such slot is resident.
        """
        with self.pin(digest) as slot:
            return Served(slot, self._backend.predict(slot.handle, rows))

    def _place(self, slot: Slot) -> None:
        with self._lock:
            self._slots.pop(slot.digest, None)
            self._slots[slot.digest] = slot
            self._newest = slot.digest
            self._evict()

    def _shared(self, manifest: VersionManifest) -> Any | None:
        """The model of resident equal weights; refused where the same bytes are to mean something else."""
        with self._lock:
            resident = self._slots.get(manifest.weights_digest)
        if resident is None:
            return None
        if resident.manifest is None or resident.manifest.spec != manifest.spec:
            raise DeviceError(
                f"slot {manifest.weights_digest[:12]} holds these weights under another adapter spec; "
                f"serve this version from a runtime of its own"
            )
        return resident.handle

    def _find(self, digest: str) -> Slot:
        slot = self._null if digest == NULL else self._slots.get(digest)
        if slot is None:
            resident = ", ".join([NULL, *(name[:12] for name in self._slots)])
            raise DeviceError(f"no slot {digest[:12]!r} on this device, found {resident}: install the version first")
        return slot

    def _touch(self, digest: str) -> None:
        """Make a slot the most recently used one."""
        if digest in self._slots:
            self._slots[digest] = self._slots.pop(digest)

    def _release(self, digest: str) -> None:
        self._pins[digest] -= 1
        if not self._pins[digest]:
            del self._pins[digest]
            self._evict()

    def _without(self, *slots: Slot) -> list[Slot]:
        gone = {slot.digest for slot in slots}
        return [slot for slot in self._history if slot.digest not in gone]

    def _evict(self) -> None:
        kept = {self._active.digest, self._newest, *(slot.digest for slot in self._history[-1:]), *self._pins}
        for digest in [name for name in self._slots if name not in kept]:
            if len(self._slots) <= self._capacity:
                return
            self._history = self._without(self._slots.pop(digest))
