"""FedProx: plain averaging of clients that are held near what they received.

    min_w  f_k(w) + mu / 2 ||w - w_received||^2,    A = sum_k p_k A_k,    B = sum_k p_k B_k

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020 (arXiv:1812.06127).

    fedpeft simulate strategy=fedprox
"""

from typing import Any

from federated.aggregation import make_rule
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=make_rule("fedprox", config.strategy.options), **parts)
