"""FLoRA: the clients' factors are stacked, so that the sum of their products is exact, and frozen beside the adapter.

    dW = [p_1 s_1 B_1 | p_2 s_2 B_2 | ...] [A_1 ; A_2 ; ...],    residual <- residual + dW,    A fresh, B = 0

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations", NeurIPS 2024
(arXiv:2409.05976).

    fedpeft simulate strategy=flora
"""

from typing import Any

from federated.aggregation import make_rule
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=make_rule("flora", config.strategy.options), **parts)
