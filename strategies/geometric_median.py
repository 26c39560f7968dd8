"""Geometric median (RFA): the point with the smallest sum of distances to the updates, by smoothed Weiszfeld.

    v <- sum_k w_k u_k,  w_k ~ 1 / max(nu, |u_k - v|),    next = before + v

Pillutla, Kakade and Harchaoui, "Robust Aggregation for Federated Learning", IEEE TSP 2022 (arXiv:1912.13445).

    fedpeft simulate strategy=geometric_median
"""

from typing import Any

from federated.aggregation import make_rule
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=make_rule("geometric_median", config.strategy.options), **parts)
