"""Bases in ONNX against torch and peft: adapters, another rank, the null adapter; and what cannot be exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from federated.adapters import BaseModel, attach, base_from_module, load_base, null_model, shell, spec_for
from federated.adapters import onnx_base as exporter
from federated.adapters.onnx_base import write_onnx_base
from federated.adapters.onnx_text import check_generation, stop_ids, tokenizer_json
from federated.config import AdapterConfig, ModelConfig, TaskConfig
from federated.errors import ModelError
from federated.manifest import AdapterSpec
from federated.onnx_adapter import write_adapter
from federated.onnx_layout import ANSWERED_BY, LOGITS, METADATA, NO_ADAPTER, AdapterRecord, OnnxBase, fold
from federated.state import AdapterState, to_raw

LABELS = TaskConfig(labels=("bad", "good", "mixed"))
STOCK = replace(LABELS, head="stock")
TEXT = TaskConfig(name="causal_lm", max_length=16)
SENSOR = TaskConfig(name="sensor", labels=("still", "moving"))
EVERY = AdapterConfig(rank=4, alpha=6.0, target_modules="all-linear")


@dataclass
class Exported:
    """A base on disk, asked through files alone."""

    base: BaseModel
    task: TaskConfig
    folder: Path

    def __post_init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        path = str(self.folder / "base.onnx")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        random = torch.Generator().manual_seed(3)
        self.mask = torch.ones(3, 9, dtype=torch.long)
        self.mask[1, 4:] = 0
        if self.base.kind == "module":
            self.first = torch.randn(3, 9, 3, generator=random)
        else:
            self.first = torch.randint(5, 200, (3, 9), generator=random)

    @property
    def names(self) -> tuple[str, str]:
        return ("values" if self.base.kind == "module" else "input_ids", "attention_mask")

    def torch(self, model: nn.Module) -> np.ndarray:
        with torch.no_grad():
            output = model(**dict(zip(self.names, (self.first, self.mask), strict=True)))
        return self._real(getattr(output, "logits", output).numpy())

    def onnx(self, file: Path | None = None) -> tuple[np.ndarray, bytes]:
        options, adapter = onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
        if file is not None:
            adapter.Load(str(file))
            options.add_active_adapter(adapter)
        given = dict(zip(self.names, (self.first.numpy(), self.mask.numpy()), strict=True))
        logits, answered_by = self.session.run([LOGITS, ANSWERED_BY], given, options)
        return self._real(logits), answered_by.tobytes()

    def _real(self, logits: np.ndarray) -> np.ndarray:
        """Without what a language model says on padding."""
        return logits[self.mask.bool().numpy()] if self.task.name == "causal_lm" else logits


def filled(
    base: BaseModel, spec: AdapterSpec, seed: int, size: float = 0.3
) -> tuple[nn.Module, Mapping[str, torch.Tensor]]:
    model, random = shell(base, spec), torch.Generator().manual_seed(seed)
    tensors = {name: size * torch.randn(one.shape, generator=random) for name, one in model.masters().items()}
    model.write(AdapterState(spec, tensors))
    return model.model, tensors


def prove(exported: Exported, spec: AdapterSpec, folder: Path, size: float = 0.3) -> None:
    """Two adapters, one of another rank, and none at all: the logits of torch with peft, through files."""
    base, answers, within = exported.base, [], 1e-5
    for seed, one in enumerate((spec, spec, spec.with_rank(1), spec.with_rank(7)), start=1):
        model, tensors = filled(base, one, seed, size)
        record = AdapterRecord(base.base_digest, str(seed) * 64)
        write_adapter(folder / f"{seed}.onnx_adapter", record, fold(one, to_raw(tensors)))
        found, answered_by = exported.onnx(folder / f"{seed}.onnx_adapter")
        np.testing.assert_allclose(found, exported.torch(model), rtol=0, atol=within)
        assert answered_by == record.to_bytes()
        answers.append(found)
    found, answered_by = exported.onnx()
    np.testing.assert_allclose(
        found, exported.torch(null_model(base, exported.task, seed=spec.head.seed if spec.head else 0)), atol=within
    )
    assert answered_by == NO_ADAPTER
    assert all(np.abs(found - answer).max() > 100 * within for answer in answers)


def exported(
    source: str, task: TaskConfig, folder: Path, adapter: AdapterConfig = EVERY
) -> tuple[Exported, AdapterSpec]:
    base = load_base(ModelConfig(source=source))
    spec = spec_for(base, adapter, task, seed=5)
    write_onnx_base(base, spec, task, folder)
    return Exported(base, task, folder), spec


@pytest.mark.parametrize(
    ("source", "task"),
    [
        ("tiny:bert", LABELS),
        ("tiny:bert", STOCK),
        ("tiny:llama", TEXT),
        ("tiny:llama", LABELS),
        ("tiny:gpt2", TEXT),
        ("tiny:gpt2", STOCK),
        ("tiny:sensor", SENSOR),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.name}-{value.head}",
)
def test_adapters_on_an_exported_base_answer_as_torch_and_peft(source: str, task: TaskConfig, tmp_path: Path) -> None:
    whole, spec = exported(source, task, tmp_path)
    prove(whole, spec, tmp_path)


@pytest.mark.slow
def test_the_bundled_model_answers_as_torch_and_peft(tmp_path: Path) -> None:
    whole, spec = exported("asset:minilm", LABELS, tmp_path)
    prove(whole, spec, tmp_path, size=0.05)  # updates a sixth of the layers: beyond, float32 itself is 1e-5 off


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    whole, spec = exported("tiny:bert", LABELS, tmp_path, AdapterConfig(rank=3, target_modules=("query",)))
    record = OnnxBase.from_json(whole.session.get_modelmeta().custom_metadata_map[METADATA])
    assert (record.base_digest, record.base) == (whole.base.base_digest, whole.base.parts)
    assert record.task["labels"] == ["bad", "good", "mixed"]
    assert record.slots == {
        **{f"{module.name}.factor_a": (0, 32) for module in spec.modules},
        **{f"{module.name}.factor_b": (32, 0) for module in spec.modules},
        "classifier.bias": (3,),
        "classifier.weight": (3, 32),
    }
    assert (tmp_path / "tokenizer.json").read_bytes() == tokenizer_json(whole.base.tokenizer)


def test_an_adapter_of_a_head_alone_needs_no_layer(tmp_path: Path) -> None:
    whole, spec = exported("tiny:sensor", SENSOR, tmp_path, AdapterConfig(kind="head"))
    model, tensors = filled(whole.base, spec, 1)
    write_adapter(
        tmp_path / "a.onnx_adapter", AdapterRecord(whole.base.base_digest, "a" * 64), fold(spec, to_raw(tensors))
    )
    np.testing.assert_allclose(whole.onnx(tmp_path / "a.onnx_adapter")[0], whole.torch(model), atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx_adapter", "base.onnx"]


def test_large_weights_go_into_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "_LARGEST_FILE", 1000)
    whole, spec = exported("tiny:bert", LABELS, tmp_path)
    assert (tmp_path / "base.onnx.data").stat().st_size > (tmp_path / "base.onnx").stat().st_size
    model, tensors = filled(whole.base, spec, 1)
    write_adapter(
        tmp_path / "a.onnx_adapter", AdapterRecord(whole.base.base_digest, "a" * 64), fold(spec, to_raw(tensors))
    )
    np.testing.assert_allclose(whole.onnx(tmp_path / "a.onnx_adapter")[0], whole.torch(model), atol=1e-5)


class _Steps(nn.Module):
    """A base whose number of time steps a trace takes for a constant."""

    hidden_size = 8

    def __init__(self, channels: int | None = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 8)
        if channels:
            self.channels = channels

    def forward(self, values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.layer(values) * float(values.shape[1]))


class _Unknown(_Steps):
    """A base with an operation that ONNX does not know."""

    def forward(self, values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(self.layer(values))


class _Idle(_Steps):
    """A base that never asks one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(3, 8)

    def forward(self, values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.layer(values)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_Steps(), "the exported model's logits differ from torch's by"),
        (_Unknown(), "torch cannot export _Unknown to ONNX: .*bessel_j0"),
        (_Idle(), r"does not use idle\.factor_a as the adapter does"),
        (_Steps(channels=None), "does not say how many channels it reads"),
        (_Steps().to(torch.bfloat16), r"the base model is torch\.bfloat16; a float32 one is exported"),
    ],
    ids=["constant", "unknown", "idle", "channels", "dtype"],
)
def test_what_cannot_be_exported_is_refused(model: nn.Module, message: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = base_from_module(model)
    spec = spec_for(base, AdapterConfig(rank=2, target_modules="all-linear"), SENSOR, seed=5)
    with pytest.raises(ModelError, match=message):
        write_onnx_base(base, spec, SENSOR, tmp_path)


def test_a_kind_without_slots_is_refused(tmp_path: Path) -> None:
    base = load_base(ModelConfig(source="tiny:bert"))
    spec = attach(base, AdapterConfig(kind="ia3"), LABELS, seed=5).spec
    with pytest.raises(ModelError, match="of kind ia3 cannot be given to an ONNX model"):
        write_onnx_base(base, spec, LABELS, tmp_path)


@pytest.mark.parametrize(("name", "value"), [("repetition_penalty", 1.2), ("suppress_tokens", [1]), ("num_beams", 4)])
def test_settings_that_change_a_continuation_are_refused(name: str, value: Any) -> None:
    model: Any = SimpleNamespace(generation_config=SimpleNamespace(**{name: value}))
    with pytest.raises(ModelError, match=f"generation_config sets {name} = "):
        check_generation(model)


@pytest.mark.parametrize(("found", "expected"), [(None, ()), (2, (2,)), ([7, 2], (2, 7))])
def test_stop_tokens_are_those_of_the_models_own_generation(found: Any, expected: tuple[int, ...]) -> None:
    assert stop_ids(SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=found))) == expected  # type: ignore[arg-type]


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(ModelError, match="has a slow tokenizer"):
        tokenizer_json(SimpleNamespace())


def test_the_exported_graph_is_valid_and_small_enough(tmp_path: Path) -> None:
    whole, _ = exported("tiny:sensor", SENSOR, tmp_path)
    model = onnx.load(tmp_path / "base.onnx")
    onnx.checker.check_model(model, full_check=True)
    weights = sum(tensor.numel() for tensor in whole.base.model.parameters()) * 4
    assert (tmp_path / "base.onnx").stat().st_size < weights + 30_000
