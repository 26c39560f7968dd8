"""Which slot a request's ``model`` means, and what can be asked for.

| model | answered by |
|---|---|
| the base's name, or none | what the routing says: the user's adapter, the arm's, else the active one |
| ``null`` | the base alone |
| an adapter's name | the slot that the name is on at this moment |
| ``name@sha256:...`` | that very slot |
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field

from federated.device.records import NULL, Slot
from federated.device.routing import Route
from federated.device.serving.faults import ApiError, unknown_model
from federated.device.slots import AdapterRuntime

__all__ = ["Directory", "Listed", "Wanted"]

_EXACT = re.compile(r"(?P<name>[^:]+)@sha256:(?P<digest>[0-9a-f]{64})")


@dataclass(frozen=True)
class Wanted:
    """What to pin: a slot by its digest, else what a route leads to."""

    digest: str | None = None
    route: Route = field(default_factory=Route)


@dataclass(frozen=True)
class Listed:
    """One name that requests may give.

    Args:
        name: as a request gives it.
        slot: what it means now; None: it is brought back when it is asked for.
        parent: the base's name, or None for the base itself.
    """

    name: str
    slot: Slot | None
    parent: str | None


class Directory:
    """Names over one runtime's routing; any thread may use it.

    Args:
        runtime: holds the routing and the slots.
        base_name: what the base is called.
    """

    def __init__(self, runtime: AdapterRuntime, base_name: str) -> None:
        self._runtime = runtime
        self.base_name = base_name
        self._lock = threading.Lock()
        self._noted: dict[str, set[str]] = {}  # every slot that a name was on, since a client may have kept one

    def note(self, name: str, digest: str) -> None:
        """From now on ``name@sha256:digest`` is that slot, also when the name moves on."""
        with self._lock:
            self._noted.setdefault(name, set()).add(digest)

    def forget(self, name: str) -> None:
        """No ``name@sha256:...`` leads anywhere any more."""
        with self._lock:
            self._noted.pop(name, None)

    def wanted(self, model: str | None, *, user: str | None = None, arm: str | None = None) -> Wanted:
        """What a request wants.

        Raises:
            ApiError: 404 for a name that leads nowhere.
        """
        if model is None or model == self.base_name:
            return Wanted(route=Route(user=user, arm=arm))
        if model == NULL:
            return Wanted(NULL)
        if model in self._runtime.routes.names:
            return Wanted(route=Route(name=model))
        exact = _EXACT.fullmatch(model)
        if exact and self._leads(exact["name"], exact["digest"]):
            return Wanted(exact["digest"])
        raise self.unknown(model)

    def unknown(self, model: str) -> ApiError:
        """The error for a name that leads nowhere."""
        return unknown_model(model, [self.base_name, NULL, *sorted(self._runtime.routes.names)])

    def _leads(self, name: str, digest: str) -> bool:
        with self._lock:
            noted = digest in self._noted.get(name, ())
        return noted or self._runtime.routes.names.get(name) == digest

    def listed(self) -> list[Listed]:
        """The base, the null adapter, adapters by name, and resident slots by name and digest."""
        slots = {slot.digest: slot for slot in self._runtime.slots}
        names = dict(self._runtime.routes.names)
        with self._lock:
            pairs = {(name, digest) for name, known in self._noted.items() for digest in known}
        exact = [(name, digest) for name, digest in sorted(pairs | set(names.items())) if digest in slots]
        return [
            Listed(self.base_name, self._runtime.active, None),
            Listed(NULL, slots[NULL], self.base_name),
            *(Listed(name, slots.get(digest), self.base_name) for name, digest in sorted(names.items())),
            *(
                Listed(f"{name}@sha256:{digest}", slots[digest], self.base_name)
                for name, digest in exact
                if _EXACT.fullmatch(f"{name}@sha256:{digest}")
            ),
        ]
