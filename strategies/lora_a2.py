"""LoRA-A2: B and A in turns; of the factor that is trained, only the ranks that did most go up.

    B <- B + sum_k p_k dB_k M_k,    M_k: the rank * N best of all N layers by ||dB_k[:, i] A[i, :]||_F;    then A alike

Koo et al., "Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous Clients", ACL 2025
(arXiv:2410.22815).

    fedpeft simulate strategy=lora_a2
"""

from typing import Any

from federated.aggregation import make_rule
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=make_rule("lora_a2", config.strategy.options), **parts)
