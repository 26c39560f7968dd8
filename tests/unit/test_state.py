"""Adapter states: bytes and back bit for bit, factors by module, casts."""

import math
from dataclasses import replace

import pytest
import torch

from federated.errors import AggregationError
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, HeadSpec, ModuleSpec
from federated.residual import product_of
from federated.state import AdapterState, from_raw, group_of, to_raw

MODULES = (ModuleSpec("layer.k", 3, 2, 2, 8.0), ModuleSpec("layer.q", 4, 2, 1, 8.0))
SPEC = AdapterSpec("lora", 2, 8.0, use_rslora=False, modules=MODULES, head=HeadSpec("mean_pool", 2, True, 0))


def state(spec: AdapterSpec = SPEC) -> AdapterState:
    return AdapterState(
        spec,
        {
            "layer.q.factor_a": torch.ones(1, 4),
            "layer.q.factor_b": torch.full((2, 1), 2.0),
            "layer.k.factor_a": torch.full((2, 3), 3.0),
            "layer.k.factor_b": torch.full((2, 2), 4.0),
            "head.weight": torch.full((2, 5), 5.0),
        },
    )


SPECIAL = torch.tensor([0x7FC1, -0x7F, 0x7F80, 1, -0x8000], dtype=torch.int16)


@pytest.mark.parametrize(
    ("tensor", "dtype"),
    [
        (torch.tensor([math.nan, -0.0, math.inf, 1e-45, 1.0]), "F32"),
        (SPECIAL.view(torch.bfloat16), "BF16"),
        (SPECIAL.view(torch.float16), "F16"),
        (torch.tensor([[2.0**-1074, -math.inf]], dtype=torch.float64), "F64"),
        (torch.tensor([2**63 - 1, -(2**63)]), "I64"),
        (torch.tensor([0, 255], dtype=torch.uint8), "U8"),
        (torch.tensor(1.5), "F32"),
        (torch.empty(0, 3), "F32"),
    ],
    ids=["float32", "bfloat16", "float16", "float64", "int64", "uint8", "scalar", "empty"],
)
def test_bytes_and_back_bit_for_bit(tensor: torch.Tensor, dtype: str) -> None:
    raw = to_raw({"w": tensor})
    back = from_raw(raw)["w"]
    assert raw["w"].dtype == dtype
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert to_raw({"w": back})["w"].data == raw["w"].data == _bytes(tensor)


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def test_a_view_is_written_in_row_major_order() -> None:
    grid = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(from_raw(to_raw({"w": grid.T}))["w"], grid.T)


def test_what_is_read_back_is_new_and_writable() -> None:
    original = torch.ones(2, requires_grad=True)
    back = from_raw(to_raw({"w": original}))["w"]
    back += 1
    assert original.tolist() == [1.0, 1.0]
    assert not back.requires_grad


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64], ids=str)
def test_a_dtype_that_cannot_travel_is_named(dtype: torch.dtype) -> None:
    with pytest.raises(AggregationError, match=rf"tensor w has dtype {dtype}; expected one of"):
        to_raw({"w": torch.ones(2, dtype=dtype)})


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("layer.q.factor_a", "factor_a"),
        ("layer.q.factor_b", "factor_b"),
        ("layer.q.core", "core"),
        ("head.weight", "dense"),
        ("factor_a.weight", "dense"),
        ("my_factor_a", "dense"),
    ],
)
def test_group_of(name: str, group: str) -> None:
    assert group_of(name) == group


def test_pairs_come_in_the_spec_s_order_with_their_scaling() -> None:
    adapter = state()
    pairs = list(adapter.pairs())
    assert [pair.module.name for pair in pairs] == ["layer.k", "layer.q"]
    assert [pair.scaling for pair in pairs] == [4.0, 8.0]
    assert pairs[0].factor_a is adapter.tensors["layer.k.factor_a"]
    assert pairs[1].factor_b is adapter.tensors["layer.q.factor_b"]


def cored(dtype: str = "F32") -> AdapterState:
    cores = {"layer.k.core": torch.tensor([[0.0, 1.0], [2.0, 0.5]]), "layer.q.core": torch.full((1, 1), -3.0)}
    tensors = {**state().tensors, **cores}
    return AdapterState(replace(SPEC, peft_type="lora_xs", dtype=dtype), tensors).cast(dtype)


def test_a_core_is_part_of_its_pair() -> None:
    adapter = cored()
    assert [group_of(name) for name in cored().tensors].count("core") == 2
    for pair in adapter.pairs():
        core, factor_a = (adapter.tensors[f"{pair.module.name}.{part}"].double() for part in ("core", "factor_a"))
        assert torch.equal(pair.factor_a, core @ factor_a)
        assert pair.factor_b is adapter.tensors[f"{pair.module.name}.factor_b"]
    assert list(adapter.dense()) == ["head.weight"]


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_version_of_an_adapter_with_a_core_is_plain_lora(dtype: str) -> None:
    world = GlobalState(cored(dtype))
    made, sent = world.export(), world.materialise()
    assert made.spec == replace(SPEC, dtype=dtype)
    assert made.tensors.keys() == state().tensors.keys()
    assert {tensor.dtype for tensor in made.tensors.values()} == {sent.tensors["head.weight"].dtype}
    for plain, whole in zip(made.pairs(), sent.pairs(), strict=True):
        torch.testing.assert_close(
            plain.factor_a.double(), whole.factor_a, rtol=2**-8 if dtype == "BF16" else 1e-6, atol=0
        )
        assert torch.equal(plain.factor_b, whole.factor_b)


def test_core_and_residual_are_exported_together() -> None:
    module = replace(MODULES[0], rank=1, alpha=1.0)
    spec = AdapterSpec("lora", 1, 1.0, use_rslora=False, modules=(module,))
    residual = AdapterState(spec, {"layer.k.factor_a": torch.ones(1, 3), "layer.k.factor_b": torch.ones(2, 1)})
    made = GlobalState(cored(), residual=residual).export()
    for name, product in product_of(replace(cored(), residual=residual)).items():
        torch.testing.assert_close(product_of(made)[name].dense(), product.dense(), rtol=1e-5, atol=1e-5)
    assert made.spec.peft_type == "lora"


def test_an_adapter_with_a_core_has_one_rank() -> None:
    with pytest.raises(AggregationError, match="rank 1 was asked of an adapter with a core"):
        GlobalState(cored()).materialise(1)


def test_dense_is_all_that_is_no_factor() -> None:
    assert list(state().dense()) == ["head.weight"]


def test_the_layout_is_sorted_and_exact() -> None:
    layout = state().layout()
    assert [entry.name for entry in layout] == sorted(state().tensors)
    assert {(entry.name, entry.shape, entry.dtype) for entry in layout} >= {("layer.k.factor_b", (2, 2), "F32")}


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_an_update_of_some_groups_holds_their_tensors_in_float32(dtype: str) -> None:
    layout = state().cast(dtype).update_layout(("factor_b", "dense"))
    assert [entry.name for entry in layout] == ["head.weight", "layer.k.factor_b", "layer.q.factor_b"]
    assert {entry.dtype for entry in layout} == {"F32"}
    assert state().update_layout(()) == ()


def test_cast_changes_the_dtype_and_leaves_the_original() -> None:
    adapter = state()
    half = adapter.cast("BF16")
    assert {tensor.dtype for tensor in half.tensors.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in adapter.tensors.values()} == {torch.float32}


def test_a_cast_leaves_the_residual_and_what_is_extra_as_they_are() -> None:
    beside, extra = state(), {"control": torch.ones(2)}
    half = AdapterState(SPEC, state().tensors, residual=beside, extra=extra).cast("BF16")
    assert half.residual is beside
    assert half.extra is extra
