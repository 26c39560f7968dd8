"""What a federation is compared with: the null adapter, each client alone, and central training on pooled data.

Only a simulation can see all clients' data; a server that holds pooled or synthetic data of its own may train
centrally (``fedpeft train``). Every baseline starts from the same initial adapter and takes as many passes over the
data as the federation does: ``rounds * train.epochs`` (or ``rounds * train.steps``).
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from federated.config import ExperimentConfig
from federated.delta import apply_some
from federated.flower.session import Session, open_session
from federated.manifest import RawTensor, TrainPlan
from federated.state import AdapterState, from_raw, to_raw
from federated.training import LocalData, LocalTrainer, client_seed

__all__ = ["Baseline", "compare", "evaluate_everywhere", "full_session", "train_on"]


@dataclass(frozen=True)
class Baseline:
    """One arm of the comparison, measured on all clients' held-out data.

    Args:
        name: ``null``, ``local_only`` or ``central``.
        evaluation: pooled over all held-out examples (for ``local_only`` the mean over the clients' adapters).
        detail: for ``local_only``: each client's adapter, on everybody's held-out data.
        own: for ``local_only``: each client's adapter on its own held-out data alone, pooled.
        seconds: wall time.
    """

    name: str
    evaluation: Mapping[str, float]
    detail: Mapping[str, Mapping[str, float]] | None = None
    own: Mapping[str, float] | None = None
    seconds: float = 0.0

    def as_event(self) -> dict[str, Any]:
        """The ``baseline`` event."""
        return {
            "event": "baseline",
            "name": self.name,
            "evaluation": dict(self.evaluation),
            "detail": self.detail,
            "own": self.own,
            "seconds": round(self.seconds, 2),
        }


def evaluate_everywhere(session: Session, state: AdapterState) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Measure an adapter on every client's held-out data; returns the pooled result and each client's own."""
    detail = {}
    for client_id in session.source.client_ids:
        data = session.local_data(client_id)
        if data.test:
            detail[client_id] = session.trainer.evaluate(state, data.test).to_dict()
    return _pool(detail.values()), detail


def _pool(evaluations: Iterable[Mapping[str, float]]) -> dict[str, float]:
    found = list(evaluations)
    total = sum(value["num_examples"] for value in found)
    keys = [key for key in found[0] if key != "num_examples"]
    return {key: sum(value[key] * value["num_examples"] for value in found) / total for key in keys} | {
        "num_examples": total
    }


def _mean(evaluations: Iterable[Mapping[str, float]]) -> dict[str, float]:
    found = list(evaluations)
    return {key: sum(value[key] for value in found) / len(found) for key in found[0]}


def train_on(
    session: Session, client_ids: Sequence[str], *, name: str, threads: int | None = None
) -> tuple[AdapterState, dict[str, float]]:
    """Train from the initial adapter on the pooled rows of some clients, for the federation's number of passes.

    Args:
        session: working parts.
        client_ids: whose rows are pooled.
        name: seeds the data order.
        threads: torch threads; None takes the config's.

    Returns:
        The trained adapter (float32) and the training's metrics.
    """
    config = session.config
    train = replace(
        config.train,
        epochs=config.train.epochs * config.rounds,
        steps=config.train.steps * config.rounds,
        threads=config.train.threads if threads is None else threads,
    )
    trainer = LocalTrainer(session.adapter, session.task, train)
    pooled = [feature for client_id in client_ids for feature in session.local_data(client_id).train]
    initial = session.initial
    plan = TrainPlan(rank=initial.spec.rank, trainable=initial.spec.groups, evaluate_before=False)
    result = trainer.run(initial, plan, LocalData(pooled), seed=client_seed(config.seed, 0, name))
    return apply_some(initial, result.delta), {**result.metrics, "num_examples": float(result.num_examples)}


def _measure(config_json: str, name: str, client_ids: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """One arm, in a forked worker: returns plain data and raw tensors only."""
    session = _inherited[config_json]
    began = time.perf_counter()
    if name == "null":
        state = session.initial
    else:
        state, _ = train_on(session, client_ids, name=name, threads=1)
    pooled, detail = evaluate_everywhere(session, state)
    tensors: dict[str, RawTensor] = to_raw(state.tensors) if name == "central" else {}
    return name, {"pooled": pooled, "detail": detail, "tensors": tensors, "seconds": time.perf_counter() - began}


_inherited: dict[str, Session] = {}


def compare(
    config: ExperimentConfig,
    *,
    workers: int,
    advance: Callable[[str], None] = lambda _: None,
    null: Mapping[str, float] | None = None,
) -> tuple[list[Baseline], AdapterState]:
    """Measure all baselines, in forked workers.

    Args:
        config: the experiment that the federation ran.
        workers: processes.
        advance: told the name of each arm that is finished.
        null: the initial adapter's evaluation on all clients, if a federation's round 0 measured it; else measured.

    Returns:
        ``null``, ``local_only`` and ``central``, and the centrally trained adapter.
    """
    torch.set_num_threads(1)
    session = full_session(config)
    clients = session.source.client_ids
    jobs: list[tuple[str, tuple[str, ...]]] = [("central", clients), *((name, (name,)) for name in clients)]
    if null is None:
        jobs.append(("null", ()))
    found = dict(_run_jobs(config, jobs, workers=workers, advance=advance))
    local = {name: found[name] for name in clients}
    own = _pool(arm["detail"][name] for name, arm in local.items() if name in arm["detail"])
    central = AdapterState(session.initial.spec, from_raw(found["central"]["tensors"]))
    untrained = found.get("null", {"pooled": null, "seconds": 0.0})
    return [
        Baseline("null", untrained["pooled"], seconds=untrained["seconds"]),
        Baseline(
            "local_only",
            _mean(arm["pooled"] for arm in local.values()),
            detail={name: arm["pooled"] for name, arm in local.items()},
            own=own,
            seconds=sum(arm["seconds"] for arm in local.values()),
        ),
        Baseline("central", found["central"]["pooled"], seconds=found["central"]["seconds"]),
    ], central


def full_session(config: ExperimentConfig) -> Session:
    """The cached parts with the whole config, of which a client's session keeps only what it needs."""
    return replace(open_session(config), config=config)


def _run_jobs(
    config: ExperimentConfig,
    jobs: Sequence[tuple[str, tuple[str, ...]]],
    *,
    workers: int,
    advance: Callable[[str], None],
) -> Iterator[tuple[str, dict[str, Any]]]:
    key = config.to_json()
    _inherited[key] = full_session(config)
    try:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
            futures: list[Future[tuple[str, dict[str, Any]]]] = [
                pool.submit(_measure, key, name, ids) for name, ids in jobs
            ]
            for future in futures:
                name, arm = future.result()
                advance(name)
                yield name, arm
    finally:
        _inherited.clear()
