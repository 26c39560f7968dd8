"""Bulyan: Krum picks n - 2 f updates, then each coordinate is averaged around its median.

    next_i = before_i + mean of the n - 4 f picked values u_k,i that are nearest to their median

El Mhamdi, Guerraoui and Rouault, "The Hidden Vulnerability of Distributed Learning in Byzantium", ICML 2018
(arXiv:1802.07927).

    fedpeft simulate strategy=bulyan
"""

from typing import Any

from federated.aggregation import make_rule
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=make_rule("bulyan", config.strategy.options), **parts)
