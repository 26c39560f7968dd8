"""Merged mode: the dense truth, in copies; the base and the null adapter stay bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from federated.adapters import load_base
from federated.config import AdapterConfig, ModelConfig
from federated.device import NULL, AdapterRuntime, open_runtime
from federated.errors import DeviceError
from federated.state import AdapterState, from_raw
from federated.wire import decode_tensors

Make = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = [{"text": "a long delay and no word"}, {"text": "thank you"}]


def opened(made: Any, real_version: Make) -> tuple[AdapterRuntime, Any]:
    version = real_version(made, 1)
    runtime = open_runtime(version.manifest)
    version.install(runtime)
    return runtime, version


CASES = [
    ("tiny:bert", AdapterConfig(rank=2, target_modules="all-linear")),
    ("tiny:bert", AdapterConfig(kind="lora_xs", rank=3)),
    ("tiny:gpt2", AdapterConfig(rank=2, use_rslora=True)),  # Conv1D, transposed
]


@pytest.mark.parametrize(("source", "adapter"), CASES, ids=["linear", "core", "transposed"])
def test_merged_weights_are_the_dense_truth_in_copies(
    source: str, adapter: AdapterConfig, recipe: Make, real_version: Make
) -> None:
    made = recipe(model=ModelConfig(source=source), adapter=adapter)
    runtime, version = opened(made, real_version)
    base = load_base(made.model).model
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    null = runtime.predict(TEXTS, digest=NULL).predictions
    merged = runtime.merge(version.digest)
    tree = getattr(merged.handle.model, "backbone", merged.handle.model)
    state = AdapterState(version.manifest.spec, from_raw(decode_tensors(version.weights)))
    prefix = str(base.base_model_prefix) + "." if source == "tiny:gpt2" else ""
    for pair in state.pairs():
        name = pair.module.name
        update = pair.scaling * pair.factor_b.double() @ pair.factor_a.double()
        truth = before[f"{name}.weight"].double() + (update.T if pair.module.fan_in_fan_out else update)
        found = tree.get_parameter(f"{name.removeprefix(prefix)}.weight")
        torch.testing.assert_close(found.double(), truth, rtol=1e-7, atol=1e-7)
        assert found.data_ptr() != base.get_parameter(f"{name}.weight").data_ptr()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert runtime.predict(TEXTS, digest=NULL).predictions == null


def test_merged_answers_are_the_adapters(recipe: Make, real_version: Make) -> None:
    runtime, version = opened(recipe(), real_version)
    merged = runtime.merge(version.digest)
    beside = runtime.predict(TEXTS, digest=version.digest).predictions
    found = runtime.predict(TEXTS, digest=merged.digest).predictions
    for one, other in zip(found, beside, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)
    assert found != runtime.predict(TEXTS, digest=NULL).predictions


def test_merged_is_a_slot_of_its_own_that_is_left_for_null(recipe: Make, real_version: Make) -> None:
    runtime, version = opened(recipe(), real_version)
    null = runtime.predict(TEXTS).predictions
    merged = runtime.merge(version.digest)
    assert merged.digest == f"merged:{version.digest}"
    assert merged.version_id == version.version_id
    assert runtime.active.digest == NULL
    runtime.activate(merged.digest)
    assert runtime.predict(TEXTS).slot.digest == merged.digest
    assert runtime.rollback().digest == NULL
    assert runtime.predict(TEXTS).predictions == null
    assert runtime.merge(version.digest) is merged


def test_merged_costs_its_layers_and_shares_the_rest(recipe: Make, real_version: Make) -> None:
    adapter = AdapterConfig(rank=2)
    runtime, version = opened(recipe(adapter=adapter), real_version)
    merged = runtime.merge(version.digest)
    layers = sum(one.d_in * one.d_out * 4 for one in version.manifest.spec.modules)
    head = sum(raw.array.nbytes for name, raw in decode_tensors(version.weights).items() if "classifier" in name)
    assert merged.nbytes == layers + head
    base = load_base(recipe().model).model
    assert merged.handle.model.backbone.embeddings.word_embeddings.weight.data_ptr() == (
        base.embeddings.word_embeddings.weight.data_ptr()
    )


@pytest.mark.parametrize("kind", ["null", "ia3", "head"])
def test_what_has_no_factors_is_not_merged(kind: str, recipe: Make, real_version: Make) -> None:
    adapter = AdapterConfig(rank=2) if kind == "null" else AdapterConfig(kind=kind)
    runtime, version = opened(recipe(adapter=adapter), real_version)
    with pytest.raises(DeviceError, match=f"of kind {kind} has no factors to merge"):
        runtime.merge(NULL if kind == "null" else version.digest)


def test_a_merged_slot_is_neither_merged_nor_read_again(recipe: Make, real_version: Make) -> None:
    runtime, version = opened(recipe(), real_version)
    merged = runtime.merge(version.digest)
    with pytest.raises(DeviceError, match="of kind merged lora has no factors"):
        runtime.merge(merged.digest)
    with pytest.raises(DeviceError, match="a merged lora slot holds no adapter to read"):
        runtime.backend.read(merged.handle)


def test_an_adapter_is_read_back_bit_for_bit(recipe: Make, real_version: Make) -> None:
    adapter = AdapterConfig(rank=2, dtype="bfloat16")
    runtime, version = opened(recipe(adapter=adapter), real_version)
    with runtime.pin(version.digest) as slot:
        spec, tensors = runtime.backend.read(slot.handle)
    assert spec == version.manifest.spec
    stored = decode_tensors(version.weights)
    assert {name: bytes(raw.data) for name, raw in tensors.items()} == {n: bytes(r.data) for n, r in stored.items()}
