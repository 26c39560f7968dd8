"""Flower: the strategy, client handlers, and engines. The only room that imports flwr.

A plain Flower ServerApp needs `DeltaStrategy`, a plain ClientApp `handle_query` and `handle_train`.
"""

from flwr.clientapp import ClientApp

from federated.flower.client import handle_query, handle_train
from federated.flower.engines import simulate
from federated.flower.inprocess import InProcessGrid
from federated.flower.publisher import Publisher, RegistryPublisher, TrainingState
from federated.flower.run import Run, RunSummary
from federated.flower.selection import select_cohort
from federated.flower.session import Session, open_session, use_app_folder
from federated.flower.strategy import DeltaStrategy

__all__ = [
    "ClientApp",
    "DeltaStrategy",
    "InProcessGrid",
    "Publisher",
    "RegistryPublisher",
    "Run",
    "RunSummary",
    "Session",
    "TrainingState",
    "handle_query",
    "handle_train",
    "open_session",
    "select_cohort",
    "simulate",
    "use_app_folder",
]
