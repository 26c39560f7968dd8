"""FlexLoRA: the products are averaged, and the mean's best approximation of the adapter's rank is given back.

    dW = sum_k p_k scaling * B_k A_k,    U S V^T = dW,    B A = U_r S_r V_r^T / scaling

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
NeurIPS 2024 (arXiv:2402.11505).

    fedpeft simulate strategy=flexlora
    fedpeft simulate strategy=flexlora strategy.options.error_feedback=true
"""

from typing import Any

from federated.aggregation import make_rule
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=make_rule("flexlora", config.strategy.options), **parts)
