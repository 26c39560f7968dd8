"""Which slot answers whom: adapters by name, users and experiment arms by adapter's name.

A routing is immutable; the runtime swaps a whole one for the next, so that a request sees all of a change or nothing.
Imports neither torch nor SQLAlchemy. Called by `federated.device.slots`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from federated.device.records import NULL
from federated.errors import DeviceError, UnknownAdapter

__all__ = ["Route", "Routes", "check_name"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


def _empty() -> Mapping[str, str]:
    return MappingProxyType({})


def check_name(name: str, what: str = "adapter") -> str:
    """A name that may stand in a routing, in a request and in a folder.

    Raises:
        DeviceError: for any other.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DeviceError(
            f"{what} name {str(name)[:70]!r} cannot be used; expected 1 to 64 letters, digits, dots, dashes, "
            "underscores or @, the first a letter or digit"
        )
    return name


@dataclass(frozen=True)
class Route:
    """What a request says of itself; the first of these that is known decides.

    Args:
        name: the adapter that it asks for.
        user: whose request it is.
        arm: the experiment arm that it was put in.
    """

    name: str | None = None
    user: str | None = None
    arm: str | None = None


@dataclass(frozen=True)
class Routes:
    """A whole routing; every method returns the next one.

    Args:
        names: adapter's name to slot digest.
        users: user to adapter's name.
        arms: experiment arm to adapter's name.
    """

    names: Mapping[str, str] = field(default_factory=_empty)
    users: Mapping[str, str] = field(default_factory=_empty)
    arms: Mapping[str, str] = field(default_factory=_empty)

    def resolve(self, route: Route) -> str | None:
        """The slot for a request; None: the active one.

        A user or an arm that nobody routed falls through to the next; a name does not.

        Raises:
            UnknownAdapter: for an unknown name: answering with another adapter would look like success.
        """
        if route.name is not None:
            return self._slot_of(route.name)
        for known, asked in ((self.users, route.user), (self.arms, route.arm)):
            if asked is not None and asked in known:
                return self._slot_of(known[asked])
        return None

    def _slot_of(self, name: str) -> str:
        if name == NULL:
            return NULL
        if name not in self.names:
            found = ", ".join([NULL, *self.names])
            raise UnknownAdapter(f"no adapter named {name[:70]!r} on this device, found {found}")
        return self.names[name]

    def named(self, name: str, digest: str) -> Routes:
        """With an adapter's name on a slot, in place of the one that it had.

        Raises:
            DeviceError: for a name that cannot be used.
        """
        if check_name(name) == NULL:
            raise DeviceError(f"{NULL!r} is the null adapter's name; choose another")
        return replace(self, names=MappingProxyType({**self.names, name: digest}))

    def without(self, name: str) -> Routes:
        """Without an adapter's name, and without what was routed to it."""
        return Routes(
            MappingProxyType({key: value for key, value in self.names.items() if key != name}),
            MappingProxyType({key: value for key, value in self.users.items() if value != name}),
            MappingProxyType({key: value for key, value in self.arms.items() if value != name}),
        )

    def with_user(self, user: str, name: str | None) -> Routes:
        """With a user routed to an adapter's name; None routes the user no more.

        Raises:
            DeviceError: for an unknown adapter, or a user's name that cannot be used.
        """
        return replace(self, users=self._changed(self.users, check_name(user, "user"), name))

    def with_arm(self, arm: str, name: str | None) -> Routes:
        """With an experiment arm routed to an adapter's name; None routes the arm no more.

        Raises:
            DeviceError: for an unknown adapter, or an arm's name that cannot be used.
        """
        return replace(self, arms=self._changed(self.arms, check_name(arm, "arm"), name))

    def _changed(self, known: Mapping[str, str], key: str, name: str | None) -> Mapping[str, str]:
        rest = {one: other for one, other in known.items() if one != key}
        if name is not None:
            self._slot_of(name)
            rest[key] = name
        return MappingProxyType(rest)
