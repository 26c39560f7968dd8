"""Updates on disk until all are there: for rules that must take them in one order, or more than one at a time.

Sums do not need it. A rule that factorises does: QR and SVD round differently in another order, so updates are read
back in the order of client ids, one tensor at a time. The file has no name and is gone with the process.
"""

from __future__ import annotations

import math
import tempfile
import weakref
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from federated.errors import AggregationError
from federated.state import Tensors

__all__ = ["Spool"]


class Spool:
    """Tensors of many clients in one temporary file, as float32."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        weakref.finalize(self, self._file.close)
        self._places: dict[str, Mapping[str, tuple[int, torch.Size]]] = {}

    @property
    def client_ids(self) -> list[str]:
        """Who is in it, in canonical order."""
        return sorted(self._places)

    def put(self, client_id: str, tensors: Tensors) -> None:
        """Keep one client's tensors.

        Raises:
            AggregationError: for a client that is in it already, or if the disk refuses; nothing is kept then.
        """
        if client_id in self._places:
            raise AggregationError(f"two updates of {client_id} in one round: expected one")
        places: dict[str, tuple[int, torch.Size]] = {}
        try:
            place = self._file.seek(0, 2)
            for name, tensor in tensors.items():
                places[name] = place, tensor.shape
                place += self._file.write(tensor.detach().float().contiguous().numpy().tobytes())
            self._file.flush()
        except OSError as error:
            raise AggregationError(f"cannot keep the update of {client_id} on disk: {error.strerror}") from None
        self._places[client_id] = places

    def get(self, client_id: str, name: str) -> Tensor:
        """One tensor, a float32 copy."""
        place, shape = self._places[client_id][name]
        self._file.seek(place)
        data = bytearray(self._file.read(4 * math.prod(shape)))
        return torch.from_numpy(np.frombuffer(data, dtype=np.float32).reshape(shape))

    def stacked(self, name: str) -> Tensor:
        """One tensor of all clients, float64 [n, ...], in canonical order."""
        return torch.stack([self.get(client_id, name).double() for client_id in self.client_ids])
