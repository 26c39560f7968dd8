"""Turning LoRA's factors: the same product in another basis, as near to a reference as it can be.

    (B R)(R^T A) = B A    for every orthogonal R

The rotation that brings a factor nearest to its reference is the orthogonal Procrustes solution (Kabsch 1976):

    min over R of |R^T A - A_ref|    or    min over R of |B R - B_ref|
    M = A A_ref^T    or    M = B^T B_ref;    M = U S V^T;    R = U diag(1, ..., 1, det(U V^T)) V^T

A rotation, never a reflection: det(R) = 1. Where M does not say (a reference of zeros, a direction that one side does
not use), R is the one nearest to leaving things as they are. Computed in float64. `federated.uploads` calls it on the
client; it knows no clients and no messages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from federated.errors import AggregationError
from federated.state import AdapterState, LoraPair, Tensors

__all__ = ["nearest_rotation", "rotation_towards", "turned"]

_UNDECIDED = 1e-10
"""Weight of the identity beside M: decides where M does not, and moves nothing where it does."""


def nearest_rotation(matrix: Tensor) -> Tensor:
    """The rotation R with the largest ``trace(R^T M)``: the one nearest to M, float64 [r, r].

    Args:
        matrix: M, finite [r, r].
    """
    wide = matrix.double()
    same = torch.eye(len(wide), dtype=torch.float64)
    scale = float(torch.linalg.matrix_norm(wide))
    if not scale:
        return same
    u, _, vh = torch.linalg.svd(wide / scale + _UNDECIDED * same)
    signs = torch.ones(len(wide), dtype=torch.float64)
    signs[-1] = torch.linalg.det(u @ vh).sign()  # the weakest direction gives way
    found: Tensor = (u * signs) @ vh
    return found


def rotation_towards(pair: LoraPair, reference: LoraPair, *, group: str, strength: float) -> Tensor:
    """R for one layer, float64 [r, r].

    Args:
        pair: the factors to turn.
        reference: where to.
        group: the factor that is brought near its reference: ``"factor_a"`` or ``"factor_b"``.
        strength: 1 turns all the way, 0 not at all; between them, the rotation nearest to ``(1 - s) I + s R``.
    """
    if group == "factor_a":
        matrix = pair.factor_a.double() @ reference.factor_a.double().T
    else:
        matrix = pair.factor_b.double().T @ reference.factor_b.double()
    found = nearest_rotation(matrix)
    if strength == 1:
        return found
    return nearest_rotation((1 - strength) * torch.eye(len(found), dtype=torch.float64) + strength * found)


def turned(received: AdapterState, delta: Tensors, *, group: str, strength: float) -> dict[str, Tensor]:
    """The delta of the same effective update from factors that are turned towards the received ones.

    Args:
        received: the adapter before training: the reference.
        delta: ``after - received``, float32; both factors of every layer must be in it.
        group: which factor is brought near; see `rotation_towards`.
        strength: in [0, 1].

    Returns:
        New float32 factors' deltas; other tensors are shared.

    Raises:
        AggregationError: if a factor is missing.
    """
    missing = sorted(name for name in _factors(received) if name not in delta)
    if missing:
        raise AggregationError(f"factors can only be turned together, and {missing[0]} is not in the update")
    after = {name: tensor.double() + delta[name].double() for name, tensor in _factors(received).items()}
    made = dict(delta)
    for pair, reference in zip(AdapterState(received.spec, after).pairs(), received.pairs(), strict=True):
        rotation = rotation_towards(pair, reference, group=group, strength=strength)
        name = pair.module.name
        made[f"{name}.factor_a"] = (rotation.T @ pair.factor_a - reference.factor_a.double()).float()
        made[f"{name}.factor_b"] = (pair.factor_b @ rotation - reference.factor_b.double()).float()
    return made


def _factors(adapter: AdapterState) -> dict[str, Tensor]:
    names = [f"{module.name}.{group}" for module in adapter.spec.modules for group in ("factor_a", "factor_b")]
    return {name: adapter.tensors[name] for name in names}
