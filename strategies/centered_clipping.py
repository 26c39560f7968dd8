"""Centred clipping: a pull towards each update, by no more than a radius, and again from there.

    v <- v + 1/n sum_k (u_k - v) min(1, tau / |u_k - v|),    next = before + v

Karimireddy, He and Jaggi, "Learning from History for Byzantine Robust Optimization", ICML 2021 (arXiv:2012.10333).

    fedpeft simulate strategy=centered_clipping
"""

from typing import Any

from federated.aggregation import make_rule
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=make_rule("centered_clipping", config.strategy.options), **parts)
