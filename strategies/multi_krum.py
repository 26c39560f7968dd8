"""Multi-Krum: the mean of the m updates that lie closest to most of the others.

    score_k = sum of |u_k - u_j|^2 over the n - f - 2 nearest j,    next = before + mean of u_k of the m lowest scores

Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017
(arXiv:1703.02757).

    fedpeft simulate strategy=multi_krum
"""

from typing import Any

from federated.aggregation import make_rule
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=make_rule("multi_krum", config.strategy.options), **parts)
