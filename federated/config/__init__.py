"""The one schema: frozen dataclasses, validated when built.

Hydra composes YAML where a run starts; `experiment_from` turns the result into these records, which cross the
network as plain JSON scalars (`ExperimentConfig.to_json`). Nothing here names a class or an import path, and
nothing here imports Hydra: `federated.cli` composes.
"""

from federated.config.admission import AdmissionConfig
from federated.config.experiment import ExperimentConfig, experiment_from
from federated.config.parts import (
    STRICT,
    AdapterConfig,
    DataConfig,
    EngineConfig,
    GateConfig,
    ModelConfig,
    PartitionConfig,
    RoundConfig,
    SelectionConfig,
    ServerOptimizerConfig,
    StrategyConfig,
    TaskConfig,
    TrackingConfig,
    TrainConfig,
)
from federated.config.privacy import ClientPrivacyConfig, ExamplePrivacyConfig, PrivacyConfig

__all__ = [
    "AdmissionConfig",
    "STRICT",
    "AdapterConfig",
    "ClientPrivacyConfig",
    "DataConfig",
    "EngineConfig",
    "ExamplePrivacyConfig",
    "ExperimentConfig",
    "GateConfig",
    "ModelConfig",
    "PartitionConfig",
    "PrivacyConfig",
    "RoundConfig",
    "SelectionConfig",
    "ServerOptimizerConfig",
    "StrategyConfig",
    "TaskConfig",
    "TrackingConfig",
    "TrainConfig",
    "experiment_from",
]
