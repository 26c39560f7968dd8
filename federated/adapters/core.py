"""LoRA-XS: a small trained matrix between LoRA's frozen factors; the layer that runs it, and how the factors start.

    y = W x + scaling * B (R (A x)),    R rank x rank

R starts at zero, so the adapter starts as nothing. A and B never train, so what they span is all that can be learnt:
both are orthonormal, so that R alone sets the size of the update. Where they come from needs no data:

    svd     the leading singular directions of the frozen layer itself: W ~ B S A
    random  random directions

Source: Balazy et al., "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", 2024. Where we differ:
the singular values are left out of B, and R starts at zero and not at small noise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["CoredLinear", "start_factors"]

_OVERSAMPLE, _PASSES = 8, 4
"""Further directions, and rounds of subspace iteration, of the leading singular directions."""


class CoredLinear(nn.Linear):
    """``x -> R (A x)``: stands where LoRA's layer for ``factor_a`` stood, and holds a layer for R inside.

    Args:
        factor_a: rank x d_in; becomes this layer's weight as it is.
    """

    def __init__(self, factor_a: nn.Parameter) -> None:
        rank, d_in = factor_a.shape
        super().__init__(d_in, rank, bias=False, device="meta")
        self.weight = factor_a
        self.core = nn.Linear(rank, rank, bias=False, device="meta")
        self.set_core_rank(rank)

    def set_core_rank(self, rank: int) -> None:
        """Start anew with a core of zeros of that rank."""
        self.core.weight = nn.Parameter(self.weight.detach().new_zeros(rank, rank))
        self.core.in_features = self.core.out_features = rank

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """``R (A x)``."""
        product: Tensor = self.core(super().forward(input))
        return product


def start_factors(weight: Tensor, rank: int, *, init: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``factor_a`` (rank x d_in) with orthonormal rows, ``factor_b`` (d_out x rank) with orthonormal columns, float32.

    Args:
        weight: the frozen layer's, d_out x d_in (not as Conv1D stores it).
        rank: at most the layer's smaller side.
        init: ``"svd"`` or ``"random"``.
        generator: draws the random directions, or where the search for the leading ones starts.
    """
    d_out, d_in = weight.shape
    if init == "random":
        first, second = (torch.randn(size, rank, generator=generator) for size in (d_in, d_out))
        return torch.linalg.qr(first).Q.T.contiguous(), torch.linalg.qr(second).Q
    frozen = weight.detach().float()
    basis = torch.randn(d_out, min(rank + _OVERSAMPLE, d_out, d_in), generator=generator)
    for _ in range(_PASSES):
        basis = torch.linalg.qr(frozen @ torch.linalg.qr(frozen.T @ basis).Q).Q
    u, _, vh = torch.linalg.svd(basis.T @ frozen, full_matrices=False)
    return vh[:rank].contiguous(), (basis @ u[:, :rank]).contiguous()
