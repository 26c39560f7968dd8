"""FedNova: moves are averaged per local step, so that clients that take more steps do not pull harder.

    w <- w + tau_eff sum_k p_k d_k / tau_k,    tau_eff = sum_k p_k tau_k

Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization", NeurIPS 2020
(arXiv:2007.07481).

    fedpeft simulate strategy=fednova
"""

from typing import Any

from federated.aggregation import make_rule
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=make_rule("fednova", config.strategy.options), **parts)
