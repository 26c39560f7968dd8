"""What two versions differ in: field by field of their records, and tensor by tensor as they are stored.

Factors are compared as they are: two pairs of factors can differ and have one product. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from federated.errors import WireError
from federated.manifest import RawTensor
from federated.registry.records import VersionRecord
from federated.wire import decode_tensors

__all__ = ["Difference", "TensorChange", "difference"]


@dataclass(frozen=True)
class TensorChange:
    """One tensor in two versions.

    Args:
        name: canonical name.
        change: L2 norm of second minus first; None where one has no such tensor, or of another shape.
        norm: L2 norm of the first; 0 where it has none.
        message: why there is no change to tell; empty otherwise.
    """

    name: str
    change: float | None
    norm: float
    message: str = ""


@dataclass(frozen=True)
class Difference:
    """Two versions side by side.

    Args:
        first, second: the versions.
        ancestor: the nearest version that both descend from, or are; None where there is none.
        fields: what their records say differently: name with dots, first's value, second's value.
        tensors: all tensors that differ, by name.
        same: how many are equal, bit for bit.
        message: why the tensors could not be compared; empty otherwise.
    """

    first: VersionRecord
    second: VersionRecord
    ancestor: VersionRecord | None
    fields: tuple[tuple[str, Any, Any], ...]
    tensors: tuple[TensorChange, ...]
    same: int
    message: str = ""

    @property
    def relative(self) -> float:
        """Length of the change over the length of the first's tensors, of those that both have."""
        common = [one for one in self.tensors if one.change is not None]
        length = math.sqrt(math.fsum(one.norm**2 for one in common))
        return math.sqrt(math.fsum((one.change or 0.0) ** 2 for one in common)) / length if length else math.inf


def difference(
    lines: tuple[Sequence[VersionRecord], Sequence[VersionRecord]], weights: tuple[bytes, bytes]
) -> Difference:
    """Compare the newest of two lineages.

    Args:
        lines: each version with its ancestors, newest first.
        weights: their bytes.
    """
    first, second = lines[0][0], lines[1][0]
    ids = {record.version_id for record in lines[1]}
    ancestor = next((record for record in lines[0] if record.version_id in ids), None)
    flat = _flat(first.manifest.to_dict()), _flat(second.manifest.to_dict())
    names = [name for name in sorted({*flat[0], *flat[1]}) if flat[0].get(name) != flat[1].get(name)]
    fields = tuple((name, flat[0].get(name), flat[1].get(name)) for name in names)
    try:
        before, after = decode_tensors(weights[0]), decode_tensors(weights[1])
    except WireError as error:
        return Difference(first, second, ancestor, fields, (), 0, f"the tensors cannot be compared: {error}")
    every = sorted({*before, *after})
    changed = [name for name in every if not _equal(before.get(name), after.get(name))]
    tensors = tuple(_change(name, before.get(name), after.get(name)) for name in changed)
    return Difference(first, second, ancestor, fields, tensors, len(every) - len(changed))


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A record's leaves, by name with dots; lists stay whole."""
    leaves: dict[str, Any] = {}
    for key, part in value.items():
        if isinstance(part, Mapping):
            leaves |= _flat(part, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = part
    return leaves


def _equal(before: RawTensor | None, after: RawTensor | None) -> bool:
    if before is None or after is None:
        return False
    return before.entry("") == after.entry("") and bytes(before.data) == bytes(after.data)


def _change(name: str, before: RawTensor | None, after: RawTensor | None) -> TensorChange:
    if before is None:
        return TensorChange(name, None, 0.0, "only in the second")
    old = before.array.astype(np.float64)
    norm = float(np.linalg.norm(old))
    if after is None:
        return TensorChange(name, None, norm, "only in the first")
    if before.shape != after.shape:
        return TensorChange(name, None, norm, f"shape {list(before.shape)}, then {list(after.shape)}")
    return TensorChange(name, float(np.linalg.norm(after.array.astype(np.float64) - old)), norm)
