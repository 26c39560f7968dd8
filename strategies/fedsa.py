"""FedSA-LoRA: A is averaged; B and the head are each client's own and never leave it.

    A = sum_k p_k A_k;    client k goes on from  scaling * B_k A

Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025 (arXiv:2410.01463).

    fedpeft simulate strategy=fedsa
"""

from typing import Any

from federated.aggregation import FedSALoRA
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=FedSALoRA(), **parts)
