"""FedRot-LoRA: clients turn their factors towards the received ones, so that like updates do not cancel in the mean.

    R_k = rotation that brings R^T A_k nearest to A_ref, or B_k R nearest to B_ref, in turns
    A = sum_k p_k R_k^T A_k,    B = sum_k p_k B_k R_k

Zhang et al., "FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA", ICML 2026 (arXiv:2602.23638).

    fedpeft simulate strategy=fedrot
    fedpeft simulate strategy=fedrot strategy.options.strength=0.5
"""

from typing import Any

from federated.aggregation import make_rule
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=make_rule("fedrot", config.strategy.options), **parts)
