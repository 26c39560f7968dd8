"""The root of the schema, and how plain data becomes it. `federated.config` is where to import from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property
from typing import Annotated, Any, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from federated.config.admission import AdmissionConfig
from federated.config.parts import (
    STRICT,
    AdapterConfig,
    Count,
    DataConfig,
    EngineConfig,
    GateConfig,
    ModelConfig,
    RoundConfig,
    SelectionConfig,
    StrategyConfig,
    TaskConfig,
    TrackingConfig,
    TrainConfig,
)
from federated.config.privacy import PrivacyConfig
from federated.config.wording import one_line
from federated.errors import ConfigError
from federated.manifest import digest_of

__all__ = ["ExperimentConfig", "experiment_from"]

_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, config=STRICT)
class ExperimentConfig:
    """One whole experiment: the root of the schema.

    Args:
        name: of the experiment; part of the run folder's name and of the run's id.
        adapter_id: name of the adapter that the run makes versions of, the same over runs; empty: made from ``name``.
        licence: of the adapter, as an SPDX expression such as ``Apache-2.0``; goes into each version's record.
        rounds: federated rounds.
        seed: seeds the adapter's first weights, cohorts and data order.
        run_dir: the run's folder; relative to the working directory.
        registry: SQLAlchemy URL or folder of the registry; empty means ``registry`` inside ``run_dir``.
        registry_blobs: folder or fsspec URL of the registry's bytes; empty: beside its database; needed with a URL.
        start_from: a version in ``registry`` that round 1 starts from, by any name that a registry resolves; it becomes
            the parent of the run's first version. Empty: a fresh adapter.
        resume: go on with the run in ``run_dir`` from its last published round.
    """

    name: str = "experiment"
    adapter_id: str = ""
    licence: Annotated[str, Field(max_length=200)] = ""
    rounds: Count = 3
    seed: Annotated[int, Field(ge=0)] = 0
    run_dir: str = "runs/latest"
    registry: str = ""
    registry_blobs: str = ""
    start_from: str = ""
    resume: bool = False
    model: ModelConfig = Field(default_factory=ModelConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    privacy: PrivacyConfig = Field(default_factory=PrivacyConfig)
    strategy: StrategyConfig = Field(default_factory=StrategyConfig)
    selection: SelectionConfig = Field(default_factory=SelectionConfig)
    round: RoundConfig = Field(default_factory=RoundConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    gate: GateConfig = Field(default_factory=GateConfig)
    admission: AdmissionConfig = Field(default_factory=AdmissionConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @model_validator(mode="after")
    def _crosses_the_network(self) -> Self:
        for key, part in asdict(self).items():
            try:
                digest_of(part)
            except (TypeError, ValueError) as error:  # in free text and in `train.scheduler_args`
                raise ValueError(f"{key}: a value cannot be written as JSON: {error}") from None
        return self

    @model_validator(mode="after")
    def _labels_fit_the_task(self) -> Self:
        if self.task.name != "causal_lm" and len(self.task.labels) < 2:
            raise ValueError(f"task.labels: {self.task.name} needs at least two labels, found {list(self.task.labels)}")
        if self.data.name in ("files", "table", "hub") and not self.data.path:
            raise ValueError(f"data.path: data={self.data.name} needs a path, found none")
        return self

    @model_validator(mode="after")
    def _adapter_has_a_name(self) -> Self:
        if self.adapter_id and not _NAME.fullmatch(self.adapter_id):
            raise ValueError(
                f"adapter_id: expected 1 to 100 letters, digits and any of . _ -, a letter or digit first and no '..', "
                f"found {self.adapter_id!r}"
            )
        return self

    @model_validator(mode="after")
    def _blobs_have_a_place(self) -> Self:
        if "://" in self.registry and not self.registry_blobs:
            raise ValueError(
                "registry_blobs: a registry with a URL needs a place for its bytes; give registry_blobs= a folder or "
                "an fsspec URL"
            )
        return self

    @model_validator(mode="after")
    def _gate_is_not_private(self) -> Self:
        if self.gate.enabled and self.privacy.enabled and not self.gate.unprotected:
            raise ValueError(
                "gate.enabled: which version is promoted depends on what clients measured, and no account of "
                "privacy covers that; leave it off, or say gate.unprotected=true, and each choice is stamped"
            )
        if self.gate.enabled and self.gate.channel == "dev":
            raise ValueError("gate.channel = dev: runs move dev with every version; name another, such as canary")
        return self

    @model_validator(mode="after")
    def _buffered_rounds_have_no_cohort(self) -> Self:
        if self.round.mode == "buffered" and self.selection.fraction != 1.0:
            found = f"selection.fraction = {self.selection.fraction:g}: round.mode=buffered has no cohorts"
            raise ValueError(f"{found}; say with round.concurrency how many clients train at the same time")
        return self

    @model_validator(mode="after")
    def _no_mask_depends_on_who_is_there(self) -> Self:
        if self.privacy.example.enabled and self.adapter.dropout:
            raise ValueError(
                f"adapter.dropout = {self.adapter.dropout:g}: with privacy.example a batch with one example more would "
                "give all the others another mask, by a seed that the server knows; set adapter.dropout=0"
            )
        return self

    @property
    def adapter_name(self) -> str:
        """Name of the adapter that the run makes versions of: letters and digits of ``name``, where nobody gave one."""
        made = re.sub(r"[^A-Za-z0-9_]+", "-", self.name).strip("-_")[:100]
        return self.adapter_id or made or "unnamed"

    def to_dict(self) -> dict[str, Any]:
        """Plain data: dicts, lists and scalars."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    def for_clients(self) -> Self:
        """The experiment as it crosses the network: without the server's own places and trackers."""
        own: dict[str, Any] = {"gate": GateConfig(), "admission": AdmissionConfig(), "tracking": TrackingConfig()}
        return replace(self, run_dir="", registry="", registry_blobs="", start_from="", resume=False, **own)

    @cached_property
    def client_json(self) -> str:
        """`for_clients` as JSON, made once: every message carries it."""
        return self.for_clients().to_json()

    @cached_property
    def parts_json(self) -> str:
        """What a process' working parts are made from, as JSON: model, adapter, task, data, training, privacy, seed."""
        parts = {name: asdict(getattr(self, name)) for name in ("model", "adapter", "task", "data", "train", "privacy")}
        return json.dumps({"seed": self.seed, **parts}, sort_keys=True)

    @property
    def digest(self) -> str:
        """Digest of the whole configuration."""
        return digest_of(self.to_dict())


_ADAPTER: TypeAdapter[ExperimentConfig] = TypeAdapter(ExperimentConfig)


def experiment_from(value: Mapping[str, Any] | str) -> ExperimentConfig:
    """Build and validate an experiment from plain data or its JSON.

    Raises:
        ConfigError: one line for the first fault: the key, the value found and what is allowed.
    """
    try:
        return _ADAPTER.validate_json(value) if isinstance(value, str) else _ADAPTER.validate_python(dict(value))
    except ValidationError as error:
        raise ConfigError(one_line(error)) from None
