"""GGUF adapters in llama.cpp itself: its probabilities are those of the merged weights in float64, layer by layer.

llama.cpp comes with the npm packages of ``llama_cpp/package.json``, which `make llama-cpp` puts into the cache; nothing
is built, and nothing is fetched while the tests run.
"""

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from federated.adapters import BaseModel, shell, spec_for
from federated.config import AdapterConfig, TaskConfig
from federated.data.assets import cache_dir
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, ModuleSpec, VersionManifest, sha256_hex
from federated.release import Artefact
from federated.release.export_gguf import FILE, exporter
from federated.release.exportable import Exportable, export
from federated.state import AdapterState, to_raw
from federated.wire import encode_tensors

from .gguf_bases import MODELS, tiny_base, write_base

SCRIPT = Path(__file__).parent / "llama_cpp" / "logits.mjs"
NODE = shutil.which("node")
PACKAGES = cache_dir() / "npm" / "node_modules"


def _missing() -> bool:
    if NODE is None or not (PACKAGES / "node-llama-cpp").is_dir():
        return True
    said = subprocess.run([NODE, "--version"], capture_output=True, text=True, check=True).stdout
    return int(said.removeprefix("v").partition(".")[0]) < 20


pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(_missing(), reason="llama.cpp is not installed (make llama-cpp; needs node 20 or newer)"),
]

TASK = TaskConfig(name="causal_lm")
PROMPT = [1, *range(40, 52)]
TIGHT, LOOSE = 1e-5, 2e-4
"""Largest difference of probabilities; llama.cpp looks GELU up in a table of 16 bits: there, bases differ too."""
GELU = ("gpt2", "gemma3")


def llama_cpp(base: Path, *cases: tuple[Path | None, float]) -> list[Any]:
    """Probabilities [position, token] float64 of each (adapter, scale), or what llama.cpp says against it."""
    asked = [{"lora": None if lora is None else str(lora), "scale": scale} for lora, scale in cases]
    job = json.dumps({"model": str(base), "tokens": PROMPT, "cases": asked})
    command = [str(NODE), str(SCRIPT), str(PACKAGES)]
    done = subprocess.run(command, input=job, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [one.get("error") or _probabilities(torch.tensor(one["logits"])) for one in json.loads(done.stdout)]


def _probabilities(logits: Tensor) -> Tensor:
    return logits.double().softmax(dim=-1)


@torch.no_grad()
def merged(base: BaseModel, adapter: AdapterState | None, *, without: str = "") -> Tensor:
    """What the base answers with ``scaling * B @ A`` added to its weights, all in float64."""
    model = type(base.model)(base.model.config)
    model.load_state_dict(base.model.state_dict())
    model = model.double().eval()
    for pair in adapter.pairs() if adapter else ():
        if pair.module.name != without:
            weight: Any = model.get_submodule(pair.module.name).weight
            product = pair.scaling * pair.factor_b.double() @ pair.factor_a.double()
            weight += product.T if pair.module.fan_in_fan_out else product
    return _probabilities(model(torch.tensor([PROMPT])).logits[0])


@torch.no_grad()
def adapted(base: BaseModel, adapter: AdapterState) -> Tensor:
    """What a device of ours answers."""
    model = shell(base, adapter.spec)
    model.write(adapter)
    return _probabilities(model.model(torch.tensor([PROMPT])).logits[0])


def filled(spec: AdapterSpec, seed: int, strength: float = 0.06) -> AdapterState:
    chance = torch.Generator().manual_seed(seed)
    tensors = {}
    for one in spec.modules:
        tensors[f"{one.name}.factor_a"] = torch.randn(one.rank, one.d_in, generator=chance) * strength
        tensors[f"{one.name}.factor_b"] = torch.randn(one.d_out, one.rank, generator=chance) * strength
    return AdapterState(spec, tensors)


def all_linear(base: BaseModel, **fields: Any) -> AdapterSpec:
    config = AdapterConfig(rank=8, alpha=16.0, target_modules="all-linear", **fields)
    return spec_for(base, config, TASK, seed=0)


def mixed(spec: AdapterSpec) -> AdapterSpec:
    """Another rank and alpha in every second layer."""
    layers = [replace(one, rank=3, alpha=5.0) if number % 2 else one for number, one in enumerate(spec.modules)]
    return replace(spec, modules=tuple(layers))


def grown(base: BaseModel) -> AdapterState:
    """As FLoRA and FedEx publish it: a residual in the factors, which have another rank each."""
    spec = all_linear(base, use_rslora=True)
    few = tuple(replace(one, rank=5, alpha=5.0) for one in spec.modules[::3])
    residual = filled(AdapterSpec("lora", 5, 5.0, False, few), seed=6, strength=0.1)
    return GlobalState(filled(spec, seed=5), residual).export()


def exported(base: BaseModel, adapter: AdapterState, folder: Path, kind: str = "f32") -> Path:
    weights = encode_tensors(to_raw(adapter.tensors))
    manifest = VersionManifest(sha256_hex(weights), base.base_digest, adapter.spec, "fedit+sgd", "run-a", 1)
    export(Exportable(Artefact(manifest, weights), base, TASK), exporter(kind), folder)
    return folder / FILE


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@dataclass(frozen=True)
class Compared:
    """One family's base and adapters, in llama.cpp and in PyTorch."""

    base: BaseModel
    adapters: Mapping[str, AdapterState]
    found: Mapping[str, Tensor]
    most: float


@pytest.fixture(scope="module", params=MODELS)
def compared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    folder, base = tmp_path_factory.mktemp(request.param), tiny_base(request.param)
    write_base(base, folder / "base.gguf")
    plain = all_linear(base)
    adapters = {
        "plain": filled(plain, seed=1),
        "mixed": filled(mixed(all_linear(base, use_rslora=True)), seed=2),
        "grown": grown(base),
    }
    cases: list[tuple[Path | None, float]] = [(None, 1.0)]
    cases += [(exported(base, adapter, folder / name), 1.0) for name, adapter in adapters.items()]
    cases += [(folder / "plain" / FILE, 0.0)]
    answers = llama_cpp(folder / "base.gguf", *cases)
    found = dict(zip(("base", *adapters, "scale 0"), answers, strict=True))
    return Compared(base, adapters, found, LOOSE if request.param in GELU else TIGHT)


def test_the_base_is_the_same_model(compared: Compared) -> None:
    assert far(compared.found["base"], merged(compared.base, None)) < compared.most


@pytest.mark.parametrize("name", ["plain", "mixed", "grown"])
def test_an_adapter_says_the_same_in_llama_cpp(compared: Compared, name: str) -> None:
    adapter, found = compared.adapters[name], compared.found[name]
    assert far(found, merged(compared.base, adapter)) < compared.most
    assert far(found, adapted(compared.base, adapter)) < compared.most
    assert far(found, compared.found["base"]) > 100 * compared.most


def test_no_layer_is_left_out(compared: Compared) -> None:
    adapter, found = compared.adapters["plain"], compared.found["plain"]
    for module in adapter.spec.modules:
        assert far(found, merged(compared.base, adapter, without=module.name)) > 3 * compared.most, module.name


def test_scale_0_is_the_base_bit_for_bit(compared: Compared) -> None:
    assert torch.equal(compared.found["scale 0"], compared.found["base"])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[BaseModel, Path]:
    base, path = tiny_base("llama"), tmp_path_factory.mktemp("llama") / "base.gguf"
    write_base(base, path)
    return base, path


def test_smaller_files_are_close(llama: tuple[BaseModel, Path], tmp_path: Path) -> None:
    base, path = llama
    adapter = filled(all_linear(base), seed=1)
    files = [exported(base, adapter, tmp_path / kind, kind) for kind in ("f16", "q8_0")]
    first, second, alone = llama_cpp(path, *((file, 1.0) for file in files), (None, 1.0))
    expected = merged(base, adapter)
    moved = far(expected, alone)
    assert 0 < far(first, expected) < 0.01 * moved
    assert 0 < far(second, expected) < 0.03 * moved


def test_an_untied_output_layer_counts(llama: tuple[BaseModel, Path], tmp_path: Path) -> None:
    base, path = llama
    head = ModuleSpec("lm_head", 64, 260, 4, 8.0)
    adapter = filled(AdapterSpec("lora", 4, 8.0, False, (head,)), seed=4)
    found, alone = llama_cpp(path, (exported(base, adapter, tmp_path / "out"), 1.0), (None, 1.0))
    assert far(found, merged(base, adapter)) < TIGHT
    assert far(found, alone) > 100 * TIGHT


def test_an_adapter_of_another_family_is_refused(llama: tuple[BaseModel, Path], tmp_path: Path) -> None:
    other = tiny_base("qwen2")
    file = exported(other, filled(all_linear(other), seed=1), tmp_path / "out")
    [said] = llama_cpp(llama[1], (file, 1.0))
    assert "LoRA" in said
