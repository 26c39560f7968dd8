"""RoLoRA: B and A are trained in turns; the factor that rests is the same everywhere, so each mean is exact.

    odd turns  B A = sum_k p_k B_k A,    even turns  B A = sum_k p_k B A_k

Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", 2025 (arXiv:2502.01755).

    fedpeft simulate strategy=rolora
"""

from typing import Any

from federated.aggregation import RoLoRA
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=RoLoRA(), **parts)
