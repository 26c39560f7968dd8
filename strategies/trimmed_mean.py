"""Trimmed mean: each coordinate is the mean of what the clients send, without the f smallest and the f largest.

    next_i = before_i + mean of u_k,i without its f smallest and f largest values

Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018 (arXiv:1803.01498).

    fedpeft simulate strategy=trimmed_mean
"""

from typing import Any

from federated.aggregation import make_rule
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=make_rule("trimmed_mean", config.strategy.options), **parts)
