"""Who a client is and what its owner allows: a file on the device's own disk, or a partition of a simulation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from federated.config import DataConfig, ExperimentConfig, ModelConfig
from federated.config.parts import MAX_PARAMS
from federated.config.wording import expectation
from federated.data import open_source
from federated.errors import ConfigError, PrivacyError
from federated.flower.conditions import Conditions
from federated.flower.folders import app_folder, client_store
from federated.wire import SigningKey, read_signing_key

__all__ = ["AgentSite", "ClientSite", "check_limits", "site_of"]


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
    return ClientSite(names[int(index)], store=client_store(), max_rank=ranks[int(index) % len(ranks)])


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


def check_limits(config: ExperimentConfig, site: ClientSite) -> None:
    """Refuse a run that asks for more than the device's owner allows, before anything is read.

    Raises:
        PrivacyError: naming what is asked and what is allowed.
    """
    privacy, own_data = config.privacy, site.data is not None
    if own_data and privacy.enabled and privacy.test_seed >= 0:
        raise PrivacyError("privacy.test_seed is set: noise that others can make again protects nobody; this client "
                           "takes its noise from the operating system alone")  # fmt: skip
    if site.max_epsilon is None and not site.least_noise:
        return
    if not privacy.example.enabled:
        raise PrivacyError(
            "the run has no privacy.example, and this client trains with example-level privacy alone; use "
            "privacy=example_dp"
        )
    if site.max_epsilon is not None and privacy.target_epsilon > site.max_epsilon:
        raise PrivacyError(
            f"privacy.target_epsilon = {privacy.target_epsilon:g}: this client allows at most {site.max_epsilon:g}"
        )
    if 0 < privacy.example.noise_multiplier < site.least_noise:
        found = privacy.example.noise_multiplier
        raise PrivacyError(
            f"privacy.example.noise_multiplier = {found:g}: this client allows no less than {site.least_noise:g}"
        )
