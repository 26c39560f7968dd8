"""Arithmetic on named tensors: float32 out, inputs untouched, nothing broadcast."""

import math

import pytest
import torch

from federated.delta import Update, add, apply, is_finite, norm, scale, subtract
from federated.errors import AggregationError
from federated.manifest import AdapterSpec, ModuleSpec
from federated.state import AdapterState

SPEC = AdapterSpec("lora", 2, 4.0, use_rslora=False, modules=(ModuleSpec("q", 3, 2, 2, 4.0),))


def tensors(value: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {
        "q.factor_a": torch.full((2, 3), value, dtype=dtype),
        "q.factor_b": torch.full((2, 2), -value, dtype=dtype),
    }


BINARY = [subtract, add, lambda left, right: apply(AdapterState(SPEC, left), right).tensors]
BINARY_NAMES = ["subtract", "add", "apply"]
binary = pytest.mark.parametrize("operation", BINARY, ids=BINARY_NAMES)


def test_subtract_is_after_minus_before() -> None:
    found = subtract({"w": torch.tensor([3.0, 5.0])}, {"w": torch.tensor([1.0, 7.0])})
    assert found["w"].tolist() == [2.0, -2.0]


def test_add_and_scale() -> None:
    assert add({"w": torch.tensor([3.0])}, {"w": torch.tensor([-1.0])})["w"].tolist() == [2.0]
    assert scale({"w": torch.tensor([3.0])}, -0.5)["w"].tolist() == [-1.5]


def test_apply_moves_forward_and_keeps_the_spec() -> None:
    moved = apply(AdapterState(SPEC, tensors(1.0)), tensors(0.5))
    assert moved.spec is SPEC
    assert moved.tensors["q.factor_a"].unique().tolist() == [1.5]
    assert moved.tensors["q.factor_b"].unique().tolist() == [-1.5]


@binary
def test_missing_and_extra_names_are_refused_and_named(operation) -> None:
    other = {"q.factor_a": torch.ones(2, 3), "stranger": torch.ones(2, 2)}
    with pytest.raises(AggregationError, match=r"missing \['q.factor_b'\], unexpected \['stranger'\]"):
        operation(tensors(), other)


@binary
@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 1), (1,), (), (2, 3, 1), (3, 2)], ids=str)
def test_no_shape_is_broadcast(operation, shape: tuple[int, ...]) -> None:
    other = {**tensors(), "q.factor_a": torch.ones(shape)}
    with pytest.raises(AggregationError, match=r"q\.factor_a: found shape .* expected \(2, 3\)"):
        operation(tensors(), other)


@binary
def test_the_smaller_shape_on_the_left_is_refused_too(operation) -> None:
    with pytest.raises(AggregationError, match="found shape"):
        operation({**tensors(), "q.factor_a": torch.ones(3)}, tensors())


@binary
def test_names_and_not_positions_are_matched(operation) -> None:
    left = {"a": torch.tensor([1.0]), "b": torch.tensor([10.0])}
    right = {"b": torch.tensor([20.0]), "a": torch.tensor([2.0])}
    found, swapped = operation(left, right), operation(dict(reversed(left.items())), right)
    assert {name: value.item() for name, value in found.items()} == {n: v.item() for n, v in swapped.items()}


@binary
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float32], ids=str)
def test_any_dtype_gives_float32(operation, dtype: torch.dtype) -> None:
    found = operation(tensors(1.5, dtype), tensors(0.5, torch.float32))
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_bfloat16_is_widened_before_it_is_subtracted() -> None:
    """In bfloat16 the difference 1.0078125 - 0.001 would round back to 1.0078125."""
    after, before = torch.tensor([1.0078125], dtype=torch.bfloat16), torch.tensor([0.0010], dtype=torch.float32)
    assert subtract({"w": after}, {"w": before})["w"].item() == pytest.approx(1.0068125, abs=1e-7)


def test_scale_widens_first() -> None:
    found = scale({"w": torch.tensor([1.0], dtype=torch.bfloat16)}, 1.001)["w"]
    assert (found.dtype, found.item()) == (torch.float32, pytest.approx(1.001, abs=1e-7))


@pytest.mark.parametrize("operation", [*BINARY, lambda left, _: scale(left, 1.0)], ids=[*BINARY_NAMES, "scale"])
def test_inputs_are_untouched_and_not_shared(operation) -> None:
    left, right = tensors(1.0), tensors(0.0)
    found = operation(left, right)
    for tensor in found.values():
        tensor.add_(100.0)
    assert [left["q.factor_a"].unique().item(), right["q.factor_a"].unique().item()] == [1.0, 0.0]
    assert left["q.factor_b"].unique().item() == -1.0


@binary
def test_nothing_and_nothing_is_nothing(operation) -> None:
    assert operation({}, {}) == {}


def test_norm_is_of_all_tensors_together() -> None:
    assert norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])}) == 5.0


def test_norm_of_nothing_is_zero() -> None:
    assert norm({}) == 0.0
    assert norm({"w": torch.zeros(2, 2)}) == 0.0


def test_norm_does_not_overflow_where_float32_would() -> None:
    assert norm({"w": torch.full((2,), 3e38)}) == pytest.approx(3e38 * math.sqrt(2), rel=1e-6)


def test_norm_does_not_lose_small_values_in_float16() -> None:
    assert norm({"w": torch.full((4,), 1e-6, dtype=torch.float16)}) > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_value_is_found(bad: float) -> None:
    hidden = torch.ones(4, 4)
    hidden[2, 3] = bad
    assert not is_finite({"a": torch.ones(2), "b": hidden})


def test_finite_and_empty_are_finite() -> None:
    assert is_finite({"a": torch.tensor([3e38, -3e38, 0.0])})
    assert is_finite({})


def test_an_update_names_its_sender_and_defaults_to_no_claims() -> None:
    update = Update("clinic", tensors(), num_examples=3)
    assert (update.round_number, update.payload_digest, dict(update.metrics)) == (0, "", {})
