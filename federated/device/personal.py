"""Personal adapters: trained on the device, stacked on the global one, never uploaded.

The effective update of a personal slot is that of the global version plus that of the personal adapter. A personal
adapter stands on one global version. When a new one comes, `PersonalAdapters.rebase` puts it there only if the user's
own rows say that both together are no worse than the new global version alone; else it is marked stale and the global
version answers alone, until the personal adapter is trained again. Rolling a personal adapter back moves to its version
before on the same global one: it never brings an older global version back.

What a federation's client keeps (`federated.flower.client_agent`, in a process of its own) is a whole adapter: the
version that it started from and its own delta in one. It stands on the base alone, is not trained on here, and each of
its versions answers as it did; before the first one, whatever answers everybody. `PersonalAdapters.refresh` finds it.

Privacy: rows stay in the process; what is stored (`federated.device.personal_store`) is read by this room alone.

Imports no torch; the backend trains (`federated.device.backends.protocol.Learns`). Called by whoever serves.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from federated.config import TrainConfig
from federated.device.backends.protocol import Learns, Lesson, Reads
from federated.device.personal_store import PersonalStore, PersonalVersion, Standing
from federated.device.records import NULL, Slot
from federated.device.slots import AdapterRuntime
from federated.device.stacking import personal_spec, stack, stack_digest
from federated.errors import DeviceError
from federated.manifest import AdapterSpec, RawTensor, VersionManifest, sha256_hex
from federated.wire import encode_tensors

__all__ = ["PersonalAdapters", "Rebased"]

_LOG = logging.getLogger(__name__)
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Rebased:
    """What a probe on a new global version found.

    Args:
        kept: whether the personal adapter stands on it now; else it is stale.
        slot: what answers under its name from now on.
        loss_alone: mean loss of the global version alone on the user's rows.
        loss_stacked: of both together.
    """

    kept: bool
    slot: Slot
    loss_alone: float
    loss_stacked: float


class PersonalAdapters:
    """Personal adapters of one runtime, each under its name in the runtime's routing.

    What is on the disk is routed again when this is made, or at the first `refresh`; slots are built when they are
    first asked for. What is damaged is told in the log and not routed: `forget` it, and train anew.

    Args:
        runtime: whose backend can train and give adapters back.
        folder: where they are stored, in the device's state folder.
        rank: of their factors.
        alpha: of their factors.
        keep: versions of each that stay.
        follow: whoever makes this calls `refresh`, again and again: nothing is read yet.

    Raises:
        DeviceError: if the backend cannot train, or a file is damaged.
    """

    def __init__(
        self,
        runtime: AdapterRuntime,
        folder: Path,
        *,
        rank: int = 4,
        alpha: float = 8.0,
        keep: int = 4,
        follow: bool = False,
    ) -> None:
        if not isinstance(runtime.backend, Learns) or not isinstance(runtime.backend, Reads):
            raise DeviceError(f"this device's backend ({type(runtime.backend).__name__}) cannot train; use torch")
        self._runtime = runtime
        self._learns = cast("Learns", runtime.backend)
        self._reads = cast("Reads", runtime.backend)
        self._store = PersonalStore(folder, keep=keep)
        self._rank, self._alpha = rank, alpha
        self._training = threading.Lock()  # one at a time: a device has few cores
        self._slots: dict[str, str] = {}  # slot's digest to name
        self._routed: dict[str, Standing] = {}
        self._damaged: dict[str, str] = {}  # name to what was said of it
        runtime.add_refill(self._refill)
        if not follow:
            self.refresh()

    def names(self) -> list[str]:
        """Whose adapters are here."""
        return self._store.names()

    def standing(self, name: str) -> Standing:
        """Which version of a name is in use, and on what.

        Raises:
            DeviceError: for an unknown name.
        """
        return self._store.known(name)

    def refresh(self) -> list[str]:
        """Route what another process has kept, rolled back or deleted since; returns whose it was.

        What is damaged is told in the log, once, and not routed: nobody else's adapter waits for it.
        """
        found = {name: one for name in self._store.names() if (one := self._sound(name)) is not None}
        changed = [name for name, standing in found.items() if self._routed.get(name) != standing]
        for name in changed:
            try:
                self._route(name, found[name])
            except DeviceError as error:
                self._tell(name, error)
        gone = sorted(set(self._routed) - set(found))
        for name in gone:
            self._unroute(name)
        return [*changed, *gone]

    def _sound(self, name: str) -> Standing | None:
        """Where a name stands; None also where that cannot be read."""
        try:
            standing = self._store.standing(name)
        except DeviceError as error:
            self._tell(name, error)
            return None
        self._damaged.pop(name, None)
        return standing

    def _tell(self, name: str, error: DeviceError) -> None:
        if self._damaged.get(name) != str(error):
            _LOG.warning("%s", error)
        self._damaged[name] = str(error)

    def train(
        self, name: str, rows: Sequence[Row], config: TrainConfig, *, onto: str | None = None, seed: int = 0
    ) -> PersonalVersion:
        """Train a name's adapter one version further, store it, and let it answer under its name at once.

        It goes on from the version in use; from nothing where there is none, it is stale, or does not fit.

        Args:
            name: whose.
            rows: the user's labelled rows.
            config: optimizer, steps, precision, threads.
            onto: slot of the global version; default: the active one.
            seed: of the first factors, data order and dropout.

        Raises:
            DeviceError: if ``onto`` holds no adapter, what was trained is not finite, or a federation's client keeps
                whole adapters under that name; nothing changed then.
            FederatedError: if the rows or the configuration cannot be trained on.

        Privacy: rows are read in this process and not kept.
        """
        self._refuse_whole(name)
        with self._training, self._runtime.pin(onto) as below:
            spec, _ = self._reads.read(below.handle)
            wanted = personal_spec(spec, rank=self._rank, alpha=self._alpha)
            number, tensors = self._start(name, wanted)
            made = self._learns.learn(below.handle, wanted, tensors, Lesson(rows, config, seed))
            _check_finite(made.tensors)
            version = PersonalVersion(
                name=name,
                number=self._store.next_number(name),
                previous=number,
                weights_digest=sha256_hex(encode_tensors(made.tensors)),
                base_digest=self._runtime.backend.base_digest,
                onto=below.digest,
                onto_version=below.version_id,
                spec=wanted,
                metrics=dict(made.metrics),
            )
            self._store.put(version, made.tensors)
            self._settle(name, Standing(version.number, below.digest))
        return version

    def rebase(self, name: str, onto: str, rows: Sequence[Row]) -> Rebased:
        """Probe a name's adapter on another global version, and move it there or mark it stale.

        Args:
            name: whose.
            onto: slot of the global version.
            rows: the user's labelled rows; best such as it was not trained on.

        Raises:
            DeviceError: for an unknown name or slot.
            DataError: for rows that cannot be measured on.
        """
        standing = self.standing(name)
        self._refuse_whole(name)
        with self._runtime.pin(onto) as below:
            alone = self._learns.measure(below.handle, rows)["loss"]
            stacked = self._stacked_loss(name, standing, below, rows)
            kept = stacked <= alone
            slot = self._settle(name, Standing(standing.number, below.digest, stale=not kept))
        return Rebased(kept, slot, alone, stacked)

    def rollback(self, name: str) -> Standing:
        """Move a name to its version before, on the same global version; before the first there is none: 0.

        Raises:
            DeviceError: for an unknown name.
        """
        moved = self._store.before(name)
        self._settle(name, moved)
        return moved

    def forget(self, name: str) -> None:
        """Delete everything of a name; requests under way still end.

        Raises:
            DeviceError: for an unknown name, or if the file system refuses.
        """
        if not self._store.holds(name):
            self.standing(name)  # says what is here instead
        self._unroute(name)
        self._store.forget(name)

    def _unroute(self, name: str) -> None:
        self._runtime.reroute(lambda routes: routes.without(name))
        self._slots = {digest: other for digest, other in self._slots.items() if other != name}
        self._routed.pop(name, None)

    def _refuse_whole(self, name: str) -> None:
        standing = self._store.standing(name)
        if standing is not None and standing.onto == NULL:
            raise DeviceError(
                f"{name!r} is what a federation's client keeps, a whole adapter that nothing is stacked on; train "
                "under another name"
            )

    def _start(self, name: str, wanted: AdapterSpec) -> tuple[int, Mapping[str, RawTensor]]:
        standing = self._store.standing(name)
        if standing is None or standing.stale or not standing.number:
            return 0, {}
        version, tensors = self._store.get(name, standing.number)
        return (version.number, tensors) if version.spec == wanted else (0, {})

    def _stacked_loss(self, name: str, standing: Standing, below: Slot, rows: Sequence[Row]) -> float:
        if not standing.number:
            return float("inf")
        try:
            handle = self._stacked(name, standing.number, below)
        except DeviceError:  # of other layers or another head: as bad as it gets
            return float("inf")
        return self._learns.measure(handle, rows)["loss"]

    def _stacked(self, name: str, number: int, below: Slot) -> Any:
        version, tensors = self._store.get(name, number)
        spec, made = stack(self._reads.read(below.handle), (version.spec, tensors))
        return self._runtime.backend.build(spec, made)

    def _settle(self, name: str, standing: Standing) -> Slot:
        """Build what shall answer, then move the pointer on disk, then the routing."""
        if standing.onto == NULL and not standing.number:
            self._store.stand(name, standing)
            self._route(name, standing)
            return self._runtime.active
        digest = self._digest(name, standing)
        slot = self._built(name, standing, digest)
        self._store.stand(name, standing)
        self._route(name, standing)
        return slot

    def _route(self, name: str, standing: Standing) -> None:
        self._routed[name] = standing
        if standing.onto == NULL and not self._fits(name, standing):  # then whatever answers everybody
            self._runtime.reroute(lambda routes: routes.without(name))
            return
        digest = self._digest(name, standing)
        self._slots[digest] = name
        self._runtime.reroute(lambda routes: routes.named(name, digest).with_user(name, name))

    def _fits(self, name: str, standing: Standing) -> bool:
        """Whether there is a whole adapter in use, for the base that this runtime has."""
        if not standing.number:
            return False
        theirs, ours = self._store.get(name, standing.number)[0].base_digest, self._runtime.backend.base_digest
        if theirs != ours:
            _LOG.warning("personal adapter %s is for the base model %s and does not answer: this device has %s",
                         name, theirs[:12], ours[:12])  # fmt: skip
        return theirs == ours

    def _digest(self, name: str, standing: Standing) -> str:
        if standing.stale or not standing.number:
            return standing.onto
        version, _ = self._store.get(name, standing.number)
        return version.weights_digest if version.is_whole else stack_digest(standing.onto, version.weights_digest)

    def _built(self, name: str, standing: Standing, digest: str) -> Slot:
        if standing.onto == NULL:
            return self._installed(name, standing.number)
        with self._runtime.pin(standing.onto) as below:
            if digest == standing.onto:
                return below
            label = f"{name}#{standing.number} on {below.label}"
            return self._runtime.adopt(
                digest, lambda: self._stacked(name, standing.number, below), label=label, parent=below
            )

    def _installed(self, name: str, number: int) -> Slot:
        """A whole adapter, with all the checks that a version gets: base, task, names, shapes, values."""
        version, tensors = self._store.get(name, number)
        manifest = VersionManifest(
            weights_digest=version.weights_digest,
            base_digest=version.base_digest,
            spec=version.spec,
            method="personal",
            run_id=name,
            round_number=number,
            parent=version.onto_version or None,
            task=dict(version.recipe),
        )
        label = f"{name}#{number}"
        return self._runtime.install(manifest, encode_tensors(tensors), version_id=manifest.version_id, label=label)

    def _refill(self, runtime: AdapterRuntime, digest: str) -> bool:  # noqa: ARG002
        """Build a personal slot again that was dropped, or that was last used before a restart."""
        name = self._slots.get(digest)
        standing = None if name is None else self._store.standing(name)
        if name is None or standing is None or digest == standing.onto or digest != self._digest(name, standing):
            return False
        self._built(name, standing, digest)
        return True


def _check_finite(tensors: Mapping[str, RawTensor]) -> None:
    for name, tensor in tensors.items():
        if not np.isfinite(tensor.array).all():
            raise DeviceError(f"training made {name} NaN or infinite; lower train.learning_rate and train again")
