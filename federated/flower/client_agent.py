"""A training client beside its device's agent: it starts from what that verified, and what it learns is served there.

**Start.** The task names its parent version. The agent has verified that version if it is on its shelf, whole, and the
journal says verified or further; then its weights and algebra must be what the server sent, as a version publishes it
(a residual folded in, a core multiplied out), and training starts from the shelf's own bytes. A fresh adapter, bit for
bit the one that this client makes itself from its own base model and the run's seed, needs no agent: it is made of
nothing else.

**What is learnt** is kept as a whole adapter, start and own delta in one, under a name in the device's store of
personal adapters (`federated.device.personal_store`): it answers at once, and its versions can be rolled back.

The only module of this room that knows the device's; loaded where a client's own file names an agent.

Privacy: what is learnt is written to the owner's own disk, owner-only, and is in no message; with ``privacy.example``
it is as noisy as the update, otherwise it says more of the examples than a mean of many clients does.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from federated.device.agent_config import device_config
from federated.device.journal import State, read_book
from federated.device.personal_store import PersonalStore, PersonalVersion, Standing
from federated.device.records import NULL
from federated.device.shelf import Shelf, Stored
from federated.errors import ConfigError, DeviceError, NotVerified
from federated.flower.client_site import AgentSite
from federated.flower.publisher import recipe_record, weights_digest
from federated.flower.records import Assignment
from federated.flower.session import Session
from federated.global_state import GlobalState
from federated.state import AdapterState, from_raw, to_raw
from federated.wire import decode_tensors

__all__ = ["DeviceSide"]

_LOG = logging.getLogger(__name__)
_VERIFIED: frozenset[State] = frozenset({"verified", "staged", "probing", "probation", "committed"})


class DeviceSide:
    """One device's agent and personal adapters, as its training client sees them.

    Args:
        site: where the agent is, and whether it must have verified what is trained from.
        personal: name under which what is learnt is kept; empty keeps nothing.

    Raises:
        ConfigError: if there is no such agent, or its configuration cannot be read.
        DeviceError: for a name that cannot be used, or under which the device itself trains.
    """

    def __init__(self, site: AgentSite, *, personal: str = "") -> None:
        path = Path(site.path)
        if not path.exists():
            raise ConfigError(f"agent.path = {path}: no such file or folder; name the agent's device.yaml or its state")
        self._require = site.require
        self._state = device_config(path).state if path.is_file() else path
        self._shelf = Shelf(self._state / "versions")
        self._personal = personal
        self._store = PersonalStore(self._state / "personal")
        standing = self._store.standing(personal) if personal else None
        if personal == NULL or (standing is not None and standing.onto != NULL):
            raise DeviceError(
                f"personal: {personal!r} is the null adapter's name, or trained on this device itself; choose another "
                "one for what this client learns"
            )

    def start(self, task: Assignment, received: AdapterState, *, fresh: AdapterState) -> AdapterState:
        """What to start from: the verified bytes where there are any, else what was received, unless that is forbidden.

        Args:
            task: names the parent version.
            received: from the server.
            fresh: the adapter before any training, as this client makes it.

        Raises:
            NotVerified: if the agent must have verified it and has not: why, and what to do.
            DeviceError, ReleaseError: if the agent's files cannot be read.
        """
        sent = _published(received)
        if _same(sent, _published(fresh)):
            _LOG.info("round %d starts from a fresh adapter, the one that this client makes itself", task.round_number)
            return received
        stored, why = self._verified(task.parent_version)
        if stored is not None and _is(sent, stored):
            _LOG.info("round %d starts from version %s, as this device's agent verified it", task.round_number,
                      task.parent_version[:12])  # fmt: skip
            return _from_shelf(stored, received)
        if self._require:
            raise NotVerified(why)
        _LOG.info("round %d starts from what the server sent, which is not verified: %s", task.round_number, why)
        return received

    def _verified(self, version_id: str) -> tuple[Stored | None, str]:
        """The version as the agent verified it; and what is wrong if there is none, or another thing was sent."""
        book = read_book(self._state)
        if book is None:
            return None, "the device's agent keeps no journal yet: start it (fedpeft device run), or correct agent.path"
        short, state = version_id[:12] or "(none)", book.state(version_id)
        if state not in _VERIFIED:
            return None, (
                f"version {short} is {state or 'unknown'} to the device's agent: release it on the channel that the "
                f"device follows, or there: fedpeft device install {version_id[:64] or 'VERSION_ID'}"
            )
        stored = self._shelf.get(version_id)
        if stored is None:
            return None, (
                f"version {short} is not on the device's shelf any more, or damaged: fedpeft device install "
                f"{version_id}, and raise the agent's capacity if that comes again"
            )
        return stored, (
            f"the server sent something else than version {short}: a smaller rank, a sparse message, or not that "
            "version; who must train from verified versions takes part in runs of one rank and dense messages"
        )

    def keep(self, task: Assignment, learnt: AdapterState, session: Session) -> None:
        """Keep what was learnt under the personal name; the very same as what is in use is not kept twice.

        A disk that refuses is said in the log and costs the personal adapter alone: the answer is computed, charged and
        stored by then.

        Args:
            task: what it was learnt in.
            learnt: start and own delta in one.
            session: says what to rebuild around it.
        """
        if not self._personal:
            return
        whole = _published(learnt)
        try:
            self._put(task, whole, session)
        except DeviceError as error:
            _LOG.error("what was learnt in round %d is not kept as %r: %s", task.round_number, self._personal, error)

    def _put(self, task: Assignment, whole: AdapterState, session: Session) -> None:
        name, digest = self._personal, weights_digest(whole)
        standing = self._store.standing(name) or Standing(0, NULL)
        if standing.number and self._store.get(name, standing.number)[0].weights_digest == digest:
            return
        version = PersonalVersion(
            name=name,
            number=self._store.next_number(name),
            previous=standing.number,
            weights_digest=digest,
            base_digest=task.base_digest,
            onto=NULL,
            onto_version=task.parent_version,
            spec=whole.spec,
            metrics={"round_number": float(task.round_number)},
            recipe=recipe_record(session.config),
        )
        self._store.put(version, to_raw(whole.tensors))
        self._store.stand(name, Standing(version.number, NULL))
        _LOG.info("what was learnt in round %d answers as %r, version %d", task.round_number, name, version.number)


def _published(state: AdapterState) -> AdapterState:
    """An adapter as a version has it: one plain adapter."""
    return GlobalState(replace(state, residual=None, extra={}), state.residual).export()


def _same(one: AdapterState, other: AdapterState) -> bool:
    return one.spec == other.spec and weights_digest(one) == weights_digest(other)


def _is(sent: AdapterState, stored: Stored) -> bool:
    """Whether that version was sent: its weights, and what they mean; scaling, for one, is in no tensor."""
    return sent.spec == stored.manifest.spec and weights_digest(sent) == stored.manifest.weights_digest


def _from_shelf(stored: Stored, received: AdapterState) -> AdapterState:
    """The shelf's own tensors in the place of the equal ones that were received.

    Where a version is another form of what is trained (a residual beside it, a core between its factors), what was
    received stays: its published form is, bit for bit, the verified one.
    """
    if received.residual is not None or received.spec != stored.manifest.spec:
        return received
    return replace(received, tensors=from_raw(decode_tensors(stored.weights)))
