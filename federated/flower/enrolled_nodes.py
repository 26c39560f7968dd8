"""Which nodes may take part, and as whom: what `federated.flower.directory` asks before it lets a client in.

Without a file of enrolled devices everybody may, and a client's name is its own claim. With one, a name belongs to two
keys. The node's key, which Flower checks, says at once who is there: strangers are not even asked for a name. The
update key, with which each update must be signed, says who trained. A simulation has no nodes' keys: there the
signature alone binds the name, and the run's events say so. On any other Grid a node without a key stays out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from flwr.serverapp import Grid

from federated.flower.enrolled import Enrolment, read_enrolment
from federated.flower.node_keys import fingerprint, node_keys

__all__ = ["NODE_REASONS", "EnrolledNodes", "Fault"]

NODE_REASONS: Mapping[str, str] = MappingProxyType(
    {
        "no_name": "it gave no usable client id, or an error: its own log has the details",
        "name_taken": "another node that is there has this client id",
        "unknown_client": "it is not among the enrolled and approved devices: enrol it, or wait for its approval",
        "wrong_key": "its client id is enrolled with another node key: start it with the key that was enrolled",
        "revoked": "its enrolment was revoked: enrol it anew",
    }
)
"""Reason code of a node that takes no part to its meaning and, after the colon, what its owner can do."""


class Fault(NamedTuple):
    """Why a node takes no part."""

    reason: str
    text: str


class EnrolledNodes:
    """The enrolled devices and the nodes that are there, as of the last look.

    Args:
        path: of the file of enrolled devices (``admission.devices``); empty: everybody may take part.

    Attributes:
        changed: whether the last look found another file than the one before.
        by_signature_alone: whether names are bound by signatures only, because nodes have no keys.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path) if path else None
        self._enrolment = Enrolment()
        self._keys: Mapping[int, str] | None = None
        self.changed = False

    @property
    def by_signature_alone(self) -> bool:
        """Whether a file says who may take part, and nodes have no keys of their own."""
        return self._path is not None and self._keys is None

    def look(self, grid: Grid) -> set[int]:
        """Read the file and the nodes' keys anew; returns the ids of the nodes that are there.

        Raises:
            ConfigError: if the file cannot be read: nobody is let in then.
        """
        if self._path is None:
            return set(grid.get_node_ids())
        found = read_enrolment(self._path)
        self.changed, self._enrolment = found != self._enrolment, found
        self._keys = node_keys(grid)
        return set(grid.get_node_ids()) if self._keys is None else set(self._keys)

    def stranger(self, node: int) -> Fault | None:
        """Why a node need not be asked for its name; None where it may be somebody."""
        if self._path is None or self._keys is None:
            return None
        key = self._keys.get(node, "")
        name = self._enrolment.name_of(key)
        if name is None:
            found = f"the node key {fingerprint(key)}" if key else "a node without a key of an elliptic curve"
            return Fault("unknown_client", f"{found} is not enrolled")
        return self._not_approved(name)

    def fault(self, client_id: str, node: int) -> Fault | None:
        """Why a node may not take part as this client; None where it may."""
        if self._path is None:
            return None
        fault = self._not_approved(client_id)
        if fault is None and self._keys is not None:
            mine = self._keys.get(node, "")
            if mine != self._enrolment.devices[client_id].node_key:
                found = f"client id {client_id!r} is enrolled with another node key"
                return Fault("wrong_key", f"{found}; this node's is enrolled as {self._enrolment.name_of(mine)!r}")
        return fault

    def _not_approved(self, client_id: str) -> Fault | None:
        if client_id in self._enrolment.devices:
            return None
        state = self._enrolment.others.get(client_id)
        if state == "revoked":
            return Fault("revoked", f"the enrolment of {client_id!r} was revoked")
        found = "not enrolled" if state is None else f"enrolled, and its state is {state!r}"
        return Fault("unknown_client", f"client id {client_id!r} is {found}")

    def allows(self, client_id: str) -> bool:
        """Whether a client may take part, wherever it is."""
        return self._path is None or client_id in self._enrolment.devices

    def update_key(self, client_id: str) -> bytes | None:
        """The key that a client's updates must be signed with; None where signatures are not asked for.

        Raises:
            KeyError: for a client that may not take part: it has no key, and is not to be asked without one.
        """
        return None if self._path is None else self._enrolment.devices[client_id].update_key
