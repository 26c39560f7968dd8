"""Registries in temporary folders, and manifests for arbitrary bytes."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from federated.manifest import AdapterSpec, ModuleSpec, VersionManifest, sha256_hex
from federated.registry import Registry

BASE = "b" * 64


class Clock:
    """One second later at every look."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


@pytest.fixture
def manifest_for() -> Callable[..., VersionManifest]:
    def make(weights: bytes, **fields: object) -> VersionManifest:
        spec = AdapterSpec("lora", 2, 4.0, False, (ModuleSpec("layer", 4, 4, 2, 4.0),))
        values: dict[str, object] = {
            "weights_digest": sha256_hex(weights),
            "base_digest": BASE,
            "spec": spec,
            "method": "fedit+sgd",
            "run_id": "run-a",
            "round_number": 0,
        }
        return VersionManifest(**(values | fields))

    return make


@pytest.fixture
def location(tmp_path: Path) -> Path:
    return tmp_path / "registry"


@pytest.fixture
def registry(location: Path) -> Iterator[Registry]:
    with Registry.open(location, clock=Clock()) as opened:
        yield opened


@pytest.fixture
def publish(registry: Registry, manifest_for: Callable[..., VersionManifest]) -> Callable[..., str]:
    """Publish bytes; keywords of the manifest, and ``channel`` and ``training_state``."""

    def run(weights: bytes, **fields: object) -> str:
        extra = {key: fields.pop(key) for key in ("channel", "training_state") if key in fields}
        return registry.publish(manifest_for(weights, **fields), weights, **extra)

    return run
