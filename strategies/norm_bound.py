"""Norm bounding: updates that are too large are shrunk, then all are averaged.

    next = before + 1/n sum_k u_k min(1, c / |u_k|)

Sun et al., "Can You Really Backdoor Federated Learning?", 2019 (arXiv:1911.07963).

    fedpeft simulate strategy=norm_bound
"""

from typing import Any

from federated.aggregation import make_rule
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=make_rule("norm_bound", config.strategy.options), **parts)
