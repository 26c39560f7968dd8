"""Sketches of effective updates: a few random columns of ``W = scaling * B A``, and what of W lies over given rows.

    sketch       Y = W Omega = scaling * B (A Omega)             d_out x c
    projection   Z = W^T Q   = scaling * A^T (B^T Q)             d_in x c

Both are linear in W: the sum over clients of any ranks is the sketch of their sum, and W is never formed. Where c
covers the rank of a sum, an orthonormal basis Q of its sketch gives the sum back: ``W = Q Z^T`` (Halko, Martinsson and
Tropp 2011, section 5). Clients make Omega from a shared seed. Called by `federated.uploads`; knows no clients.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from federated.errors import AggregationError
from federated.lowrank import LowRank, effective
from federated.manifest import AdapterSpec, ModuleSpec, TensorEntry, digest_of
from federated.state import AdapterState, Tensors

__all__ = ["columns_of", "omega", "projected", "projection_layout", "rebuilt", "sketch_layout", "sketched"]

_BASIS, _PROJECTION, _SKETCH = "basis", "projection", "sketch"


def columns_of(module: ModuleSpec, columns: int) -> int:
    """How many columns a layer's sketch has: no more than its smaller side, which covers everything."""
    return min(columns, module.d_in, module.d_out)


def omega(seed: int, module: ModuleSpec, columns: int) -> Tensor:
    """The test matrix of one layer: orthonormal columns that span a Gaussian sample, float64 [d_in, c].

    Orthonormal, because only the span counts, and a square Gaussian may be all but singular. The numbers come from a
    generator whose stream numpy promises never to change: clients with other versions draw the same.

    Args:
        seed: shared by all clients; other layers draw others.
        module: the layer.
        columns: as asked for, see `columns_of`.
    """
    words = [int(digest_of([seed, module.name])[start : start + 8], 16) for start in range(0, 32, 8)]
    drawn = np.random.RandomState(words).standard_normal((module.d_in, columns_of(module, columns)))
    found: Tensor = torch.linalg.qr(torch.from_numpy(drawn)).Q
    return found


def sketch_layout(spec: AdapterSpec, columns: int) -> list[TensorEntry]:
    """Names and shapes of an adapter's sketches."""
    return [TensorEntry(f"{one.name}.{_SKETCH}", (one.d_out, columns_of(one, columns)), "F32") for one in spec.modules]


def sketched(adapter: AdapterState, *, columns: int, seed: int) -> dict[str, Tensor]:
    """Y of every layer, float32."""
    made = {}
    for pair in adapter.pairs():
        product = effective(pair)
        mixed = product.left @ (product.right @ omega(seed, pair.module, columns))
        made[f"{pair.module.name}.{_SKETCH}"] = mixed.float()
    return made


def projection_layout(spec: AdapterSpec, bases: Tensors) -> list[TensorEntry]:
    """Names and shapes of an adapter's projections."""
    return [
        TensorEntry(f"{one.name}.{_PROJECTION}", (one.d_in, _basis(bases, one).shape[1]), "F32") for one in spec.modules
    ]


def projected(adapter: AdapterState, bases: Tensors) -> dict[str, Tensor]:
    """Z of every layer, float32.

    Args:
        adapter: what is projected.
        bases: ``<layer>.basis`` to Q, d_out x c.

    Raises:
        AggregationError: if a layer's basis is missing, or does not fit.
    """
    made = {}
    for pair in adapter.pairs():
        product, basis = effective(pair), _basis(bases, pair.module).double()
        made[f"{pair.module.name}.{_PROJECTION}"] = (product.right.T @ (product.left.T @ basis)).float()
    return made


def _basis(bases: Tensors, module: ModuleSpec) -> Tensor:
    basis = bases.get(f"{module.name}.{_BASIS}")
    if basis is None or basis.ndim != 2 or basis.shape[0] != module.d_out:
        found = "none" if basis is None else f"shape {tuple(basis.shape)}"
        raise AggregationError(f"basis of layer {module.name}: found {found}, expected {module.d_out} rows")
    return basis


def rebuilt(basis: Tensor, projection: Tensor) -> LowRank:
    """What is known of W: its projection ``Q (Q^T Q)^-1 Z^T`` onto the columns of Q.

    Args:
        basis: Q as it was sent, [d_out, c]: orthonormal up to the rounding of its dtype, which the inverse makes good.
        projection: Z, float64 [d_in, c].
    """
    left, mix = torch.linalg.qr(basis.double())
    return LowRank(left, torch.linalg.solve_triangular(mix.T, projection.T, upper=False))
