"""The clipped sum of examples' gradients: what one example can add is bounded, whatever it is.

    sum_i g_i * min(1, C / ||g_i||)        ||.|| over all trained tensors together

An example whose gradient is not finite adds nothing: it would add NaN whatever it is multiplied by. Its norm is NaN in
what is returned, for those that look; nobody else is told.

Source: Abadi et al., "Deep Learning with Differential Privacy", 2016, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ClippedSum", "clipped_sum"]


@dataclass(frozen=True)
class ClippedSum:
    """What `clipped_sum` gives.

    Args:
        tensors: by name, [*shape], the dtype of the gradients.
        norms: of each example before it was clipped, float64 [n]; NaN where a gradient was not finite.

    Privacy: both are private.
    """

    tensors: Mapping[str, Tensor]
    norms: Tensor


def clipped_sum(gradients: Mapping[str, Tensor], clip_norm: float) -> ClippedSum:
    """Clip each example over all tensors together, and add up.

    Args:
        gradients: [n, *shape] by name; rows that are not finite are overwritten.
        clip_norm: C, positive.
    """
    rows = {name: gradient.reshape(len(gradient), -1) for name, gradient in gradients.items()}
    norms = _norms(rows, torch.float32)
    if not bool(norms.isfinite().all()):  # a square may be too large for float32 where the gradient is not
        norms = _norms(rows, torch.float64)
        for one in rows.values():
            one[~norms.isfinite()] = 0.0
        norms[~norms.isfinite()] = torch.nan
    factors = (clip_norm / norms.clamp(min=clip_norm)).nan_to_num(nan=0.0)
    made = {name: (factors.to(one.dtype) @ one).view(gradients[name].shape[1:]) for name, one in rows.items()}
    return ClippedSum(made, norms)


def _norms(rows: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """L2 norm of each example, float64 [n]."""
    parts = [torch.linalg.vector_norm(one, dim=1, dtype=torch.promote_types(one.dtype, dtype)) for one in rows.values()]
    return torch.linalg.vector_norm(torch.stack(parts).double(), dim=0)
