"""Flower: the strategy, client handlers, and engines. The only room that imports flwr.

A plain Flower ServerApp needs `DeltaStrategy`, a plain ClientApp `handle_query` and `handle_train`. A name is loaded
when it is asked for: a device that is only asked who it is, or says "not now", loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

    from federated.flower.client import handle_query, handle_train
    from federated.flower.engines import simulate
    from federated.flower.folders import use_app_folder
    from federated.flower.inprocess import InProcessGrid
    from federated.flower.publisher import Publisher, RegistryPublisher, TrainingState
    from federated.flower.run import Run, RunSummary
    from federated.flower.selection import select_cohort
    from federated.flower.session import Session, open_session
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

_HOMES = {
    "ClientApp": "flwr.clientapp",
    "DeltaStrategy": "federated.flower.strategy",
    "InProcessGrid": "federated.flower.inprocess",
    "Publisher": "federated.flower.publisher",
    "RegistryPublisher": "federated.flower.publisher",
    "Run": "federated.flower.run",
    "RunSummary": "federated.flower.run",
    "Session": "federated.flower.session",
    "TrainingState": "federated.flower.publisher",
    "handle_query": "federated.flower.client",
    "handle_train": "federated.flower.client",
    "open_session": "federated.flower.session",
    "select_cohort": "federated.flower.selection",
    "simulate": "federated.flower.engines",
    "use_app_folder": "federated.flower.folders",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
