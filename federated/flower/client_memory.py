"""What a train plan lets stay on the client: its own factors and head, for rules that share only a part (FedSA-LoRA).

The client's store holds one record: the tensors before and after this client's newest training, and the version that
the training started from. Who is asked to start from that same version once more gets the tensors from before it: the
round was interrupted, or missed its quorum, and is done again. From any other version a client goes on from after it,
however long it was left out, and whether or not the server could use its update. Nothing of the record ever travels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from federated.errors import DataError, WireError
from federated.flower.client_store import ClientStore
from federated.manifest import RawTensor, TrainPlan, sha256_hex
from federated.state import AdapterState, Tensors, from_raw, group_of, to_raw
from federated.wire import Limits, decode_packet, encode_packet

__all__ = ["recalled", "remember"]

_KEY = "kept"
_BEFORE, _AFTER = "before:", "after:"
_SEAL = 64
"""Hexadecimal characters of the digest in front."""
_OWN = Limits(max_bytes=2**40, max_header_bytes=2**28, max_tensors=2**20)
"""For what this client stored itself: twice the tensors of an adapter of any size."""


def recalled(store: ClientStore, plan: TrainPlan, state: AdapterState, *, version_id: str) -> AdapterState:
    """The received adapter with this client's own tensors in the groups that it keeps, where it has any yet.

    Args:
        store: of this client.
        plan: names the groups.
        state: as received; it shares its other tensors with what is returned.
        version_id: of the version that was received.

    Raises:
        DataError: if the store is damaged, or holds another adapter's tensors.
    """
    data = store.latest(_KEY) if plan.kept else None
    if data is None:
        return state
    header, raw = _unsealed(data, store)
    part = _BEFORE if header.get("version") == version_id else _AFTER
    tensors = from_raw({name.removeprefix(part): one for name, one in raw.items() if name.startswith(part)})
    if _shapes(tensors) != _shapes(_own(plan, state)):
        found = f"the client's store in {store.folder} holds another adapter's tensors"
        raise DataError(f"{found}; set that folder aside to start anew")
    return replace(state, tensors={**state.tensors, **tensors})


def remember(
    store: ClientStore,
    plan: TrainPlan,
    *,
    before: AdapterState,
    after: AdapterState,
    round_number: int,
    version_id: str,
) -> None:
    """Keep the groups that stay on the client.

    Args:
        store: of this client.
        plan: names the groups; where it names none, nothing is written.
        before: what the client started to train from, as `recalled` gave it.
        after: what training made of it.
        round_number: 1-based.
        version_id: of the version that was received.

    Raises:
        DataError: if the disk refuses.
    """
    if not plan.kept:
        return
    parts = {_BEFORE: _own(plan, before), _AFTER: _own(plan, after)}
    tensors = {part + name: tensor for part, named in parts.items() for name, tensor in named.items()}
    packet = encode_packet({"kind": _KEY, "version": version_id}, to_raw(tensors))
    store.put(round_number, _KEY, sha256_hex(packet).encode() + packet)


def _unsealed(data: bytes, store: ClientStore) -> tuple[Mapping[str, Any], Mapping[str, RawTensor]]:
    """Header and tensors; the digest in front, because a disk's flipped bit in a weight would be trained on."""
    seal, packet = data[:_SEAL], data[_SEAL:]
    fault = "its bytes are not those that were written"
    if sha256_hex(packet).encode() == seal:
        try:
            header, raw, _ = decode_packet(packet, _OWN)
            return header, raw
        except WireError as error:
            fault = str(error)
    raise DataError(f"the client's store in {store.folder} is damaged: {fault}; set that folder aside to start anew")


def _own(plan: TrainPlan, state: AdapterState) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.tensors.items() if group_of(name) in plan.kept}


def _shapes(tensors: Tensors) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
