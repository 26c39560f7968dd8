"""A GGUF adapter read back with gguf's own reader: of each layer, (alpha / rank) * B @ A is the version's update."""

import importlib.util
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
import torch

from federated.adapters import BaseModel, base_from_module, load_base
from federated.config import ModelConfig, TaskConfig
from federated.errors import ModelError, ReleaseError
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, HeadSpec, ModuleSpec, RawTensor
from federated.release import Artefact
from federated.release.export_gguf import FILE, KINDS, adapter_gguf, exporter
from federated.release.exportable import Exportable, export
from federated.release.gguf_layers import FAMILIES, interleaved
from federated.state import AdapterState, to_raw
from federated.wire import encode_tensors

from .conftest import artefact_of

CONFIG = {
    "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
Q, K, OUT, DOWN = (
    f"model.layers.{path}_proj" for path in ("0.self_attn.q", "1.self_attn.k", "0.self_attn.o", "1.mlp.down")
)
LLAMA = "LlamaForCausalLM"
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up",
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip


def modules_of(*names: str, rank: int = 8, alpha: float = 16.0) -> tuple[ModuleSpec, ...]:
    return tuple(ModuleSpec(name, 64, 64 if ".k_" not in name else 32, rank, alpha) for name in names)


def spec_of(*modules: ModuleSpec, **fields: Any) -> AdapterSpec:
    return AdapterSpec(
        **({"peft_type": "lora", "rank": 8, "alpha": 16.0, "use_rslora": False, "modules": modules} | fields)
    )


def random_factors(spec: AdapterSpec, seed: int = 3) -> dict[str, np.ndarray]:
    chance = np.random.default_rng(seed)
    factors = {}
    for one in spec.modules:
        factors[f"{one.name}.factor_a"] = chance.standard_normal((one.rank, one.d_in)).astype(np.float32)
        factors[f"{one.name}.factor_b"] = chance.standard_normal((one.d_out, one.rank)).astype(np.float32)
    return factors


def version(spec: AdapterSpec, factors: dict[str, np.ndarray] | None = None, **fields: Any) -> Artefact:
    arrays = random_factors(spec) if factors is None else factors
    weights = encode_tensors({name: RawTensor.from_array(array) for name, array in arrays.items()})
    return artefact_of(weights, spec=spec, **fields)


class Read(NamedTuple):
    """A file as gguf reads it."""

    fields: dict[str, Any]
    tensors: dict[str, np.ndarray]
    types: dict[str, str]

    def effective(self, name: str) -> np.ndarray:
        factor_a, factor_b = (self.tensors[f"{name}.lora_{which}"].astype(np.float64) for which in "ab")
        return self.fields["adapter.lora.alpha"] / len(factor_a) * factor_b @ factor_a


def read(data: bytes) -> Read:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.gguf"
        path.write_bytes(data)
        found = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in found.fields.items()}
        tensors = {one.name: gguf.quants.dequantize(one.data, one.tensor_type).copy() for one in found.tensors}
        types = {one.name: one.tensor_type.name for one in found.tensors}
    return Read(fields, tensors, types)


def in_llama_order(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: the value j of a head goes to place 2j, the one half a head further to 2j + 1."""
    size = len(matrix) // heads
    turned = np.empty_like(matrix)
    for row in range(len(matrix)):
        head, inner = divmod(row, size)
        second, pair = divmod(inner, size // 2)
        turned[head * size + 2 * pair + second] = matrix[row]
    return turned


def truth(spec: AdapterSpec, factors: dict[str, np.ndarray], module: ModuleSpec, heads: int = 0) -> np.ndarray:
    factor_a, factor_b = (factors[f"{module.name}.factor_{which}"].astype(np.float64) for which in "ab")
    scaling = module.alpha / (np.sqrt(module.rank) if spec.use_rslora else module.rank)
    dense = scaling * factor_b @ factor_a
    return in_llama_order(dense, heads) if heads else dense


def gap(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("base_class", FAMILIES)
def test_each_layer_has_its_update(base_class: str) -> None:
    paths = [path.replace("N", "1") for path in FAMILIES[base_class].layers]
    spec = spec_of(*modules_of(*paths))
    found = read(adapter_gguf(version(spec), base_class, CONFIG))
    assert len(found.tensors) == 2 * len(paths)
    for module in spec.modules:
        short = module.name.split(".1.")[-1]
        name = "output.weight" if short == "lm_head" else f"blk.1.{NAMES[short]}.weight"
        llama = base_class in (LLAMA, "MistralForCausalLM")
        heads = {"q_proj": 4, "k_proj": 2}.get(short.split(".")[-1], 0) if llama else 0
        assert gap(found.effective(name), truth(spec, random_factors(spec), module, heads)) < 1e-14


def test_one_alpha_leaves_every_factor_as_it_is() -> None:
    spec = spec_of(*modules_of(OUT, DOWN), use_rslora=True)
    found = read(adapter_gguf(version(spec), LLAMA, CONFIG))
    factors = random_factors(spec)
    assert found.fields["adapter.lora.alpha"] == np.float32(16.0 * np.sqrt(8))
    assert np.array_equal(found.tensors["blk.0.attn_output.weight.lora_a"], factors[f"{OUT}.factor_a"])
    assert np.array_equal(found.tensors["blk.0.attn_output.weight.lora_b"], factors[f"{OUT}.factor_b"])
    assert gap(found.effective("blk.1.ffn_down.weight"), truth(spec, factors, spec.modules[1])) < 1e-7


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_alphas_that_differ_are_folded(use_rslora: bool) -> None:
    layers = (*modules_of(Q, OUT), *modules_of(K, rank=3, alpha=5.0), *modules_of(DOWN, rank=11, alpha=0.7))
    spec = spec_of(*layers, use_rslora=use_rslora)
    found = read(adapter_gguf(version(spec), LLAMA, CONFIG))
    names = ("blk.0.attn_q", "blk.0.attn_output", "blk.1.attn_k", "blk.1.ffn_down")
    for name, module, heads in zip(names, spec.modules, (4, 0, 2, 0), strict=True):
        assert gap(found.effective(f"{name}.weight"), truth(spec, random_factors(spec), module, heads)) < 1e-7


def test_a_residual_that_made_ranks_grow_is_in_the_file() -> None:
    spec = spec_of(*modules_of(OUT, DOWN), use_rslora=True)
    grown = AdapterSpec("lora", 5, 5.0, False, modules_of(OUT, rank=5, alpha=5.0))
    state, residual = random_factors(spec), random_factors(grown, seed=4)
    tensors = [{name: torch.from_numpy(array) for name, array in one.items()} for one in (state, residual)]
    exported = GlobalState(AdapterState(spec, tensors[0]), AdapterState(grown, tensors[1])).export()
    assert [module.rank for module in exported.spec.modules] == [13, 8]
    artefact = artefact_of(encode_tensors(to_raw(exported.tensors)), spec=exported.spec)
    found = read(adapter_gguf(artefact, LLAMA, CONFIG))
    both = truth(spec, state, spec.modules[0]) + truth(grown, residual, grown.modules[0])
    assert gap(found.effective("blk.0.attn_output.weight"), both) < 1e-6
    assert gap(found.effective("blk.1.ffn_down.weight"), truth(spec, state, spec.modules[1])) < 1e-6


@pytest.mark.parametrize(("kind", "types", "most"), [("f16", ("F16", "F16"), 5e-4), ("q8_0", ("Q8_0", "F16"), 6e-3)])
def test_smaller_files_are_as_close_as_their_type(kind: str, types: tuple[str, str], most: float) -> None:
    spec = spec_of(*modules_of(Q))
    found = read(adapter_gguf(version(spec), LLAMA, CONFIG, kind=kind))
    name = "blk.0.attn_q.weight"
    assert (found.types[f"{name}.lora_a"], found.types[f"{name}.lora_b"]) == types
    assert 1e-5 < gap(found.effective(name), truth(spec, random_factors(spec), spec.modules[0], 4)) < most
    assert found.fields["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_stored_types_are_widened_or_rounded_once(dtype: type) -> None:
    spec = spec_of(*modules_of(OUT))
    factors = {name: array.astype(dtype) for name, array in random_factors(spec).items()}
    found = read(adapter_gguf(version(spec, factors), LLAMA, CONFIG))
    assert np.array_equal(
        found.tensors["blk.0.attn_output.weight.lora_b"], factors[f"{OUT}.factor_b"].astype(np.float32)
    )


def test_what_the_file_says_of_itself() -> None:
    artefact = version(spec_of(*modules_of(Q)), adapter_id="support", licence="Apache-2.0")
    fields = read(adapter_gguf(artefact, LLAMA, CONFIG, base_name="org/base")).fields
    said = {name: value for name, value in fields.items() if not name.startswith("GGUF.")}
    assert said == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "support",
        "general.version": artefact.version_id,
        "general.license": "Apache-2.0",
        "general.base_model.count": 1,
        "general.base_model.0.name": "org/base",
        "general.file_type": 0,
        "adapter.type": "lora",
        "adapter.lora.alpha": 16.0,
        "federated.weights_digest": artefact.manifest.weights_digest,
        "federated.base_digest": artefact.manifest.base_digest,
    }


def test_one_version_is_one_file_and_without_a_name_it_has_that_of_its_run() -> None:
    artefact = version(spec_of(*modules_of(Q)))
    assert adapter_gguf(artefact, LLAMA, CONFIG) == adapter_gguf(artefact, LLAMA, CONFIG)
    fields = read(adapter_gguf(artefact, LLAMA, CONFIG, kind="q8_0")).fields
    assert fields["general.name"] == "run-a"
    assert {"general.license", "general.base_model.count"} & fields.keys() == set()
    assert fields["general.quantization_version"] == gguf.GGML_QUANT_VERSION


def test_rows_without_heads_stay() -> None:
    factor_b = np.arange(8.0).reshape(8, 1)
    assert interleaved(factor_b, 0) is factor_b
    assert interleaved(factor_b, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


HEAD = HeadSpec("mean_pool", 3, trained=True, seed=0)
REFUSED = {
    "kind": (spec_of(peft_type="ia3"), "an adapter of kind ia3; expected plain LoRA"),
    "core": (spec_of(*modules_of(Q), peft_type="lora_xs"), "an adapter of kind lora_xs"),
    "head": (spec_of(*modules_of(Q), head=HEAD), r"belongs with a head \(mean_pool, 3 labels\)"),
    "nothing": (spec_of(), "adapts no layer"),
    "twice": (spec_of(*modules_of(Q, Q)), "names a layer twice"),
    "rank": (spec_of(*modules_of(Q, rank=0)), "has rank 0, alpha 16.0; expected both above 0"),
    "alpha": (spec_of(*modules_of(Q, alpha=-1.0)), "has rank 8, alpha -1.0; expected both above 0"),
    "tiny alpha": (spec_of(*modules_of(Q, alpha=1e-300)), "alpha 1e-300; expected both above 0"),
    "huge alpha": (spec_of(*modules_of(Q, alpha=1e300)), "alpha 1e[+]300; expected both above 0"),
    "embeddings": (
        spec_of(*modules_of("model.embed_tokens")),
        "layer model.embed_tokens: llama.cpp adds an adapter of",
    ),
    "norm": (spec_of(*modules_of("model.layers.0.input_layernorm")), "input_layernorm: llama.cpp adds"),
    "block": (spec_of(*modules_of("model.layers.2.self_attn.q_proj")), "the base model has 2 blocks, counted from 0"),
    "zeros": (spec_of(*modules_of("model.layers.01.self_attn.q_proj")), "the base model has 2 blocks"),
    "rows": (spec_of(ModuleSpec(Q, 64, 60, 8, 16.0)), "60 rows are not those of 4 heads, two halves in each"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_file_cannot_say_is_refused_by_name(name: str) -> None:
    spec, message = REFUSED[name]
    artefact = version(spec, random_factors(spec) if spec.modules and spec.modules[0].rank else {})
    with pytest.raises(ModelError, match=f"version {artefact.version_id[:12]} cannot be written .*{message}"):
        adapter_gguf(artefact, LLAMA, CONFIG)


def test_another_base_class_is_refused() -> None:
    with pytest.raises(ModelError, match=r"a BertModel as GGUF was never compared with llama.cpp; expected LlamaFor"):
        adapter_gguf(version(spec_of(*modules_of(Q))), "BertModel", CONFIG)


def test_a_tied_output_layer_is_refused() -> None:
    artefact = version(spec_of(*modules_of("lm_head")))
    with pytest.raises(ModelError, match="layer lm_head is tied to the embeddings"):
        adapter_gguf(artefact, LLAMA, CONFIG | {"tie_word_embeddings": True})
    assert read(adapter_gguf(artefact, LLAMA, CONFIG)).types.keys() == {"output.weight.lora_a", "output.weight.lora_b"}


def test_a_version_whose_clients_hold_the_rest_is_refused() -> None:
    with pytest.raises(ReleaseError, match="cannot be served"):
        version(spec_of(*modules_of(Q)), servable=False)


FACTORS = random_factors(spec_of(*modules_of(Q)))
A, B = f"{Q}.factor_a", f"{Q}.factor_b"
TENSORS = {
    "dense": (FACTORS | {"model.norm.weight": np.ones(64, np.float32)}, "model.norm.weight is no LoRA factor"),
    "missing": ({A: FACTORS[A]}, r"factor_b has shape None, expected \(64, 8\)"),
    "shape": (FACTORS | {A: FACTORS[A].T}, r"factor_a has shape \(64, 8\), expected \(8, 64\)"),
    "nan": (FACTORS | {B: FACTORS[B] * np.float32("nan")}, "factor_b holds NaN or infinity"),
    "double": (FACTORS | {B: FACTORS[B] * np.float64(1e300)}, "lora_b holds values that f32 cannot; largest is 3.4"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_other_tensors_than_the_spec_says_are_refused(name: str) -> None:
    tensors, message = TENSORS[name]
    with pytest.raises(ModelError, match=message):
        adapter_gguf(version(spec_of(*modules_of(Q)), tensors), LLAMA, CONFIG)


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_values_beyond_float16_are_refused_not_lost(kind: str) -> None:
    artefact = version(spec_of(*modules_of(Q)), FACTORS | {B: FACTORS[B] * np.float32(1e5)})
    with pytest.raises(ModelError, match=f"lora_b holds values that {kind} cannot; largest is 6"):
        adapter_gguf(artefact, LLAMA, CONFIG, kind=kind)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for ask in (exporter, lambda: adapter_gguf(version(spec_of(*modules_of(Q))), LLAMA, CONFIG)):
        with pytest.raises(ReleaseError, match=r"pip install 'federated-peft\[gguf\]'"):
            ask()


def test_a_kind_that_there_is_not() -> None:
    with pytest.raises(
        ReleaseError, match="GGUF factors as 'q4_0' are not written here; expected one of f32, f16, q8_0"
    ):
        exporter("q4_0")


def test_no_room_for_the_file_is_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(ReleaseError, match=r"no GGUF file could be written in .*gone: No such file"):
        adapter_gguf(version(spec_of(*modules_of(Q))), LLAMA, CONFIG)


def on_tiny_llama(base: BaseModel) -> Exportable:
    spec = spec_of(*(replace(module, d_in=32, d_out=32) for module in modules_of(Q, OUT)))
    return Exportable(version(spec, base_digest=base.base_digest), base, TaskConfig(name="causal_lm"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_folder_holds_the_file(kind: str, tmp_path: Path) -> None:
    subject = on_tiny_llama(load_base(ModelConfig(source="tiny:llama")))
    assert export(subject, exporter(kind), tmp_path / "out") == (FILE,)
    found = read((tmp_path / "out" / FILE).read_bytes())
    assert found.fields["general.base_model.0.name"] == "tiny-llama"
    spec = subject.manifest.spec
    dense = truth(spec, random_factors(spec), spec.modules[0], 2)
    assert gap(found.effective("blk.0.attn_q.weight"), dense) < 6e-3


def test_a_base_that_is_no_transformers_model_is_refused(tmp_path: Path) -> None:
    base = base_from_module(torch.nn.Linear(4, 4))
    with pytest.raises(ModelError, match="a Linear as GGUF was never compared"):
        export(on_tiny_llama(base), exporter(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
