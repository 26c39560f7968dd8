"""One process's working parts for an experiment: base, adapter, task, trainer and data, made once and shared.

In-process workers inherit a warm session through fork; Ray actors and devices make their own on first use. The cache
is in this module, which everybody imports by name, so that it survives however Flower loads a ClientApp.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from federated.adapters import AdapterModel, attach, load_base
from federated.config import ExperimentConfig, experiment_from
from federated.data import Source, open_source
from federated.flower.folders import app_folder
from federated.state import AdapterState
from federated.tasks import Task, make_task
from federated.training import LocalData, LocalTrainer

__all__ = ["Session", "open_parts", "open_session", "opened_parts"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """The parts that training and evaluation need.

    Args:
        config: what of the experiment made them.
        adapter: the one adapted model of this process; each client's training writes to it.
        task: batches, losses, metrics.
        trainer: local training.
        source: the clients' data.
        initial: the adapter before any training, from the experiment's seed.
    """

    config: ExperimentConfig
    adapter: AdapterModel
    task: Task
    trainer: LocalTrainer
    source: Source
    initial: AdapterState

    def local_data(self, client_id: str, *, held_out_only: bool = False) -> LocalData:
        """One client's encoded examples, read now and not kept; `train` stays empty where it is not wanted.

        Under ``privacy.example`` a row is one example, whatever its length: what is protected must not depend on
        ``task.max_length``, which a server chooses. Of a text that would make several, the first one is taken.
        """
        data = self.source.load(client_id)
        test = self.task.encode(data.test) if data.test else []
        if held_out_only:
            return LocalData([], test)
        train = self.task.encode(data.train)
        if not self.config.privacy.example.enabled:
            return LocalData(train, test)
        if len(train) != len(data.train):
            _LOG.warning("privacy.example: the first of each row's examples is trained on; %d are left out",
                         len(train) - len(data.train))  # fmt: skip
            train = [self.task.encode([row])[0] for row in data.train]
        return LocalData(train, test, data.train)


_opened: list[str] = []
"""The parts that were opened last, for whoever keeps them for a process to come."""


@lru_cache(maxsize=2)
def _open(config_json: str, folder: Path | None) -> Session:
    config = experiment_from(config_json)
    base = load_base(config.model, app_dir=folder)
    adapter = attach(base, config.adapter, config.task, seed=config.seed)
    task = make_task(config.task, base.tokenizer)
    source = open_source(config.data, config.task, app_dir=folder)
    trainer = LocalTrainer(adapter, task, config.train, config.privacy)
    return Session(config, adapter, task, trainer, source, adapter.read())


def open_session(config: ExperimentConfig) -> Session:
    """The session of an experiment: from the cache when model, adapter, task, data, training and seed agree."""
    session = _open(config.parts_json, app_folder())
    _opened[:] = [config.parts_json]
    source = open_source(config.data, config.task, app_dir=app_folder())
    return session if source is session.source else replace(session, source=source)  # the data may have changed since


def opened_parts() -> str | None:
    """What `open_session` opened last in this process; None before the first time."""
    return _opened[0] if _opened else None


def open_parts(parts: str) -> None:
    """Open what another process's `opened_parts` names, so that processes forked from this one have it.

    Raises:
        FederatedError: whatever is wrong with it.
    """
    _open(parts, app_folder())
