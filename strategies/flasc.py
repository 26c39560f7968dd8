"""FLASC: clients receive the largest entries of the adapter, train all of them, and send those that moved most.

    received_k = top(w, density_down),    w <- w + Adam(sum_k p_k top(d_k, density_up))

Kuo et al., "Federated LoRA with Sparse Communication", 2024 (arXiv:2406.05233).

    fedpeft simulate strategy=flasc
"""

from typing import Any

from federated.aggregation import make_rule
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=make_rule("flasc", config.strategy.options), **parts)
