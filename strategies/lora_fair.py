"""LoRA-FAIR: the factors are averaged, then B is corrected so that the product comes close to the mean of the products.

    A = sum_k p_k A_k,  B = sum_k p_k B_k,  dB = argmin 1 - cos(sum_k p_k B_k A_k, (B + dB) A) + strength * ||dB||^2

Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement", ICCV 2025
(arXiv:2411.14961).

    fedpeft simulate strategy=lora_fair
    fedpeft simulate strategy=lora_fair strategy.options.objective=ridge
"""

from typing import Any

from federated.aggregation import make_rule
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=make_rule("lora_fair", config.strategy.options), **parts)
