"""A PEFT folder becomes version 1 of a lineage, in the registry that federations publish to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from federated import server_optimizers
from federated.adapters import load_base, read_peft
from federated.config import ExperimentConfig
from federated.flower.folders import app_folder
from federated.flower.publisher import RegistryPublisher, TrainingState
from federated.global_state import GlobalState
from federated.manifest import VersionManifest, sha256_hex
from federated.registry import Registry

__all__ = ["import_peft"]


def import_peft(registry: Registry, folder: Path, config: ExperimentConfig) -> VersionManifest:
    """Read a PEFT folder for the base and task of an experiment, and publish it; no channel moves.

    Args:
        registry: open.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        config: names base model, task, adapter and licence; rank, alpha and layers come from the folder.

    Raises:
        ModelError: if the folder is not understood or does not fit the base; nothing is published then.
        RegistryError: if the registry refuses.
    """
    base = load_base(config.model, app_dir=app_folder())
    adapter, state = read_peft(folder, base, config.task, seed=config.seed)
    config = replace(config, adapter=adapter)
    weights = (folder / "adapter_model.safetensors").read_bytes()
    publisher = RegistryPublisher(
        registry,
        config,
        run_id=f"{config.adapter_name}-import-{sha256_hex(weights)[:8]}",
        base_digest=base.base_digest,
        base=base.parts,
        method="import",
        channel=None,
    )
    optimizer = server_optimizers.init(config.strategy.server_optimizer, state)
    training = TrainingState(1, GlobalState(state.cast("F32")), optimizer)
    return publisher.publish(training, parent=None, participants=0, metrics={})
