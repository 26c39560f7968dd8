"""Some of the entries of many tensors, as two: their values, and where they belong.

The factors of an adapter are laid end to end, in the order of their names, as one flat array of ``n`` entries. What
travels is ``sparse:values`` (k entries) and ``sparse:positions`` (uint8, see `federated.wire.positions`), with
``k = ceil(density * n)`` known to both sides beforehand. All the other tensors of an adapter stay as they are.

Pure tensors: `federated.uploads` uses it on the way up, `federated.flower.records` on the way down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from federated.errors import WireError
from federated.manifest import AdapterSpec, TensorEntry, TensorLayout
from federated.state import Tensors, group_of
from federated.wire import decode_positions, encode_positions, positions_bytes

__all__ = ["Shapes", "count_of", "factor_shapes", "fill", "largest", "masked", "sparse_layout", "split", "thin"]

Shapes = Mapping[str, tuple[int, ...]]

_VALUES, _POSITIONS = "sparse:values", "sparse:positions"


def count_of(density: float, size: int) -> int:
    """``ceil(density * size)``, at least 1, safe from what floats add to a whole number.

    >>> count_of(0.07, 100), count_of(0.25, 10), count_of(0.001, 10)
    (7, 3, 1)
    """
    return max(1, math.ceil(density * size - 1e-9 * size))


def factor_shapes(spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's factors by canonical name."""
    shapes: dict[str, tuple[int, ...]] = {f"{one.name}.factor_a": (one.rank, one.d_in) for one in spec.modules}
    return shapes | {f"{one.name}.factor_b": (one.d_out, one.rank) for one in spec.modules}


def sparse_layout(shapes: Shapes, density: float) -> TensorLayout:
    """The two tensors that stand for these, in float32."""
    size = _size(shapes)
    count = count_of(density, size)
    positions = TensorEntry(_POSITIONS, (positions_bytes(count, size),), "U8")
    return positions, TensorEntry(_VALUES, (count,), "F32")


def largest(tensors: Tensors, density: float) -> Tensor:
    """The positions of the entries of largest magnitude, int64 [k], ascending; of equal ones the first are taken.

    What is not a number counts as largest: it is sent, and refused by name, not hidden.
    """
    flat = _flat(tensors).abs().float().numpy()
    flat = np.where(np.isnan(flat), np.inf, flat)
    count = count_of(density, len(flat))
    bound = np.partition(flat, len(flat) - count)[len(flat) - count]
    above = flat > bound
    ties = np.flatnonzero(flat == bound)[: count - int(above.sum())]
    above[ties] = True
    return torch.from_numpy(np.flatnonzero(above))


def masked(tensors: Tensors, density: float) -> dict[str, Tensor]:
    """The same tensors with all but their largest entries set to zero; new tensors of the same dtype."""
    flat, chosen = _flat(tensors), largest(tensors, density)
    kept = torch.zeros_like(flat)
    kept[chosen] = flat[chosen]
    return _cut(kept, {name: tuple(tensor.shape) for name, tensor in tensors.items()})


def thin(tensors: Tensors, density: float | None = None) -> dict[str, Tensor]:
    """Values and positions of the largest entries; with no density, of all that are not zero, to the last bit."""
    flat = _flat(tensors)
    chosen = largest(tensors, density) if density else (flat.ne(0) | flat.signbit()).nonzero().flatten()  # -0.0 too
    chosen = chosen if len(chosen) else torch.zeros(1, dtype=torch.int64)  # no tensor on the wire is empty
    bits = encode_positions(chosen.numpy(), len(flat))
    return {_VALUES: flat[chosen], _POSITIONS: torch.from_numpy(bits)}


def fill(tensors: Tensors, shapes: Shapes) -> dict[str, Tensor]:
    """The tensors of these shapes, with zeros where no value was sent; what is not sparse comes back as it is.

    Args:
        tensors: with those of `thin`, from anybody.
        shapes: of the tensors that they stand for.

    Raises:
        WireError: if values and positions are missing, of another kind, or do not fit these shapes.
    """
    if not {_VALUES, _POSITIONS} <= tensors.keys():
        raise WireError("the sparse values or their positions are missing")
    values, bits = tensors[_VALUES], tensors[_POSITIONS]
    if values.ndim != 1 or not values.dtype.is_floating_point or bits.ndim != 1 or bits.dtype != torch.uint8:
        raise WireError("sparse values are one row of floats, and their positions one row of bytes")
    positions = decode_positions(bits.numpy(), len(values), _size(shapes))
    flat = torch.zeros(_size(shapes), dtype=values.dtype)
    flat[torch.from_numpy(positions)] = values
    others = {name: tensor for name, tensor in tensors.items() if name not in (_VALUES, _POSITIONS)}
    return others | _cut(flat, shapes)


def split(tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The factors, and everything else."""
    factors = {name: tensor for name, tensor in tensors.items() if group_of(name) != "dense"}
    return factors, {name: tensor for name, tensor in tensors.items() if name not in factors}


def _size(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _flat(tensors: Tensors) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def _cut(flat: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    start = 0
    for name in sorted(shapes):
        end = start + math.prod(shapes[name])
        made[name] = flat[start:end].reshape(shapes[name])
        start = end
    return made
