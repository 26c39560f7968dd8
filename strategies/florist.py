"""FLoRIST: the clients' stacked factors are decomposed; the directions that hold a share of the energy are kept.

    U S V^T = sum_k p_k s_k B_k A_k,    p = the smallest with  sum_{i <= p} S_i^2 >= threshold * sum_i S_i^2

Ramesh and Dass, "FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of Large
Language Models", 2025 (arXiv:2506.09199).

    fedpeft simulate strategy=florist
"""

from typing import Any

from federated.aggregation import make_rule
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=make_rule("florist", config.strategy.options), **parts)
