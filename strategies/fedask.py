"""FedASK: two sketches of the mean product, in two exchanges, give its best approximation of the adapter's rank.

    Q = qr(sum_k p_k s_k B_k (A_k Omega)),    U S V^T = Q (sum_k p_k s_k A_k^T (B_k^T Q))^T,    B A = U_r S_r V_r^T / s

Wen et al., "Differentially Private Federated Low Rank Adaptation Beyond Fixed-Matrix", 2025 (arXiv:2507.09990).

    fedpeft simulate strategy=fedask
    fedpeft simulate strategy=fedask adapter.client_ranks=[2,4,8] strategy.options.oversample=16
"""

from typing import Any

from federated.aggregation import make_rule
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=make_rule("fedask", config.strategy.options), **parts)
