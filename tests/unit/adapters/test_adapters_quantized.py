"""Quantised bases: what is stored, what it costs, what it answers, and whose fingerprint it has."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from federated.adapters import attach, load_base, share
from federated.adapters.quantized import Int8Linear, Nf4Linear, quantize
from federated.adapters.targets import adaptable, layer_sizes
from federated.config import AdapterConfig, ModelConfig, TaskConfig, TrainConfig
from federated.errors import ModelError
from federated.manifest import TrainPlan
from federated.tasks import make_task
from federated.training import LocalData, LocalTrainer

TASK = TaskConfig(labels=("bad", "good"))
ROWS = [{"text": "late again", "label": 0}, {"text": "thank you", "label": 1}] * 4
KINDS = ["int8", "nf4"]


def quantized(kind: Any, source: str = "tiny:bert") -> Any:
    return load_base(ModelConfig(source=source, quantization=kind))


def layer(rows: int = 48, columns: int = 64, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    made = nn.Linear(columns, rows, bias=bias)
    with torch.no_grad():
        made.weight.normal_(generator=torch.Generator().manual_seed(1))
        made.weight[3] = 0  # a row that is nothing
    return made.to(dtype).requires_grad_(False)


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2)).to(dtype)


def test_eight_bits_are_the_nearest_of_255_levels_of_each_row() -> None:
    full = layer()
    made = Int8Linear(full)
    assert (made.weight.dtype, made.weight.shape) == (torch.int8, (48, 64))
    stored = made.weight.double() * made.scale.double()[:, None]
    assert bool(((stored - full.weight.double()).abs() <= made.scale.double()[:, None] * 0.500001).all())
    assert bool((stored[3] == 0).all())
    assert int(made.weight.abs().amax(1)[0]) == 127


def test_eight_bits_answer_as_their_dense_weights() -> None:
    full = layer()
    made = Int8Linear(full)
    dense = made.weight.double() * made.scale.double()[:, None]
    truth = inputs().double() @ dense.T + full.bias.double()
    torch.testing.assert_close(made(inputs()).double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [Int8Linear, Nf4Linear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_answers_are_close_and_gradients_are_those_of_the_stored_weights(kind: Any, dtype: Any, bias: bool) -> None:
    full = layer(bias=bias, dtype=dtype)
    made = kind(full)
    given = inputs(dtype).requires_grad_()
    answer = made(given)
    assert (answer.dtype, answer.shape) == (dtype, (2, 5, 48))
    truth = full(inputs(dtype)).float()
    limit = 0.02 if kind is Int8Linear else 0.15
    assert float((answer.detach().float() - truth).norm()) < limit * float(truth.norm())
    answer.float().sum().backward()
    stored = made(torch.eye(64, dtype=dtype)).float() - (made.bias.float() if bias else 0)  # W^T, as it is stored
    slack = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.2}
    torch.testing.assert_close(given.grad[0, 0].float(), stored.sum(1), **slack)
    assert made.weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_alone_are_quantised(kind: str) -> None:
    full, made = load_base(ModelConfig()), quantized(kind)
    expected = Int8Linear if kind == "int8" else Nf4Linear
    layers = adaptable(made.model)
    assert layers.keys() == adaptable(full.model).keys()
    assert {type(one) for one in layers.values()} == {expected}
    assert type(made.model.pooler.dense) is nn.Linear
    for name, one in layers.items():
        assert layer_sizes(one) == layer_sizes(full.model.get_submodule(name))
    kept = {name: tensor for name, tensor in full.model.named_parameters() if name.rpartition(".")[0] not in layers}
    assert all(torch.equal(made.model.get_parameter(name), tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("kind", KINDS)
def test_output_embeddings_of_a_language_model_stay(kind: str) -> None:
    made = quantized(kind, "tiny:llama")
    assert type(made.model.lm_head) is nn.Linear
    assert made.model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize(("kind", "share_of_full"), [("int8", 0.28), ("nf4", 0.20)])
def test_it_costs_what_it_says(kind: str, share_of_full: float) -> None:
    full = layer(256, 256)
    made = (Int8Linear if kind == "int8" else Nf4Linear)(full)
    size = sum(one.nbytes for one in [*made.parameters(), *made.buffers()])
    assert size < share_of_full * sum(one.nbytes for one in full.parameters())
    assert quantized(kind).num_bytes < load_base(ModelConfig()).num_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_says_which_weights_and_how(kind: str) -> None:
    full, made = load_base(ModelConfig()), quantized(kind)
    assert (made.quantization, full.quantization) == (kind, None)
    assert made.full_digest == full.base_digest == full.full_digest
    assert len({full.base_digest, quantized("int8").base_digest, quantized("nf4").base_digest}) == 3
    other = load_base(ModelConfig(dtype="bfloat16", quantization=kind))  # type: ignore[arg-type]
    assert other.base_digest != made.base_digest


@pytest.mark.parametrize("kind", KINDS)
def test_the_full_base_in_memory_is_not_touched(kind: str) -> None:
    full = load_base(ModelConfig())
    before = {name: tensor.clone() for name, tensor in full.model.state_dict().items()}
    made = quantized(kind)
    assert made is quantized(kind)
    assert load_base(ModelConfig()) is full
    assert all(torch.equal(tensor, before[name]) for name, tensor in full.model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_trees_share_everything_that_is_stored(kind: str) -> None:
    base = quantized(kind)
    held = {one.data_ptr() for one in [*base.model.parameters(), *base.model.buffers()]}
    tree = share(base)
    assert {one.data_ptr() for one in [*tree.parameters(), *tree.buffers()]} == held
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with torch.no_grad():
        assert torch.equal(tree(**batch)[0], base.model(**batch)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", ["lora", "ia3", "layernorm", "head", "prompt", "prefix"])
def test_adapters_train_on_it(kind: str, adapter: Any) -> None:
    base = quantized(kind)
    options = {"target_modules": "all-linear"} if adapter == "lora" else {}
    model = attach(base, AdapterConfig(kind=adapter, **options), TASK, seed=1)  # type: ignore[arg-type]
    task = make_task(TASK, base.tokenizer)
    config = TrainConfig(steps=30, batch_size=8, learning_rate=0.02, precision="float32")
    features = task.encode(ROWS)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    result = LocalTrainer(model, task, config).run(
        model.read(),
        TrainPlan(rank=8, evaluate_before=True, evaluate_after=True),
        LocalData(features, features),
        seed=1,
    )
    assert result.metrics["eval_after_loss"] < 0.7 * result.metrics["eval_before_loss"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())


@pytest.mark.parametrize("adapter", ["full", "lora_xs"])
def test_kinds_that_read_full_weights_are_refused(adapter: Any) -> None:
    with pytest.raises(ModelError, match=rf"kind {adapter} reads the base's full weights, and tiny:bert is quantised"):
        attach(quantized("int8"), AdapterConfig(kind=adapter), TASK, seed=1)


def test_a_base_without_linear_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="tiny:gpt2 has no Linear layer to quantise"):
        quantized("int8", "tiny:gpt2")


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"needs the quant extra; run: pip install 'federated-peft\[quant\]'"):
        quantize(replace(load_base(ModelConfig())), "nf4")
