"""Central training: the same adapter on pooled rows, published like any other version.

For a server that holds pooled or synthetic data of its own, and as the upper line that a federation is measured
against. It makes two versions: the initial adapter (v0) and the trained one (v1, method ``central``).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from federated import server_optimizers
from federated.config import ExperimentConfig
from federated.errors import ConfigError
from federated.flower.baselines import evaluate_everywhere, full_session, train_on
from federated.flower.publisher import RegistryPublisher, TrainingState
from federated.flower.run import Run, RunSummary, run_trackers
from federated.flower.session import Session
from federated.global_state import GlobalState
from federated.registry import Registry
from federated.state import AdapterState

__all__ = ["publish_central", "train_centrally"]


def train_centrally(config: ExperimentConfig) -> RunSummary:
    """Train on every client's rows pooled, measure on the held-out rows, publish.

    Args:
        config: an experiment; it trains ``rounds * train.epochs`` passes with all cores.

    Raises:
        FederatedError: for whatever cannot run; nothing is published then.
    """
    if config.privacy.enabled:
        raise ConfigError(
            "privacy protects what clients send, and central training has all rows in one place: nothing would be "
            "protected; use privacy=none"
        )
    run = Run(config)
    session = full_session(run.config)
    with run.open_registry() as registry, run_trackers(run.folder, run.config) as tracker:
        registry.require_base(session.adapter.base.base_digest)
        start = run.start(registry)
        session = replace(session, initial=start.adapter)
        tracker.emit({**run.description("central"), "rounds": 1})
        tracker.emit({"event": "round_start", "round_number": 1, "cohort": ["pooled"], "version_id": None})
        began = time.perf_counter()
        before, _ = evaluate_everywhere(session, session.initial)
        state, metrics = train_on(session, session.source.client_ids, name="central", threads=torch.get_num_threads())
        after, _ = evaluate_everywhere(session, state)
        parent, version = publish_central(
            registry, session, state, run_id=run.run_id, metrics={**_prefixed(after), **metrics}, parent=start.parent
        )
        tracker.emit(
            {
                "event": "round",
                "round_number": 1,
                "participants": 0,
                "cohort": 0,
                "published": True,
                "version_id": version,
                "parent": parent,
                "train_loss": metrics["train_loss"],
                "seconds": round(time.perf_counter() - began, 2),
                "bytes_up": 0,
                "bytes_down": 0,
                "refused": [],
                "evaluation": {**before, "version_id": parent},
            }
        )
        tracker.emit({"event": "final", "version_id": version, "evaluation": after})
        run.warn(tracker)
        tracker.emit({"event": "end", "status": "completed", "message": ""})
        run.leave(registry)
        return run.summary(registry, version)


def publish_central(
    registry: Registry,
    session: Session,
    state: AdapterState,
    *,
    run_id: str,
    metrics: Mapping[str, float],
    parent: str | None = None,
) -> tuple[str, str]:
    """Publish the initial and the trained adapter of a central run; returns their version ids.

    Args:
        registry: open.
        session: with the whole config, see `full_session`.
        state: the trained adapter.
        run_id: of the central run.
        metrics: for the trained version's manifest.
        parent: of the initial version, where it is one that was there already.

    Raises:
        RegistryError: if the registry refuses.
    """
    base, config = session.adapter.base, session.config
    publisher = RegistryPublisher(
        registry,
        config,
        run_id=run_id,
        base_digest=base.base_digest,
        base=base.parts,
        method="central",
        channel=None,
    )

    def training(number: int, adapter: AdapterState) -> TrainingState:
        moments = server_optimizers.init(config.strategy.server_optimizer, adapter)
        return TrainingState(number, GlobalState(adapter.cast("F32")), moments)

    initial = publisher.publish(training(0, session.initial), parent=parent, participants=0, metrics={})
    trained = publisher.publish(training(1, state), parent=initial.version_id, participants=0, metrics=metrics)
    return initial.version_id, trained.version_id


def _prefixed(evaluation: Mapping[str, Any]) -> dict[str, float]:
    return {f"held_out_{key}": float(value) for key, value in evaluation.items()}
