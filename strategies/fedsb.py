"""Fed-SB: only a small core between frozen, shared factors is trained, and averaged exactly.

    dW = scaling * B R A;    R = sum_k p_k R_k

Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated
LoRA Fine-Tuning", 2025 (arXiv:2502.15436).

    fedpeft simulate strategy=fedsb
"""

from typing import Any

from federated.aggregation import FedSB
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=FedSB(), **parts)
