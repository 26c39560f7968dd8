"""A backend without any model, versions for it, and versions of the tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from federated.adapters import attach, load_base
from federated.adapters.onnx_base import write_onnx_base
from federated.config import AdapterConfig, ModelConfig, TaskConfig
from federated.device import AdapterRuntime, OnnxBackend, Recipe, open_runtime, recipe_of
from federated.errors import DeviceError
from federated.manifest import AdapterSpec, ModuleSpec, RawTensor, VersionManifest, digest_of, sha256_hex
from federated.state import to_raw
from federated.wire import encode_tensors

SPEC = AdapterSpec("lora", 2, 4.0, False, (ModuleSpec("layer", 3, 3, 2, 4.0),))


@dataclass(frozen=True)
class Version:
    """A manifest with its bytes."""

    manifest: VersionManifest
    weights: bytes

    @property
    def digest(self) -> str:
        return self.manifest.weights_digest

    @property
    def version_id(self) -> str:
        return self.manifest.version_id

    def but(self, **changes: Any) -> Version:
        return Version(replace(self.manifest, **changes), self.weights)

    def install(self, runtime: AdapterRuntime, label: str = "") -> Any:
        return runtime.install(self.manifest, self.weights, version_id=self.version_id, label=label)


@dataclass
class FakeBackend:
    """Its model is the adapter's first number; null is 0."""

    base_digest: str = "b" * 64
    built: list[float] = field(default_factory=list)
    refuse: bool = False

    def null(self) -> float:
        return 0.0

    def check(self, manifest: VersionManifest) -> None:
        if manifest.task.get("name", "fake") != "fake":
            raise DeviceError("another task")

    def build(self, spec: AdapterSpec, tensors: Mapping[str, RawTensor]) -> float:
        if self.refuse:
            raise DeviceError("does not fit")
        self.built.append(float(tensors["layer.factor_a"].array.flat[0]))
        return self.built[-1]

    def nbytes(self, handle: float) -> int:
        return 100

    def predict(self, handle: float, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        return [handle for _ in rows]


def make_version(value: float, **changes: Any) -> Version:
    tensors = {
        "layer.factor_a": RawTensor.from_array(np.full((2, 3), value, np.float32)),
        "layer.factor_b": RawTensor.from_array(np.zeros((3, 2), np.float32)),
    }
    weights = encode_tensors(tensors)
    manifest = VersionManifest(sha256_hex(weights), "b" * 64, SPEC, "fedit", "run", 1)
    return Version(replace(manifest, **changes), weights)


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def runtime(backend: FakeBackend) -> AdapterRuntime:
    return AdapterRuntime(backend)


@pytest.fixture
def version() -> Callable[..., Version]:
    return make_version


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order, so that equal computations give equal bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_recipe(source: str = "tiny:bert", **changes: Any) -> Recipe:
    task = {
        "tiny:bert": TaskConfig(labels=("bad", "good", "mixed")),
        "tiny:llama": TaskConfig(name="causal_lm", max_length=16),
        "tiny:sensor": TaskConfig(name="sensor", labels=("still", "moving")),
    }[source]
    adapter = AdapterConfig(rank=2, target_modules="all-linear")
    return replace(Recipe(ModelConfig(source=source), adapter, task, 5), **changes)


def make_real_version(recipe: Recipe, value: int, **changes: Any) -> Version:
    """A version with random weights that differ for each ``value``."""
    base = load_base(recipe.model)
    adapter = attach(base, recipe.adapter, recipe.task, seed=recipe.seed)
    random = torch.Generator().manual_seed(value)
    state = adapter.read()
    tensors = {name: torch.randn(t.shape, generator=random).to(t.dtype) for name, t in state.tensors.items()}
    weights = encode_tensors(to_raw(tensors))
    record = {key: asdict(getattr(recipe, key)) for key in ("model", "adapter", "task")} | {"seed": recipe.seed}
    manifest = VersionManifest(
        sha256_hex(weights), base.base_digest, state.spec, "fedit", "run", value, task=json.loads(json.dumps(record))
    )
    return Version(replace(manifest, **changes), weights)


@pytest.fixture
def recipe() -> Callable[..., Recipe]:
    return make_recipe


@pytest.fixture
def real_version() -> Callable[..., Version]:
    return make_real_version


@pytest.fixture(scope="session")
def onnx_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[VersionManifest], Path]:
    """The folder of a version's base in ONNX; exported once for all versions with the same layers, head and task."""
    made: dict[str, Path] = {}

    def export(manifest: VersionManifest) -> Path:
        names = [one.name for one in manifest.spec.modules]
        key = digest_of([manifest.base_digest, names, manifest.spec.head and asdict(manifest.spec.head), manifest.task])
        if key not in made:
            recipe = recipe_of(manifest)
            folder = tmp_path_factory.mktemp("onnx")
            write_onnx_base(load_base(recipe.model), manifest.spec, recipe.task, folder)
            made[key] = folder
        return made[key]

    return export


@pytest.fixture
def opened(onnx_base: Callable[[VersionManifest], Path]) -> Callable[..., AdapterRuntime]:
    """A runtime of the backend with that name, for a version and others like it."""

    def open_(engine: str, manifest: VersionManifest, capacity: int = 4) -> AdapterRuntime:
        if engine == "torch":
            return open_runtime(manifest, capacity=capacity)
        return AdapterRuntime(OnnxBackend(onnx_base(manifest), threads=1), capacity=capacity)

    return open_
