"""FedDyn: each client's loss gets a linear term, so that all clients stop at one point.

    min_w  f_k(w) - <g_k, w> + alpha / 2 ||w - w_received||^2,    w <- w + sum_k p_k d_k - h / alpha

Acar et al., "Federated Learning Based on Dynamic Regularization", ICLR 2021 (arXiv:2111.04263).

    fedpeft simulate strategy=feddyn
"""

from typing import Any

from federated.aggregation import make_rule
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=make_rule("feddyn", config.strategy.options), **parts)
