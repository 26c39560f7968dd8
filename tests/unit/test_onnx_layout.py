"""What bases and adapters in ONNX agree on: records, and an adapter's tensors as slots hold them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from federated.errors import BaseMismatch, ModelError
from federated.manifest import AdapterSpec, HeadSpec, ModuleSpec, RawTensor
from federated.onnx_layout import AdapterRecord, OnnxBase, OnnxTokenizer, fold

BASE = "b" * 64
RECORD = AdapterRecord(BASE, "a" * 64, "v" * 64)
LAYER = ModuleSpec("layer", 3, 4, 2, 8.0)
SPEC = AdapterSpec("lora", 2, 8.0, False, (LAYER,))
HEAD = HeadSpec("mean_pool", 2, True, 5)
SLOTS = {"layer.factor_a": (0, 3), "layer.factor_b": (4, 0), "head.weight": (2, 4), "head.bias": (2,)}
ONNX = OnnxBase(BASE, {"name": "sensor"}, SLOTS, HEAD, OnnxTokenizer("t" * 64, 0, (2, 3)), {"class": "Tiny"})
RANDOM = np.random.default_rng(1)


def raw(*shape: int) -> RawTensor:
    return RawTensor.from_array(RANDOM.standard_normal(shape).astype(np.float32))


def factors(rank: int = 2) -> dict[str, RawTensor]:
    return {"layer.factor_a": raw(rank, 3), "layer.factor_b": raw(4, rank)}


def given(rank: int = 2, **more: Any) -> dict[str, Any]:
    return {name: tensor.array for name, tensor in factors(rank).items()} | more


@pytest.mark.parametrize("rslora", [False, True])
def test_the_product_of_slots_is_the_effective_update(rslora: bool) -> None:
    tensors, spec = factors(), replace(SPEC, use_rslora=rslora)
    folded = fold(spec, tensors)
    a, b = (tensors[f"layer.{name}"].array.astype(np.float64) for name in ("factor_a", "factor_b"))
    dense = 8.0 / (np.sqrt(2) if rslora else 2) * b @ a
    np.testing.assert_allclose(folded["layer.factor_b"].astype(np.float64) @ folded["layer.factor_a"], dense, rtol=1e-6)
    assert {value.dtype for value in folded.values()} == {np.dtype(np.float32)}


def test_a_core_is_multiplied_in() -> None:
    tensors = factors() | {"layer.core": raw(2, 2)}
    folded = fold(replace(SPEC, peft_type="lora_xs"), tensors)
    a, core, b = (tensors[f"layer.{name}"].array.astype(np.float64) for name in ("factor_a", "core", "factor_b"))
    np.testing.assert_allclose(
        folded["layer.factor_b"].astype(np.float64) @ folded["layer.factor_a"], 4.0 * b @ core @ a, rtol=1e-6
    )


def test_bfloat16_and_a_head_become_float32() -> None:
    spec = AdapterSpec("head", 0, 0.0, False, (), HEAD)
    bits = np.array([0x3FC0, 0xC000], "<u2")  # 1.5 and -2
    folded = fold(spec, {"head.bias": RawTensor("BF16", (2,), bits.tobytes())})
    assert folded["head.bias"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize(
    ("spec", "tensors", "message"),
    [
        (
            replace(SPEC, peft_type="ia3"),
            {},
            "of kind ia3 cannot be given to an ONNX model run by run; expected one of",
        ),
        (SPEC, {"layer.factor_a": raw(2, 3)}, r"layer\.factor_b: found nothing, expected \[4, 2\]"),
        (SPEC, factors(3), r"layer\.factor_a: found \[3, 3\], expected \[2, 3\]"),
        (SPEC, factors() | {"head.bias": raw(2)}, r"has head\.bias besides its factors; expected .*: no head"),
        (replace(SPEC, head=replace(HEAD, trained=False)), factors() | {"x": raw(2)}, "a frozen mean_pool head"),
        (replace(SPEC, head=HEAD), factors(), "has no tensor of its head; expected .*: a trained mean_pool head"),
    ],
)
def test_what_is_not_the_specs_is_named(spec: AdapterSpec, tensors: dict[str, RawTensor], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        fold(spec, tensors)


def test_what_float32_cannot_hold_is_refused() -> None:
    tensors = factors() | {"layer.factor_b": RawTensor.from_array(np.full((4, 2), 3e38, np.float32))}
    with pytest.raises(ModelError, match="values of layer are beyond float32"):
        fold(SPEC, tensors)


def test_records_come_back_as_they_were_written() -> None:
    assert AdapterRecord.from_bytes(RECORD.to_bytes()) == RECORD
    assert OnnxBase.from_json(ONNX.to_json()) == ONNX
    bare = OnnxBase(BASE, {}, {})
    assert OnnxBase.from_json(bare.to_json()) == bare


@pytest.mark.parametrize("data", [b"", b"null", b"[1]", b"{}", b"\xff", b"[" * 100_000])
def test_foreign_bytes_are_no_record(data: bytes) -> None:
    with pytest.raises(ModelError, match="is none of ours"):
        AdapterRecord.from_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "has format 2; this library reads 1"),
        ({"version_id": 7}, "expected .* as texts"),
        ({"more": ""}, r"has the fields \['base_digest', 'more', 'version_id', 'weights_digest'\]"),
    ],
)
def test_a_record_of_another_form_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        AdapterRecord.from_bytes(json.dumps(json.loads(RECORD.to_bytes()) | change).encode())


@pytest.mark.parametrize(
    "change",
    [{"slots": 1}, {"slots": {"a": ["x"]}}, {"head": {"kind": 1}}, {"tokenizer": {}}, {"more": 1}, {"head": 1}],
)
def test_a_damaged_base_record_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="the exported base's record is damaged"):
        OnnxBase.from_json(json.dumps(json.loads(ONNX.to_json()) | change))


def head() -> dict[str, Any]:
    return {"head.weight": np.ones((2, 4), np.float32), "head.bias": np.ones(2, np.float32)}


@pytest.mark.parametrize("rank", [1, 2, 7])
def test_an_adapter_of_any_rank_fits(rank: int) -> None:
    ONNX.check(RECORD, given(rank))
    ONNX.check(RECORD, given(rank) | head())
    ONNX.check(RECORD, head())


def test_an_adapter_of_another_base_is_refused() -> None:
    with pytest.raises(BaseMismatch, match="belongs to the base model cccccccccccc; the exported base is bbbbbbbbbbbb"):
        ONNX.check(replace(RECORD, base_digest="c" * 64), given())


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "sets nothing at all: the base alone would answer"),
        (given() | {"other.factor_a": np.ones((2, 3), np.float32)}, r"sets other\.factor_a and 0 others, for which"),
        ({"layer.factor_a": np.ones((2, 5), np.float32)}, r"to the shape \[2, 5\]; this base has \['rank', 3\]"),
        ({"layer.factor_a": np.ones(3, np.float32)}, r"to the shape \[3\]; this base has \['rank', 3\]"),
        ({"head.bias": np.ones(3, np.float32)}, r"sets head\.bias to the shape \[3\]; this base has \[2\]"),
        ({"layer.factor_a": np.ones((2, 3), np.float32)}, r"sets layer\.factor_a without layer\.factor_b"),
        ({"layer.factor_b": np.ones((4, 2), np.float32)}, r"sets layer\.factor_b without layer\.factor_a"),
        (given(2) | {"layer.factor_b": np.ones((4, 3), np.float32)}, r"factors of layer have ranks \[2, 3\]"),
        (given() | {"head.bias": np.ones(2, np.float32)}, r"a part of the head, without head\.weight"),
    ],
)
def test_an_adapter_that_would_not_do_what_it_should_is_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ONNX.check(RECORD, parameters)
