"""What a train plan lets stay on the client: its own factors, for rules that share only a part (FedSA-LoRA).

They are in the client's store, by round, and never travel. A round that is asked for twice starts from the same.
"""

from __future__ import annotations

from dataclasses import replace

from federated.errors import DataError, WireError
from federated.flower.client_store import ClientStore
from federated.manifest import TrainPlan
from federated.state import AdapterState, from_raw, group_of, to_raw
from federated.wire import decode_tensors, encode_tensors

__all__ = ["recalled", "remember"]

_KEY = "kept"


def recalled(store: ClientStore, plan: TrainPlan, state: AdapterState, *, before: int) -> AdapterState:
    """The received adapter with this client's own tensors in the groups that it keeps, where it has any yet.

    Args:
        store: of this client.
        plan: names the groups.
        state: as received.
        before: only what was remembered in earlier rounds than this one counts.

    Raises:
        DataError: if the store is damaged, or holds another adapter's tensors.
    """
    data = store.latest(_KEY, before=before) if plan.kept else None
    if data is None:
        return state
    try:
        kept = from_raw(decode_tensors(data))
    except WireError as error:
        raise DataError(f"the client's store in {store.folder} is damaged ({error}); remove it to start anew") from None
    expected = {name: tensor.shape for name, tensor in state.tensors.items() if group_of(name) in plan.kept}
    if {name: tensor.shape for name, tensor in kept.items()} != expected:
        found = f"the client's store in {store.folder} holds another adapter's tensors"
        raise DataError(f"{found}; remove it to start anew")
    return replace(state, tensors={**state.tensors, **kept})


def remember(store: ClientStore, plan: TrainPlan, trained: AdapterState, *, round_number: int) -> None:
    """Keep the groups that stay on the client, as they are after training.

    Raises:
        DataError: if the disk refuses.
    """
    if plan.kept:
        kept = {name: tensor for name, tensor in trained.tensors.items() if group_of(name) in plan.kept}
        store.put(round_number, _KEY, encode_tensors(to_raw(kept)))
