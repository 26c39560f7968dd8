"""What a client keeps of its own training until a round is over, for rules that ask again: its factors, never sent.

A later exchange of the same round is answered from them, without training a second time. They are in the client's
store, under the round, and are forgotten with it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from federated.delta import apply_some
from federated.errors import DataError, WireError
from federated.flower.client_store import ClientStore
from federated.flower.records import Assignment
from federated.state import AdapterState, Tensors, from_raw, group_of, to_raw
from federated.training import LocalResult
from federated.wire import OWN_LIMITS, decode_packet, encode_packet

__all__ = ["cache", "cached"]

_KEY, _DELTA = "trained", "delta:"


def cache(store: ClientStore, task: Assignment, start: AdapterState, result: LocalResult) -> None:
    """Keep the factors that this client holds after training, and the dense tensors' delta.

    Args:
        store: of this client.
        task: what was asked.
        start: what it trained from.
        result: what it learnt.

    Raises:
        DataError: if the disk refuses.
    """
    after = {name: one for name, one in apply_some(start, result.delta).tensors.items() if group_of(name) != "dense"}
    dense = {f"{_DELTA}{name}": one for name, one in result.delta.items() if group_of(name) == "dense"}
    header = {**_origin(task, start), "num_examples": result.num_examples}
    store.put(task.round_number, _KEY, encode_packet(header, to_raw({**after, **dense})))


def cached(store: ClientStore, task: Assignment, state: AdapterState) -> tuple[AdapterState, LocalResult]:
    """What `cache` kept in this round: the adapter with this client's factors, and the dense delta.

    Args:
        store: of this client.
        task: a later exchange of the round.
        state: what was received with it; its ``extra`` tensors stay beside the factors.

    Raises:
        DataError: if nothing is kept, or not of this task's version and rank, or the store is damaged.
    """
    data = store.get(task.round_number, _KEY)
    try:
        header, raw, _ = decode_packet(data, OWN_LIMITS) if data is not None else ({}, {}, "")
    except WireError:
        header, raw = {}, {}
    if {name: header.get(name) for name in _origin(task, state)} != _origin(task, state):
        raise DataError(
            f"phase {task.plan.phase} of round {task.round_number} goes on from what this client trained in phase 1, "
            f"and {store.folder} holds nothing of it: was the store removed, or does another machine answer? The "
            "client takes no further part in this round"
        )
    tensors = from_raw(raw)
    factors = {name: one for name, one in tensors.items() if not name.startswith(_DELTA)}
    dense: Tensors = {name.removeprefix(_DELTA): one for name, one in tensors.items() if name.startswith(_DELTA)}
    return replace(state, tensors=factors), LocalResult(dense, int(header["num_examples"]))


def _origin(task: Assignment, state: AdapterState) -> dict[str, Any]:
    """What must agree between the phase that trained and the one that answers from it."""
    return {"kind": "trained", "parent_version": task.parent_version, "spec_digest": state.spec.digest}
