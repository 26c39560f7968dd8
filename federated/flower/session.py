"""One process's working parts for an experiment: base, adapter, task, trainer and data, made once and shared.

In-process workers inherit a warm session through fork; Ray actors and devices make their own on first use. The cache
is in this module, which everybody imports by name, so that it survives however Flower loads a ClientApp.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from federated.adapters import AdapterModel, attach, load_base
from federated.config import DataConfig, ExperimentConfig, ModelConfig, experiment_from
from federated.config.parts import MAX_PARAMS
from federated.config.wording import expectation
from federated.data import Source, open_source
from federated.errors import ConfigError
from federated.flower.conditions import Conditions
from federated.state import AdapterState
from federated.tasks import Task, make_task
from federated.training import LocalData, LocalTrainer
from federated.wire import SigningKey, read_signing_key

__all__ = [
    "AgentSite",
    "ClientSite",
    "Session",
    "app_folder",
    "open_parts",
    "open_session",
    "opened_parts",
    "site_of",
    "use_app_folder",
    "use_client_store",
]

_LOG = logging.getLogger(__name__)
_APP_VARIABLE = "FEDPEFT_APP"
_STORE_VARIABLE = "FEDPEFT_CLIENT_STORE"


def use_app_folder(path: Path) -> None:
    """Say where the app folder is (for child processes too): relative model and data folders are looked up there."""
    os.environ[_APP_VARIABLE] = str(path.resolve())


def app_folder() -> Path | None:
    """The app folder, if one was named."""
    value = os.environ.get(_APP_VARIABLE)
    return Path(value) if value else None


def use_client_store(path: Path) -> None:
    """Say where simulated clients keep what they remember, in child processes as well."""
    os.environ[_STORE_VARIABLE] = str(path.resolve())


def _simulated_store() -> str:
    default = Path.home() / ".cache" / "federated-peft" / "clients"
    return os.environ.get(_STORE_VARIABLE, str(default))


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


@dataclass(frozen=True)
class AgentSite:
    """The device's agent beside a training client (`federated.device.agent`).

    Args:
        path: its ``device.yaml``, or its state folder.
        require: train only from what it has verified.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    path: str
    require: bool = False


@dataclass(frozen=True)
class ClientSite:
    """What the owner of a device fixes on its own disk; the server cannot change it.

    Args:
        client_id: the participant's stable name.
        store: folder for the client's store.
        data: where its examples are; None only in a simulation.
        model: where its base model is; None only in a simulation.
        max_rank: largest LoRA rank that it trains; the server is told, and a rule that mixes ranks heeds it.
        max_params: most parameters that it trains whole (``adapter.kind=full``), whatever the server allows.
        max_epochs: most passes over its data in one round.
        max_steps: most optimizer steps in one round.
        allowed_base_digests: base models that it trains; empty means any that it can load.
        max_epsilon: most that all runs together may spend on its examples; None is no limit, and any other value takes
            part in runs with ``privacy.example`` alone.
        target_delta: the probability beside ``max_epsilon``; a run's own counts where it is smaller.
        least_noise: smallest ``privacy.example`` noise multiplier that it trains with.
        signing_key: path of the private key (PEM, Ed25519, its owner's alone) that signs its updates; relative to the
            client's own file; empty: they are not signed.
        share_metrics: whether it measures adapters on its held-out examples for the server, which no privacy protects;
            not said: only where ``max_epsilon`` and ``least_noise`` set no limit.
        conditions: when it takes part; otherwise it says "not now".
        agent: the agent of its device.
        personal: name under which what it learns is kept in the agent's state folder, for the device to serve.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")  # a limit misspelt is no limit

    client_id: str
    store: str
    data: DataConfig | None = None
    model: ModelConfig | None = None
    max_rank: int = 1024
    max_params: int = MAX_PARAMS
    max_epochs: float = 100.0
    max_steps: int = 100_000
    allowed_base_digests: tuple[str, ...] = ()
    max_epsilon: Annotated[float, Field(ge=0)] | None = None
    target_delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    least_noise: Annotated[float, Field(ge=0)] = 0.0
    share_metrics: bool | None = None
    signing_key: str = ""
    conditions: Conditions = field(default_factory=Conditions)
    agent: AgentSite | None = None
    personal: str = ""

    @property
    def update_key(self) -> SigningKey | None:
        """What signs its updates, read now; None where they are not signed.

        Raises:
            ConfigError: if it cannot be read, others may read it, or it is of another kind.
        """
        return read_signing_key(Path(self.signing_key)) if self.signing_key else None

    @property
    def measures(self) -> bool:
        """Whether exact measurements on held-out examples may leave the device."""
        if self.share_metrics is not None:
            return self.share_metrics
        return self.max_epsilon is None and not self.least_noise

    def applied_to(self, config: ExperimentConfig) -> ExperimentConfig:
        """The experiment as this site runs it.

        Raises:
            ConfigError: if it asks for more than the site allows.
        """
        asked = {
            "train.epochs": (config.train.epochs, self.max_epochs),
            "train.steps": (config.train.steps, self.max_steps),
        }
        for key, (found, allowed) in asked.items():
            if found > allowed:
                raise ConfigError(f"{key} = {found}: this client allows at most {allowed}")
        if self.data is None and self.model is None:
            return config
        adapter = replace(config.adapter, max_params=min(self.max_params, config.adapter.max_params))
        return replace(config, adapter=adapter, data=self.data or config.data, model=self.model or config.model)


def site_of(node_config: Mapping[str, Any], config: ExperimentConfig) -> ClientSite:
    """Who this node is: a partition in a simulation, or what its own ``client-config`` file says.

    Raises:
        ConfigError: if the node says neither, or its file is not valid.
    """
    if "client-config" in node_config:
        return _read_site(Path(str(node_config["client-config"])))
    if "partition-id" not in node_config:
        raise ConfigError(
            "this node has neither 'client-config' (the path of its own YAML file) nor 'partition-id' (simulation) "
            "in its node config; start the SuperNode with --node-config 'client-config=\"/path/client.yaml\"'"
        )
    names = open_source(config.data, config.task, app_dir=app_folder()).client_ids
    index = str(node_config["partition-id"])
    if not (index.isdecimal() and int(index) < len(names)):
        raise ConfigError(f"partition-id {index}: the data has {len(names)} clients, numbered from 0")
    ranks = config.adapter.client_ranks or (config.adapter.rank,)
    return ClientSite(names[int(index)], store=_simulated_store(), max_rank=ranks[int(index) % len(ranks)])


def _read_site(path: Path) -> ClientSite:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
        site = TypeAdapter(ClientSite).validate_python(value)
    except OSError as error:
        raise ConfigError(f"client-config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(f"client-config {path}: not valid YAML") from None
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise ConfigError(f"client-config {path}: {f'{key}: ' if key else ''}{expectation([fault])}") from None
    if site.personal and site.agent is None:
        raise ConfigError(f"client-config {path}: personal needs agent.path: the state folder in which it is kept")
    if site.data is None or site.model is None:
        missing = "data" if site.data is None else "model"
        raise ConfigError(f"client-config {path}: {missing} must be given: a server never chooses a client's files")
    return replace(site, signing_key=str(path.absolute().parent / site.signing_key)) if site.signing_key else site
