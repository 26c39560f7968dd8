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
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from federated.device.backends.protocol import Backend, Embeds, Generates, Merges
from federated.device.generation import Generation
from federated.device.grouping import predict_each
from federated.device.intake import decode, verify
from federated.device.records import NULL, Activation, Answer, Embedding, Prompt, Sampling, Served, Slot
from federated.device.residents import Limits, Residents
from federated.device.routing import Route, Routes
from federated.errors import DeviceError
from federated.manifest import VersionManifest

__all__ = ["NULL", "Activation", "AdapterRuntime", "Refill", "Served", "Slot"]

_ACTIVE = Route()
_TRIES = 8
"""How often a slot is brought back for one request before its runtime is called too small."""


Refill = Callable[["AdapterRuntime", str], bool]
"""Installs the slot of a name that is not resident (any more); False if it does not know the name."""


class AdapterRuntime:
    """Slots over one base model; every method may be called from any thread.

    Its lock guards the routing and the reference counts only: models are built and run outside it, so that
    installing never stops service and two versions can serve at once.

    Args:
        backend: builds and runs models.
        capacity: adapters to keep. Beyond it, the least recently used go, but never one that is pinned, active,
            the next to roll back to, or the newest installed: while those are more, the runtime holds more. The
            null adapter is not counted.
        capacity_bytes: memory that they may cost together, by `Backend.nbytes`; None: any. Both limits hold.

    Attributes:
        swaps: how often another slot became the active one.

    Raises:
        DeviceError: if a capacity is below 1.
    """

    def __init__(self, backend: Backend, *, capacity: int = 4, capacity_bytes: int | None = None) -> None:
        limits = Limits(capacity, capacity_bytes)
        self._backend = backend
        self._refills: tuple[Refill, ...] = ()
        self._installing = threading.Lock()  # one at a time; service does not wait for it
        self._lock = threading.Lock()
        self._null = Slot(NULL, NULL, NULL, None, backend.null())
        self._residents = Residents(self._null, limits)
        self._routes = Routes()
        self._active = self._null
        self.swaps = 0
        self._history: list[Slot] = []
        self._newest: str | None = None
        self._abandoned: deque[str] = deque()  # pins of answers that nobody closed; see `Generation`

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
            return (self._null, *self._residents)

    @property
    def history(self) -> tuple[Slot, ...]:
        """Where rollbacks lead, the next one last; after these comes the null adapter. Evicted slots drop out."""
        with self._lock:
            return tuple(self._history)

    @property
    def pins(self) -> Mapping[str, int]:
        """Requests under way for each pinned slot."""
        with self._lock:
            self._sweep()
            return dict(self._residents.pins)

    @property
    def nbytes(self) -> int:
        """Memory that the resident adapters cost besides the base."""
        with self._lock:
            return self._residents.nbytes

    @property
    def routes(self) -> Routes:
        """The routing by name, user and arm, whole as it is at this moment."""
        return self._routes

    def add_refill(self, refill: Refill) -> None:
        """Ask ``refill``, after those added before, for slots that requests name and that are not resident.

        So many more adapters can be named than are in memory. It is called outside the lock, from any thread.
        """
        self._refills = (*self._refills, refill)

    def reroute(self, change: Callable[[Routes], Routes]) -> Routes:
        """Replace the routing by what ``change`` makes of it; no request sees part of it.

        Args:
            change: such as ``lambda routes: routes.named("support", digest).with_arm("b", "support")``; quick, and
                calls nothing of the runtime.

        Raises:
            DeviceError: if ``change`` refuses, or names a slot that is not resident where nothing refills; the
                routing stays as it was.
        """
        with self._lock:
            routes = change(self._routes)
            for digest in () if self._refills else set(routes.names.values()) - set(self._routes.names.values()):
                self._residents.find(digest)
            self._routes = routes
        return routes

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
            size = self._backend.nbytes(handle)
            slot = Slot(manifest.weights_digest, version_id, label or version_id[:12], manifest, handle, size)
            self._place(slot)
        return slot

    def adopt(self, digest: str, build: Callable[[], Any], *, label: str = "", parent: Slot | None = None) -> Slot:
        """Make a slot of what was made on this device; the routing stays as it is.

        Args:
            digest: its name, a digest of all that it was made of. A resident slot of that name is returned as it is.
            build: makes the handle; not called under the lock of the routing.
            label: short name for people; default: the beginning of ``digest``.
            parent: what it was made from, whose version it then belongs to.
        """
        with self._installing:
            with self._lock:
                resident = self._residents.get(digest)
            if resident is not None:
                return resident
            handle = build()
            version_id = parent.version_id if parent else digest
            slot = Slot(digest, version_id, label or digest[:12], None, handle, self._backend.nbytes(handle))
            self._place(slot)
        return slot

    def merge(self, digest: str) -> Slot:
        """A slot beside a resident one whose adapter is added into copies of the layers that it adapts.

        It answers faster, costs as much memory as those layers, and rounds otherwise: so it has a name of its own,
        ``"merged:" + digest``. Activating another slot leaves it; the base was never touched.

        Raises:
            DeviceError: if the backend cannot merge such an adapter, or no such slot is resident.
        """
        backend = self._backend
        if not isinstance(backend, Merges):
            raise self._unable("merge adapters")
        with self.pin(digest) as slot:
            name = f"merged:{slot.digest}"
            return self.adopt(name, lambda: backend.merge(slot.handle), label=f"{slot.label} merged", parent=slot)

    def activate(self, digest: str) -> Activation:
        """Route new requests to a resident slot; requests under way keep theirs.

        Args:
            digest: of a resident slot, or ``"null"``.

        Raises:
            DeviceError: if no such slot is resident; the routing stays as it was.
        """
        begin = time.perf_counter()
        with self._lock:
            target, previous = self._residents.find(digest), self._active
            if target.digest != previous.digest:
                self._history = [*self._without(target.digest, previous.digest), previous]
            self._active = target
            self.swaps += target.digest != previous.digest
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
            self.swaps += target.digest != previous.digest
            self._evict()
        return Activation("rollback", target.digest, previous.digest, (time.perf_counter() - begin) * 1000)

    @contextmanager
    def pin(self, digest: str | None = None, *, route: Route = _ACTIVE) -> Iterator[Slot]:
        """Hold one slot for the life of a request; it is not evicted meanwhile.

        Args:
            digest: of a resident slot, or ``"null"``; None takes what ``route`` leads to.
            route: by name, user or arm; by default the slot that is active at this moment.

        Yields:
            The slot, the same one whatever is activated meanwhile.

        Raises:
            DeviceError: if no such slot is resident, or the route's name is unknown.
        """
        slot = self._hold(digest, route)
        try:
            yield slot
        finally:
            self._release(slot.digest)

    def predict(
        self, rows: Sequence[Mapping[str, Any]], *, digest: str | None = None, route: Route = _ACTIVE
    ) -> Served:
        """Answer rows with one pinned slot.

        Args:
            rows: the task's rows, such as ``{"text": "..."}``.
            digest: as in `pin`.
            route: as in `pin`.

        Raises:
            DeviceError: if no such slot is resident.
        """
        with self.pin(digest, route=route) as slot:
            return Served(slot, self._backend.predict(slot.handle, rows))

    def predict_mixed(self, pairs: Sequence[tuple[Mapping[str, Any], str | Route | None]]) -> list[Answer]:
        """Answer rows of several slots, in one batch where the backend can, else slot by slot.

        Args:
            pairs: each a row and its slot: a digest, a route, or None for the active one. The active slot is looked up
                once for each row that asks for it.

        Returns:
            One answer for each row, in order.

        Raises:
            DeviceError: if a slot is not resident; no row is answered then.
        """
        with ExitStack() as stack:
            pins = (self.pin(route=one) if isinstance(one, Route) else self.pin(one) for _, one in pairs)
            held = [stack.enter_context(pin) for pin in pins]
            made = predict_each(self._backend, held, [row for row, _ in pairs])
        return [Answer(slot, prediction) for slot, prediction in zip(held, made, strict=True)]

    def generate(
        self, prompt: Prompt, sampling: Sampling | None = None, *, digest: str | None = None, route: Route = _ACTIVE
    ) -> Generation:
        """Continue a text or answer a chat, token by token, with one pinned slot.

        The pin is taken now and given back after the last token, an error or `Generation.close`.

        Args:
            prompt: a text, or messages. Messages go through the tokenizer's chat template; where it has none they
                become lines ``role: content`` and a last ``assistant:``.
            sampling: default: 128 tokens, greedy.
            digest: as in `pin`.
            route: as in `pin`.

        Raises:
            DeviceError: if the backend has no language model, or the prompt cannot be answered.
        """
        backend = self._backend
        if not isinstance(backend, Generates):
            raise self._unable("generate text")
        slot = self._hold(digest, route)
        try:
            stream = backend.generate(slot.handle, prompt, sampling or Sampling())
        except BaseException:
            self._release(slot.digest)
            raise
        return Generation(slot, stream, self._release, self._abandoned.append)

    def embed(
        self, texts: Sequence[str], *, digest: str | None = None, route: Route = _ACTIVE
    ) -> tuple[Slot, Sequence[Embedding]]:
        """Each text as the mean of its features, of length 1, by one pinned slot.

        Raises:
            DeviceError: if the backend, its base or the adapter's kind has none.
        """
        backend = self._backend
        if not isinstance(backend, Embeds):
            raise self._unable("embed texts")
        with self.pin(digest, route=route) as slot:
            return slot, backend.embed(slot.handle, texts)

    def _unable(self, what: str) -> DeviceError:
        return DeviceError(f"this device's backend ({type(self._backend).__name__}) cannot {what}; use another one")

    def _hold(self, digest: str | None, route: Route) -> Slot:
        for _ in range(_TRIES):
            with self._lock:
                wanted = self._routes.resolve(route) if digest is None else digest
                slot = self._active if wanted is None else self._residents.get(wanted)
                if slot is not None:
                    self._residents.hold(slot)
                    return slot
            missing = str(wanted)
            if not any(refill(self, missing) for refill in self._refills):
                with self._lock:
                    self._residents.find(missing)  # says what is there instead
        raise DeviceError(f"slot {missing[:12]} was dropped {_TRIES} times before it could answer; raise the capacity")

    def _release(self, digest: str) -> None:
        with self._lock:
            if self._residents.release(digest):
                self._evict()

    def _sweep(self) -> None:
        while self._abandoned:
            self._residents.release(self._abandoned.popleft())

    def _place(self, slot: Slot) -> None:
        with self._lock:
            self._sweep()
            self._residents.put(slot)
            self._newest = slot.digest
            self._evict()

    def _shared(self, manifest: VersionManifest) -> Any | None:
        """The model of resident equal weights; refused where the same bytes are to mean something else."""
        with self._lock:
            resident = self._residents.get(manifest.weights_digest)
        if resident is None:
            return None
        if resident.manifest is None or resident.manifest.spec != manifest.spec:
            raise DeviceError(
                f"slot {manifest.weights_digest[:12]} holds these weights under another adapter spec; "
                f"serve this version from a runtime of its own"
            )
        return resident.handle

    def _without(self, *digests: str) -> list[Slot]:
        return [slot for slot in self._history if slot.digest not in digests]

    def _evict(self) -> None:
        kept = {self._active.digest, *(slot.digest for slot in self._history[-1:])}
        gone = self._residents.evict(kept | ({self._newest} if self._newest else set()))
        if gone:
            self._history = self._without(*gone)
