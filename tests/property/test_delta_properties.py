"""Laws of delta arithmetic on arbitrary float32 tensors."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from federated.delta import add, apply, is_finite, norm, scale, subtract
from federated.errors import AggregationError
from federated.manifest import AdapterSpec
from federated.state import AdapterState

SPEC = AdapterSpec("lora", 1, 1.0, use_rslora=False, modules=())
SHAPES = st.dictionaries(st.text("abc.", min_size=1, max_size=3), hnp.array_shapes(max_dims=3, max_side=3), max_size=4)
VALUES = st.floats(-1e6, 1e6, width=32)
quick = settings(max_examples=60, deadline=None)


@st.composite
def groups(draw: st.DrawFn, count: int, values: st.SearchStrategy[float] = VALUES) -> list[dict[str, torch.Tensor]]:
    """``count`` mappings of the same names and shapes."""
    shapes = draw(SHAPES)
    return [
        {name: torch.from_numpy(draw(hnp.arrays("<f4", shape, elements=values))) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@quick
@given(groups(2))
def test_applying_a_difference_comes_back(pair: list[dict[str, torch.Tensor]]) -> None:
    before, after = pair
    back = apply(AdapterState(SPEC, before), subtract(after, before)).tensors
    for name in after:
        largest = torch.maximum(after[name].abs(), before[name].abs())
        assert ((back[name] - after[name]).abs() <= 2.0**-22 * largest).all()


@quick
@given(groups(2, st.integers(-(2**20), 2**20).map(float)))
def test_applying_a_difference_is_exact_where_float32_is(pair: list[dict[str, torch.Tensor]]) -> None:
    before, after = pair
    assert same(apply(AdapterState(SPEC, before), subtract(after, before)).tensors, after)


@quick
@given(groups(2))
def test_adding_commutes(pair: list[dict[str, torch.Tensor]]) -> None:
    assert same(add(pair[0], pair[1]), add(pair[1], pair[0]))


@quick
@given(groups(2))
def test_a_difference_is_its_mirror_s_negative(pair: list[dict[str, torch.Tensor]]) -> None:
    assert same(subtract(pair[0], pair[1]), scale(subtract(pair[1], pair[0]), -1.0))


@quick
@given(groups(1))
def test_zero_stays_zero(one: list[dict[str, torch.Tensor]]) -> None:
    (state,) = one
    zero = subtract(state, state)
    assert norm(zero) == 0.0
    assert norm(scale(zero, 1e30)) == 0.0
    assert same(add(state, zero), state)
    assert same(scale(state, 1.0), state)
    assert norm(scale(state, 0.0)) == 0.0


@quick
@given(groups(2))
def test_the_norm_is_a_norm(pair: list[dict[str, torch.Tensor]]) -> None:
    left, right = pair
    assert norm(add(left, right)) <= (norm(left) + norm(right)) * (1 + 1e-6) + 1e-30
    assert norm(scale(left, -2.0)) == 2.0 * norm(left)
    assert is_finite(left)


@quick
@given(groups(1), groups(1))
def test_different_names_or_shapes_never_combine(
    one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]
) -> None:
    (left,), (right,) = one, other
    agree = {name: tensor.shape for name, tensor in left.items()} == {n: t.shape for n, t in right.items()}
    for operation in (add, subtract):
        try:
            found = operation(left, right)
        except AggregationError:
            assert not agree
        else:
            assert agree
            assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in left.items()}
