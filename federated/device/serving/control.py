"""What changes which adapter answers: load, unload, activate, roll back, route, and follow a channel.

Requests never come here; the admin listener, the command line and the follower do. Every change is the runtime's own:
a version that is refused leaves names, routing and what is served as they were.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from federated.device.records import NULL, Activation, Slot
from federated.device.routing import check_name
from federated.device.serving.directory import Directory
from federated.device.serving.faults import ApiError
from federated.device.serving.sources import Offer, Source, check_version_name
from federated.device.slots import AdapterRuntime
from federated.errors import DeviceError, FederatedError, RegistryError

__all__ = ["Control"]

_FIRST, _LONGEST = 60.0, 3600.0
"""Seconds until a version that was refused is tried again, at first and at most."""


@dataclass(frozen=True)
class _Refused:
    """A version of the channel that cannot be installed.

    Args:
        version_id: which one.
        code: name of the error.
        until: when it may be tried again.
        seconds: how long that was from the last try.
    """

    version_id: str
    code: str
    until: float
    seconds: float


class Control:
    """Changes over one runtime, one at a time; any thread may ask.

    Args:
        runtime: what is changed; asks here for loaded slots that it dropped.
        directory: learns which slot each name is on.
        source: where versions come from; None: nothing can be loaded.
        channel: the name that `follow` keeps up with, which is the adapter's name too; None: follows nothing.
        ruler: who decides which version is active, if it is not this object; says how to ask for a change. Then names
            and the active slot stay as they are here, and only users and arms are routed.
        troubled: the ruler's word on why it cannot keep up, or None.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        runtime: AdapterRuntime,
        directory: Directory,
        source: Source | None = None,
        *,
        channel: str | None = None,
        ruler: str = "",
        troubled: Callable[[], str | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runtime = runtime
        self.directory = directory
        self.channel = channel
        self._ruler, self._troubled = ruler, troubled
        self._stale: str | None = None
        self._source = source
        self._followed: str | None = None
        self._refused: _Refused | None = None
        self._clock = clock
        self._versions: dict[str, str] = {}  # slot to the version that it was loaded as
        self._lock = threading.Lock()
        if source is not None:
            runtime.add_refill(self.refill)

    @property
    def stale(self) -> str | None:
        """Why the channel could not be kept up with, last time; None when it could."""
        return self._stale or self._troubled()

    def load(self, name: str, version: str, *, replace: bool = False) -> Slot:
        """Install a version and put a name on it; what is active stays.

        Args:
            name: of the adapter, from now on.
            version: a name of the store.
            replace: whether a name that is on another version already moves.

        Raises:
            ApiError: if the name is taken, or ``version`` is no version's name.
            FederatedError: if the store or the runtime refuses.
        """
        with self._changing():
            return self._load(name, check_version_name(version), replace=replace)

    def unload(self, name: str) -> str:
        """Take a name, and what was routed to it, away; its slot goes when the room is needed.

        Raises:
            ApiError: 404 if there is no such name.

        Returns:
            The slot that the name was on.
        """
        with self._changing():
            digest = self.runtime.routes.names.get(name)
            if digest is None:
                raise self.directory.unknown(name)
            self.runtime.reroute(lambda routes: routes.without(name))
            self.directory.forget(name)
        return digest

    def activate(self, model: str) -> Activation:
        """Let new requests that name no adapter be answered by what a name means now.

        Raises:
            ApiError: 404 if the name leads nowhere.
        """
        with self._changing():
            wanted = self.directory.wanted(model)
            digest = wanted.digest or self.runtime.routes.resolve(wanted.route)
            if digest is None:
                raise ApiError(f"{model[:160]!r} is the base's name; activate null for the base alone", param="model")
            with self.runtime.pin(digest):  # brings it back where it was dropped
                return self.runtime.activate(digest)

    def rollback(self) -> Activation:
        """Let the slot answer that was active before; the followed channel does not bring this version back."""
        with self._changing():
            return self.runtime.rollback()

    def route(self, *, user: str | None = None, arm: str | None = None, name: str | None = None) -> None:
        """Send a user, or an experiment arm, to an adapter's name; None: no more.

        Raises:
            DeviceError: for an unknown adapter, or a name that cannot be used.
        """
        if user is not None:
            self.runtime.reroute(lambda routes: routes.with_user(user, name))
        if arm is not None:
            self.runtime.reroute(lambda routes: routes.with_arm(arm, name))

    def follow(self, *, patient: bool = False) -> Activation | None:
        """Install and activate what the channel points at, where that is news.

        A version that was rolled back from is not tried again before the channel moves. When the store cannot be read,
        or the version is refused, what is served goes on, and the next call tries again.

        Args:
            patient: leave a version that was refused alone for a time, ever longer, unless the channel moves; `stale`
                goes on to say why.

        Returns:
            The activation, or None where nothing changed.

        Raises:
            FederatedError: if the store or the runtime refuses; `stale` says so until the next success.
        """
        if self.channel is None:
            return None
        try:
            with self._lock:
                offer = self._store().find(self.channel)
                if patient and self._waits(offer):
                    return None
                made = self._follow(self.channel, offer)
        except Exception as error:
            self._stale = type(error).__name__
            raise
        self._stale = None
        return made

    def refill(self, _: AdapterRuntime, digest: str) -> bool:
        """Bring a loaded slot back that was dropped for want of room; False if it was never loaded here."""
        version_id = self._versions.get(digest)
        if version_id is None or self._source is None:
            return False
        self._install(self._source.find(version_id))
        return True

    def _waits(self, offer: Offer) -> bool:
        refused = self._refused
        if refused is None or refused.version_id != offer.version_id or self._clock() >= refused.until:
            return False
        self._stale = refused.code
        return True

    def _follow(self, channel: str, offer: Offer) -> Activation | None:
        if offer.version_id == self._followed:
            return None
        try:
            slot = self._named(channel, offer)
        except FederatedError as error:
            if not isinstance(error, RegistryError):  # a store that cannot be read is no fault of the version
                self._refuse(offer, error)
            raise
        self._followed, self._refused = offer.version_id, None
        return self.runtime.activate(slot.digest)

    def _refuse(self, offer: Offer, error: FederatedError) -> None:
        before = self._refused
        again = before is not None and before.version_id == offer.version_id
        seconds = min(_LONGEST, 2 * before.seconds) if before is not None and again else _FIRST
        self._refused = _Refused(offer.version_id, type(error).__name__, self._clock() + seconds, seconds)

    def _load(self, name: str, version: str, *, replace: bool) -> Slot:
        if check_name(name) in (NULL, self.directory.base_name, self.channel):
            raise ApiError(f"{name!r} cannot name a loaded adapter here; choose another", param="lora_name")
        if name in self.runtime.routes.names and not replace:
            raise ApiError(
                f"an adapter named {name!r} is loaded already; unload it first, or send load_inplace = true",
                status=409,
                code="name_taken",
                param="lora_name",
            )
        return self._named(name, self._store().find(version))

    def _named(self, name: str, offer: Offer) -> Slot:
        slot = self._install(offer)
        self.runtime.reroute(lambda routes: routes.named(name, slot.digest))
        self.directory.note(name, slot.digest)
        return slot

    def _install(self, offer: Offer) -> Slot:
        slot = self.runtime.install(offer.manifest, offer.weights(), version_id=offer.version_id, label=offer.label)
        self._versions[slot.digest] = offer.version_id
        return slot

    def _changing(self) -> threading.Lock:
        """What one change at a time holds.

        Raises:
            ApiError: 409 if it is not for this object to change anything.
        """
        if self._ruler:
            raise ApiError(f"which version answers is not decided here; {self._ruler}", status=409, code="not_here")
        return self._lock

    def _store(self) -> Source:
        if self._source is None:
            raise DeviceError("this server has no store of versions; start it with --registry")
        return self._source
