"""HetLoRA: clients train the first r_k rows; padded with zeros, they are averaged by the norm of each update.

    A = sum_k w_k pad(A_k),    B = sum_k w_k pad(B_k),    w_k = ||dW_k|| / sum_j ||dW_j||,    dW_k = s_k B_k A_k

Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP 2024
(arXiv:2401.06432).

    fedpeft simulate strategy=hetlora
    fedpeft simulate strategy=hetlora adapter.client_ranks=[2,4,8] strategy.options.prune_gamma=0.75
"""

from typing import Any

from federated.aggregation import make_rule
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=make_rule("hetlora", config.strategy.options), **parts)
