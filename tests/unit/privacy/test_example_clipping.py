"""The clipped sum against its definition in float64, and against hostile gradients."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from federated.privacy.example_clipping import clipped_sum


def gradients(count=6, scale=1.0):
    generator = torch.Generator().manual_seed(count)
    shapes = {"a": (3, 4), "b": (5,), "c": ()}
    return {name: torch.randn(count, *shape, generator=generator) * scale for name, shape in shapes.items()}


def dense(made, clip_norm):
    flat = torch.cat([one.double().reshape(len(one), -1) for one in made.values()], dim=1)
    norms = flat.norm(dim=1)
    kept = (flat * (clip_norm / norms).clamp(max=1.0)[:, None]).sum(0)
    return kept, norms


@given(st.floats(1e-3, 1e3), st.floats(1e-4, 1e4), st.integers(1, 9))
def test_it_is_its_definition(clip_norm, scale, count):
    made = gradients(count, scale)
    expected, norms = dense(made, clip_norm)
    found = clipped_sum(made, clip_norm)
    flat = torch.cat([one.flatten() for one in found.tensors.values()])
    torch.testing.assert_close(flat.double(), expected, rtol=1e-4, atol=1e-5 * count * min(clip_norm, scale))
    torch.testing.assert_close(found.norms, norms, rtol=1e-5, atol=0)


@given(st.floats(1e-3, 1e3), st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e20, 1e37]))
def test_one_example_is_bounded_whatever_it_is(clip_norm, scale):
    found = clipped_sum(gradients(1, scale), clip_norm)
    size = math.sqrt(sum(float((one.double() ** 2).sum()) for one in found.tensors.values()))
    assert size <= clip_norm * (1 + 1e-5)
    if scale == 1e37:  # its square is no float32
        assert size == pytest.approx(clip_norm, rel=1e-5)


def test_all_tensors_are_under_one_clip():
    made = {"a": torch.full((1, 1), 3.0), "b": torch.full((1, 1), 4.0)}
    found = clipped_sum(made, 1.0)
    assert float(found.tensors["a"]) == pytest.approx(0.6)
    assert float(found.tensors["b"]) == pytest.approx(0.8)
    assert found.norms.tolist() == pytest.approx([5.0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_example_that_is_not_finite_adds_nothing(bad):
    made, clean = gradients(), gradients()
    made["b"][2, 1] = bad
    others = {name: torch.cat([one[:2], one[3:]]) for name, one in clean.items()}
    found, expected = clipped_sum(made, 1.0), clipped_sum(others, 1.0)
    for name in others:
        torch.testing.assert_close(found.tensors[name], expected.tensors[name])
    assert found.norms.isnan().tolist() == [index == 2 for index in range(6)]


def test_zero_gradients_add_zero():
    found = clipped_sum({"a": torch.zeros(3, 2)}, 1.0)
    assert found.tensors["a"].tolist() == [0.0, 0.0]
    assert found.norms.tolist() == [0.0] * 3


def test_float64_stays():
    found = clipped_sum({"a": torch.ones(3, 2, dtype=torch.float64)}, 1.0)
    assert found.tensors["a"].dtype == torch.float64
