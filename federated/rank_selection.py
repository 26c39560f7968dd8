"""The ranks of an adapter that matter most to a client, and nothing of the others (LoRA-A2).

In a round that trains B, rank ``i`` of a layer is column ``i`` of B, and scores what it did to the layer's update; in
a round that trains A it is row ``i`` of A:

    score_i = scaling * ||dB[:, i] A[i, :]||_F = scaling * ||dB[:, i]|| ||A[i, :]||      (and ||B[:, i]|| ||dA[i, :]||)

All ranks of all layers are ranked together; the best are sent while they fit into the room of ``budget`` ranks in every
layer. Where layers are equally wide, that is the ``budget * N`` best of N layers; where they are not, a rank that does
not fit any more is passed over. What travels is ``ranks:chosen`` (uint8, a bit for each rank, in the order of layers'
names) and ``ranks:values`` (float32, the columns or rows one after the other, then zeros), both of a size known
beforehand.

Pure tensors; `federated.uploads` calls it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from federated.errors import WireError
from federated.manifest import TensorEntry, TensorLayout
from federated.state import AdapterState, LoraPair, Tensors

__all__ = ["chosen_layout", "expand", "scores", "select"]

_VALUES, _CHOSEN = "ranks:values", "ranks:chosen"


def chosen_layout(received: AdapterState, factor: str, budget: int) -> TensorLayout:
    """The two tensors that stand for one factor of all layers.

    Args:
        received: the adapter that the client was sent.
        factor: ``"factor_a"`` or ``"factor_b"``: the one that is trained.
        budget: ranks per layer that there is room for.
    """
    pairs = list(_pairs(received))
    count = sum(pair.module.rank for pair in pairs)
    return (
        TensorEntry(_CHOSEN, (math.ceil(count / 8),), "U8"),
        TensorEntry(_VALUES, (_room(pairs, factor, budget),), "F32"),
    )


def scores(received: AdapterState, factor: str, delta: Tensors) -> Tensor:
    """What each rank did to its layer's effective update, float64, in the order of layers' names.

    What is not a number scores highest: it is sent, and refused by name, not hidden.
    """
    found = [_layer_scores(pair, factor, delta[f"{pair.module.name}.{factor}"]) for pair in _pairs(received)]
    return torch.nan_to_num(torch.cat(found), nan=math.inf, posinf=math.inf)


def select(received: AdapterState, factor: str, delta: Tensors, *, budget: int) -> dict[str, Tensor]:
    """The best ranks of a trained factor, as the two tensors of `chosen_layout`; of equal ones the first are taken.

    Privacy:
        What is returned is computed from private data, which ranks were chosen included.
    """
    pairs = list(_pairs(received))
    rows = [row for pair in pairs for row in _ranks(factor, delta[f"{pair.module.name}.{factor}"])]
    order = torch.argsort(scores(received, factor, delta), descending=True, stable=True).tolist()
    left, chosen = _room(pairs, factor, budget), np.zeros(len(rows), dtype=np.uint8)
    values = torch.zeros(left)
    for index in order:
        if len(rows[index]) <= left:
            chosen[index], left = 1, left - len(rows[index])
    taken = torch.cat([rows[index] for index in np.flatnonzero(chosen)])
    values[: len(taken)] = taken
    return {_VALUES: values, _CHOSEN: torch.from_numpy(np.packbits(chosen, bitorder="little"))}


def expand(received: AdapterState, factor: str, tensors: Tensors) -> dict[str, Tensor]:
    """The whole factor again, zero in the ranks that were not sent; other tensors come back as they are.

    Raises:
        WireError: if more ranks are marked than there are or than there is room for, or values are left over.
    """
    pairs, values = list(_pairs(received)), tensors[_VALUES]
    widths = [_width(pair, factor) for pair in pairs for _ in range(pair.module.rank)]
    bits = np.unpackbits(tensors[_CHOSEN].numpy(), bitorder="little")
    chosen = np.flatnonzero(bits)
    if bits[len(widths) :].any():
        raise WireError(f"a rank beyond the adapter's {len(widths)} is marked")
    used = sum(widths[index] for index in chosen)
    if used > len(values) or values[used:].any():
        raise WireError(f"the marked ranks hold {used} values; expected at most {len(values)}, and zeros after them")
    parts = torch.split(values[:used], [widths[index] for index in chosen])
    sent = dict(zip(chosen.tolist(), parts, strict=True))
    others = {name: tensor for name, tensor in tensors.items() if name not in (_VALUES, _CHOSEN)}
    return others | _whole(pairs, factor, [sent.get(index, torch.zeros(width)) for index, width in enumerate(widths)])


def _whole(pairs: Sequence[LoraPair], factor: str, rows: Sequence[Tensor]) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    start = 0
    for pair in pairs:
        stacked = torch.stack(list(rows[start : start + pair.module.rank]))
        made[f"{pair.module.name}.{factor}"] = stacked if factor == "factor_a" else stacked.T.contiguous()
        start += pair.module.rank
    return made


def _pairs(received: AdapterState) -> Iterator[LoraPair]:
    return iter(sorted(received.pairs(), key=lambda pair: pair.module.name))


def _ranks(factor: str, tensor: Tensor) -> Tensor:
    """One row for each rank."""
    return tensor if factor == "factor_a" else tensor.T


def _width(pair: LoraPair, factor: str) -> int:
    return pair.module.d_in if factor == "factor_a" else pair.module.d_out


def _room(pairs: Sequence[LoraPair], factor: str, budget: int) -> int:
    return sum(min(budget, pair.module.rank) * _width(pair, factor) for pair in pairs)


def _layer_scores(pair: LoraPair, factor: str, delta: Tensor) -> Tensor:
    still = pair.factor_b.T if factor == "factor_a" else pair.factor_a
    moved: Tensor = torch.linalg.vector_norm(_ranks(factor, delta).double(), dim=1)
    held: Tensor = torch.linalg.vector_norm(still.double(), dim=1)
    return moved * held * pair.scaling
