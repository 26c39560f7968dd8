"""FedSVD: B is averaged under a shared A, then both are made anew from the product: A with orthonormal rows.

    B = sum_k p_k B_k;    U S V^T = B A;    A <- V^T,  B <- U S

Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", 2025 (arXiv:2505.12805).

    fedpeft simulate strategy=fedsvd
"""

from typing import Any

from federated.aggregation import FedSVD
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=FedSVD(), **parts)
