"""FedEx-LoRA: each factor is averaged on its own, and what that gets wrong goes into a frozen residual.

    A = sum_k p_k A_k,    B = sum_k p_k B_k,    residual <- residual + sum_k p_k s B_k A_k - s B A

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models", ACL 2025
(arXiv:2410.09432).

    fedpeft simulate strategy=fedex
"""

from typing import Any

from federated.aggregation import make_rule
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=make_rule("fedex", config.strategy.options), **parts)
