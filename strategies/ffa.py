"""FFA-LoRA: A is frozen and the same everywhere, B is averaged; the mean of the products is then exact.

    scaling * (sum_k p_k B_k) A_0 = sum_k p_k (scaling * B_k A_0)

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024 (arXiv:2403.12313).

    fedpeft simulate strategy=ffa
"""

from typing import Any

from federated.aggregation import FFALoRA
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=FFALoRA(), **parts)
