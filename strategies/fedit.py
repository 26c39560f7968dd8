"""FedIT: each factor is averaged on its own; the product of the means is not the mean of the products.

    A = sum_k p_k A_k,    B = sum_k p_k B_k

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", 2023 (arXiv:2305.05644).

    fedpeft simulate strategy=fedit
"""

from typing import Any

from federated.aggregation import FedIT
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=FedIT(), **parts)
