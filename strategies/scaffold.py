"""SCAFFOLD: gradients are corrected by how a client's differ from everybody's.

    w <- w - eta (grad + c - c_k),    c_k <- c_k - c + (w_received - w) / (K eta),    c = sum_k p_k c_k

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020 (arXiv:1910.06378).
It needs SGD without momentum:

    fedpeft simulate strategy=scaffold
"""

from typing import Any

from federated.aggregation import Scaffold
from federated.config import ExperimentConfig
from federated.flower import DeltaStrategy


def make(config: ExperimentConfig, **parts: Any) -> DeltaStrategy:
    """The strategy; ``parts`` are those of `DeltaStrategy` (initial, base_digest, registry, tracker ...)."""
    return DeltaStrategy(config, rule=Scaffold(), **parts)
