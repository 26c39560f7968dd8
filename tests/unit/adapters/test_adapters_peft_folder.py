"""PEFT's own folders are read with equal outputs; whatever else such a folder may hold is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from federated.adapters import load_base, read_peft, shell
from federated.adapters.tiny import tiny_model
from federated.config import ModelConfig, TaskConfig
from federated.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's, with transformers

TEXT = TaskConfig(name="causal_lm")
LABELS = TaskConfig(labels=("bad", "good"))


def peft_folder(folder: Path, kind: str = "llama", **settings: Any) -> tuple[Path, Any]:
    """What peft saves of a random adapter, and the model that it is on."""
    model, _ = tiny_model(kind)
    targets = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"], "gpt2": ["c_attn"]}[kind]
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": False} | settings)
    wrapped = get_peft_model(model, config).eval()
    wrapped.save_pretrained(folder)
    return folder, wrapped


def base(kind: str = "llama") -> Any:
    return load_base(ModelConfig(source=f"tiny:{kind}"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return peft_folder(tmp_path / "peft")[0]


def change(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def tensors(folder: Path, edit: Any) -> None:
    path = folder / "adapter_model.safetensors"
    found = load_file(path)
    edit(found)
    save_file(found, path)


def refused(folder: Path, match: str, kind: str = "llama", task: TaskConfig = TEXT) -> None:
    with pytest.raises(ModelError, match=match):
        read_peft(folder, base(kind), task, seed=0)


@pytest.mark.parametrize(("kind", "rslora"), [("llama", False), ("llama", True), ("gpt2", False)])
def test_outputs_are_peft_s(tmp_path: Path, kind: str, rslora: bool) -> None:
    folder, theirs = peft_folder(tmp_path / "peft", kind, use_rslora=rslora)
    config, state = read_peft(folder, base(kind), TEXT, seed=0)
    ours = shell(base(kind), state.spec)
    ours.write(state)
    ids = torch.arange(1, 13).reshape(2, 6)
    with torch.no_grad():
        expected, found = theirs(input_ids=ids).logits, ours.model(input_ids=ids).logits
        plain = base(kind).model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(plain, expected, atol=1e-3)
    assert (config.rank, config.alpha, config.use_rslora, config.kind) == (4, 6.0, rslora, "lora")


def test_a_classifier_s_backbone_is_found_behind_its_prefix(tmp_path: Path) -> None:
    folder, _ = peft_folder(tmp_path / "peft", "bert")
    tensors(folder, lambda found: _renamed(found, "base_model.model.", "base_model.model.bert."))
    config, state = read_peft(folder, base("bert"), LABELS, seed=0)
    assert {module.name.rsplit(".", 1)[-1] for module in state.spec.modules} == {"query", "value"}
    assert state.spec.head is not None and state.spec.head.trained
    assert config.train_head


def classifier_folder(folder: Path, **settings: Any) -> tuple[Path, Any]:
    """What peft saves of an adapter on transformers' own classifier, whose head it trains."""
    from transformers import AutoModelForSequenceClassification

    features, _ = tiny_model("bert")
    torch.manual_seed(2)
    model = AutoModelForSequenceClassification.from_config(features.config)
    model.bert.load_state_dict(features.state_dict())
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False, **settings)
    wrapped = get_peft_model(model, config).eval()
    wrapped.save_pretrained(folder)
    return folder, wrapped


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["pooler"]}], ids=["head", "head and pooler"])
def test_a_head_comes_along(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder, theirs = classifier_folder(tmp_path / "peft", **settings)
    task = replace(LABELS, head="stock")
    _, state = read_peft(folder, base("bert"), task, seed=0)
    ours = shell(base("bert"), state.spec)
    ours.write(state)
    ids = torch.arange(1, 13).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours.model(input_ids=ids), theirs(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "gone", "match"),
    [({}, "classifier.bias", r"classifier\.bias of the task's head is missing"),
     ({"modules_to_save": ["pooler"]}, "bert.pooler.dense.bias", r"pooler\.dense\.bias of the task's head is missing")],
)  # fmt: skip
def test_half_a_head_is_refused(tmp_path: Path, settings: dict[str, Any], gone: str, match: str) -> None:
    folder, _ = classifier_folder(tmp_path / "peft", **settings)
    tensors(folder, lambda found: found.pop(f"base_model.model.{gone}"))
    refused(folder, match, kind="bert", task=replace(LABELS, head="stock"))


@pytest.mark.parametrize("saved", [["lm_head"], ["classifier", "bert.embeddings"], "classifier", {"classifier": 1}])
def test_other_modules_than_the_head_s_are_refused(tmp_path: Path, saved: Any) -> None:
    folder, _ = classifier_folder(tmp_path / "peft")
    change(folder, modules_to_save=saved)
    refused(folder, "modules of the task's head alone", kind="bert", task=replace(LABELS, head="stock"))


def _renamed(found: dict[str, Any], old: str, new: str) -> None:
    for name in list(found):
        found[name.replace(old, new, 1)] = found.pop(name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays(folder: Path, dtype: torch.dtype) -> None:
    tensors(folder, lambda found: found.update({name: one.to(dtype) for name, one in found.items()}))
    _, state = read_peft(folder, base(), TEXT, seed=0)
    assert {one.dtype for one in state.tensors.values()} == {dtype}


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.score.modules_to_save.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.../../x.lora_A.weight",
    ],
)
def test_foreign_tensors_are_refused(folder: Path, name: str) -> None:
    tensors(folder, lambda found: found.update({name: torch.ones(2, 2)}))
    refused(folder, "is no LoRA factor")


def test_a_layer_that_the_base_does_not_have(folder: Path) -> None:
    tensors(folder, lambda found: _renamed(found, "layers.0", "layers.77"))
    refused(folder, "which tiny:llama does not have")


def test_two_pairs_for_one_layer(folder: Path) -> None:
    def twice(found: dict[str, Any]) -> None:
        name = next(iter(found))
        for factor in "AB":
            one = name.replace("lora_A", f"lora_{factor}").replace("lora_B", f"lora_{factor}")
            found[one.replace("base_model.model.", "base_model.model.x.", 1)] = found[one].clone()

    tensors(folder, twice)
    refused(folder, "two pairs of factors for one layer")


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda found: found.pop(next(iter(found))), "expected both of each"),
        (lambda found: found.clear(), "no layer has lora_A"),
        (
            lambda found: found.update({name: one[:, :-1].clone() for name, one in found.items()}),
            "the factors have shapes",
        ),
        (lambda found: next(iter(found.values())).fill_(float("nan")), "NaN or infinity"),
        (lambda found: found.update({next(iter(found)): next(iter(found.values())).double()}), "dtypes"),
    ],
)
def test_factors_that_do_not_fit(folder: Path, edit: Any, match: str) -> None:
    tensors(folder, edit)
    refused(folder, match)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"peft_type": "IA3"}, "expected LORA"),
        ({"bias": "all"}, "expected LORA and none"),
        ({"use_dora": True}, "use_dora = 'True' is not understood"),
        ({"modules_to_save": ["score"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"megatron_config": {"import": "os"}}, "megatron_config"),
        ({"something_new": 1}, "something_new"),
        ({"init_lora_weights": "pissa"}, "changes the base model"),
        ({"r": 0}, "positive integer"),
        ({"r": "4"}, "positive integer"),
        ({"use_rslora": 1}, "true or false"),
        ({"lora_alpha": -1}, "positive number"),
        ({"lora_alpha": None}, "positive number"),
        ({"r": 2}, "the factors have shapes"),
    ],
)
def test_settings_that_are_not_understood(folder: Path, settings: dict[str, Any], match: str) -> None:
    change(folder, **settings)
    refused(folder, match)


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b"{" * 100_000])
def test_a_config_that_is_no_object(folder: Path, data: bytes) -> None:
    (folder / "adapter_config.json").write_bytes(data)
    refused(folder, "no JSON object")


def test_a_config_that_is_too_large_or_missing(folder: Path) -> None:
    (folder / "adapter_config.json").write_bytes(b" " * (2**20 + 1))
    refused(folder, "more than 1048576 bytes")
    (folder / "adapter_config.json").unlink()
    refused(folder, "expected a PEFT folder")


@pytest.mark.parametrize(
    ("name", "match"), [("adapter_model.bin", "only pickled weights"), ("notes.txt", "no weights")]
)
def test_pickled_or_missing_weights(folder: Path, name: str, match: str) -> None:
    (folder / "adapter_model.safetensors").rename(folder / name)
    refused(folder, match)


def test_weights_that_are_a_pickle_by_another_name(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"\x80\x04N." * 10)
    refused(folder, "cannot be read as safetensors")


def test_layers_outside_of_what_a_task_trains(tmp_path: Path) -> None:
    folder, _ = peft_folder(tmp_path / "peft")
    refused(folder, "kind|does not have|besides", kind="bert", task=LABELS)
