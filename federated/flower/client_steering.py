"""What a client remembers to correct its own drift (SCAFFOLD, FedDyn), on its own disk.

Only what the server took counts, or the client's memory and the server's would come apart: an update may be refused,
late, or lost with a round that missed its quorum. So the client's newest record holds its memory before and after that
training, and the plan says from which round on it counts. A round that is asked for again begins with the same memory
and gives the same record. Nothing of it ever travels.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from torch import Tensor

from federated.corrections import SHIFT, memory_after, memory_before, shift_of
from federated.errors import DataError, WireError
from federated.flower.client_store import ClientStore
from federated.manifest import TrainPlan
from federated.state import AdapterState, Tensors, from_raw, group_of, to_raw
from federated.wire import Limits, decode_packet, encode_packet

__all__ = ["Steering"]

_LOG = logging.getLogger(__name__)
_KEY = "steering"
_OWN = Limits(max_bytes=2**40, max_header_bytes=2**28, max_tensors=2**20)
"""For what this client stored itself: twice the tensors of an adapter of any size."""


class Steering:
    """One client's memory for one round; does nothing where the plan asks for no correction.

    Args:
        store: of this client.
        plan: names the method, and the round whose memory counts.
        received: the adapter, with what the server sent beside it.
        round_number: the round that is open.

    Raises:
        DataError: if the store is damaged, or holds another adapter's memory.
        WireError: if the server's variate is missing or of other shapes.
    """

    def __init__(self, store: ClientStore, plan: TrainPlan, received: AdapterState, *, round_number: int) -> None:
        self._store = store
        self._plan = plan
        self._received = received
        self._round = round_number
        self._before: dict[str, Tensor] = {}
        if plan.correction:
            self._before = memory_before(plan, received, self._kept() if plan.memory_round else None)

    def steered(self, state: AdapterState, *, learning_rate: float) -> AdapterState:
        """The state to train from, with what is to be added to each gradient beside it; its tensors are shared."""
        extra = {name: tensor for name, tensor in state.extra.items() if not name.startswith(SHIFT)}  # none from afar
        if not self._plan.correction:
            return replace(state, extra=extra)
        shift = shift_of(self._plan, self._received, self._before, learning_rate=learning_rate)
        return replace(state, extra={**extra, **{SHIFT + name: one for name, one in shift.items()}})

    def remember(self, delta: Tensors, *, steps: int) -> None:
        """Write down the memory before and after this training.

        Raises:
            DataError: if the disk refuses.
        """
        if not self._plan.correction:
            return
        after = memory_after(self._plan, self._received, self._before, delta=delta, steps=steps)
        parts = {self._plan.memory_round: self._before, self._round: after}
        tensors = {f"{number}:{name}": one for number, named in parts.items() for name, one in named.items()}
        header = {"kind": _KEY, "correction": self._plan.correction}
        self._store.put(self._round, _KEY, encode_packet(header, to_raw(tensors)))

    def _kept(self) -> dict[str, Tensor] | None:
        """The memory as of the round that counts: what this round began with when it was done before, or the newest."""
        counts, store = self._plan.memory_round, self._store
        for data in (store.get(self._round, _KEY), store.latest(_KEY)):
            tensors = self._read(data, f"{counts}:") if data is not None else {}
            if tensors:
                return tensors
        _LOG.warning("the client's store no longer holds what it remembered in round %d: it begins anew", counts)
        return None

    def _read(self, data: bytes, prefix: str) -> dict[str, Tensor]:
        try:
            header, raw, _ = decode_packet(data, _OWN)
        except WireError as error:
            raise self._damaged(f"is damaged ({error})") from None
        tensors = from_raw({name.removeprefix(prefix): one for name, one in raw.items() if name.startswith(prefix)})
        trained = {n: one.shape for n, one in self._received.tensors.items() if group_of(n) in self._plan.trainable}
        if tensors and (_shapes(tensors) != trained or header.get("correction") != self._plan.correction):
            raise self._damaged("holds another adapter's memory")
        return tensors

    def _damaged(self, found: str) -> DataError:
        return DataError(f"the client's store in {self._store.folder} {found}; set that folder aside to start anew")


def _shapes(tensors: Tensors) -> dict[str, Any]:
    return {name: tensor.shape for name, tensor in tensors.items()}
