"""Open a runtime for a version: load its base once. Called by the command line and by the demo."""

from __future__ import annotations

from pathlib import Path

from federated.adapters import load_base
from federated.config import ModelConfig
from federated.device.backends.torch import TorchBackend
from federated.device.recipe import recipe_of
from federated.device.slots import AdapterRuntime
from federated.errors import BaseMismatch
from federated.manifest import VersionManifest

__all__ = ["open_runtime"]


def open_runtime(
    manifest: VersionManifest, *, app_dir: Path | None = None, model: ModelConfig | None = None, capacity: int = 4
) -> AdapterRuntime:
    """Load the base that a version was made for, and open slots over it. Nothing is installed yet.

    Args:
        manifest: of any version of the run; its task, adapter and seed hold for all that are installed later.
        app_dir: where a relative ``source`` of the base is looked up after the working directory.
        model: the device's own base, where the record's ``source`` is not to be followed. With a ``quantization`` it
            answers for versions of the full base: the device's choice, whose answers are close and not the same.
        capacity: as in `AdapterRuntime`.

    Raises:
        BaseMismatch: if what was loaded is not the version's base.
        DeviceError: if the record does not say how to rebuild the model.
        ModelError: if the base cannot be loaded.
    """
    recipe = recipe_of(manifest)
    source = model or recipe.model
    base = load_base(source, app_dir=app_dir)
    if manifest.base_digest not in (base.base_digest, base.full_digest):
        raise BaseMismatch(
            f"version {manifest.version_id[:12]} belongs to the base model {manifest.base_digest[:12]}, but "
            f"{source.source} is {base.base_digest[:12]}: give the folder of the base that it was trained on"
        )
    return AdapterRuntime(TorchBackend(base, recipe, base_digest=manifest.base_digest), capacity=capacity)
