"""Low-rank algebra against dense float64 truth."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from federated.errors import AggregationError
from federated.lowrank import (
    LowRank,
    Spectrum,
    balanced_factors,
    decompose,
    effective,
    gram,
    inner,
    norm_of,
    rank_for_energy,
    sketch,
    stack,
    sum_of,
    sum_streaming,
    truncate,
)
from federated.manifest import AdapterSpec, ModuleSpec
from federated.state import AdapterState, LoraPair

SHAPES = [(7, 5, 2), (5, 7, 2), (6, 6, 6), (4, 9, 4), (9, 4, 1), (3, 3, 5), (1, 8, 2)]
"""d_out, d_in, k: wide, tall, square, rank equal to a dimension, rank beyond both, a single row."""

shapes = pytest.mark.parametrize(("d_out", "d_in", "rank"), SHAPES)


def product(d_out: int, d_in: int, rank: int, *, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(d_out, rank, generator=generator, dtype=torch.float64)
    return LowRank(left, torch.randn(rank, d_in, generator=generator, dtype=torch.float64))


def rebuilt(found: Spectrum) -> Tensor:
    return (found.u * found.s) @ found.v.T


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    return float((found - expected).norm()) <= tolerance * max(1.0, float(expected.norm()))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_the_effective_update_carries_its_scaling(use_rslora: bool, fan_in_fan_out: bool) -> None:
    module = ModuleSpec("q", 5, 7, 4, 6.0, fan_in_fan_out)
    spec = AdapterSpec("lora", 4, 6.0, use_rslora, (module,))
    factor_a, factor_b = torch.randn(4, 5), torch.randn(7, 4)
    (pair,) = AdapterState(spec, {"q.factor_a": factor_a, "q.factor_b": factor_b}).pairs()
    scaling = 6 / (2 if use_rslora else 4)
    assert effective(pair).shape == (7, 5)
    assert close(effective(pair).dense(), scaling * factor_b.double() @ factor_a.double())


def test_bfloat16_factors_are_widened_before_anything_is_computed() -> None:
    factor_a, factor_b = torch.randn(2, 5).bfloat16(), torch.randn(7, 2).bfloat16()
    module = ModuleSpec("q", 5, 7, 2, 3.0)
    found = effective(LoraPair(module, factor_a, factor_b, 1.5))
    assert close(found.dense(), 1.5 * factor_b.double() @ factor_a.double())


@shapes
def test_a_weighted_sum_is_exact(d_out: int, d_in: int, rank: int) -> None:
    parts = [product(d_out, d_in, max(1, rank - index), seed=index) for index in range(3)]
    weights = (0.5, 0.2, -0.3)
    truth = sum(weight * part.dense() for weight, part in zip(weights, parts, strict=True))
    found = sum_of(zip(weights, parts, strict=True))
    assert found.stacked_rank == sum(part.stacked_rank for part in parts)
    assert close(found.dense(), truth)


def falling(d_out: int, d_in: int, count: int) -> list[tuple[float, LowRank]]:
    """Terms of several ranks."""
    ranks = [1 + index % 4 for index in range(count)]
    return [(1.0 / (1 + index), product(d_out, d_in, rank, seed=index)) for index, rank in enumerate(ranks)]


@pytest.mark.parametrize(("d_out", "d_in"), [(7, 5), (5, 7), (6, 6), (1, 8), (9, 1), (40, 12)])
@pytest.mark.parametrize("count", [1, 2, 5, 60])
def test_a_sum_in_bounded_memory_is_the_sum(d_out: int, d_in: int, count: int) -> None:
    terms = falling(d_out, d_in, count)
    found = sum_streaming(iter(terms))
    assert found.lost == 0.0
    assert found.product.stacked_rank <= 2 * min(d_out, d_in)
    assert close(found.product.dense(), sum_of(terms).dense(), 1e-11)


def test_a_short_sum_is_stacked_and_not_folded() -> None:
    terms = falling(40, 30, 5)
    found, whole = sum_streaming(terms).product, sum_of(terms)
    assert torch.equal(found.left, whole.left)
    assert torch.equal(found.right, whole.right)


@pytest.mark.parametrize("bound", [2, 5, 8, 12])
def test_what_a_smaller_bound_cuts_off_is_known(bound: int) -> None:
    terms = falling(12, 9, 30)
    found, whole = sum_streaming(terms, bound=bound), sum_of(terms)
    error = float((found.product.dense() - whole.dense()).norm())
    best = float(torch.linalg.svdvals(whole.dense())[bound:].norm())
    assert best - 1e-12 <= error <= found.lost + 1e-12
    assert found.lost > 0
    assert found.product.stacked_rank <= bound


def test_no_more_columns_are_held_than_the_bound_and_one_term(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        "federated.lowrank.decompose", lambda given: seen.append(given.stacked_rank) or decompose(given)
    )
    sum_streaming(falling(30, 20, 200), bound=16)
    assert len(seen) > 10
    assert max(seen) <= 16 + 4


def test_terms_that_cancel_leave_nothing() -> None:
    one = product(6, 5, 3)
    found = sum_streaming([(1.0, one), (1.0, product(6, 5, 4, seed=2)), (-1.0, product(6, 5, 4, seed=2)), (-1.0, one)])
    assert norm_of(found.product) < 1e-12


def test_scaling_leaves_the_original_alone() -> None:
    before = product(4, 3, 2)
    left = before.left.clone()
    assert close(before.scaled(3.0).dense(), 3 * before.dense())
    assert torch.equal(before.left, left)


@shapes
def test_a_decomposition_is_the_dense_one(d_out: int, d_in: int, rank: int) -> None:
    matrix = product(d_out, d_in, rank)
    found = decompose(matrix)
    count = min(d_out, d_in, rank)
    assert found.s.shape == (count,)
    assert close(found.s, torch.linalg.svdvals(matrix.dense())[:count])
    assert close(rebuilt(found), matrix.dense())
    assert close(found.u.T @ found.u, torch.eye(count, dtype=torch.float64))
    assert close(found.v.T @ found.v, torch.eye(count, dtype=torch.float64))
    assert found.energy == pytest.approx(float(matrix.dense().square().sum()))


@shapes
def test_signs_do_not_depend_on_the_factors_signs(d_out: int, d_in: int, rank: int) -> None:
    matrix = product(d_out, d_in, rank)
    one, other = decompose(matrix), decompose(LowRank(-matrix.left, -matrix.right))
    assert close(one.u, other.u, 1e-9)
    assert close(one.v, other.v, 1e-9)


def test_the_same_product_from_other_factors_has_the_same_decomposition() -> None:
    matrix, mix = product(6, 5, 3), product(3, 3, 3, seed=9).dense()
    turned = LowRank(matrix.left @ mix, torch.linalg.solve(mix, matrix.right))
    assert close(decompose(turned).u, decompose(matrix).u, 1e-9)


@pytest.mark.parametrize("kept", [1, 2, 3, 4, 9])
@shapes
def test_a_truncation_is_as_close_as_any_matrix_of_that_rank(d_out: int, d_in: int, rank: int, kept: int) -> None:
    matrix = product(d_out, d_in, rank)
    found = truncate(matrix, kept)
    best = math.sqrt(float(torch.linalg.svdvals(matrix.dense())[kept:].square().sum()))
    assert found.stacked_rank <= kept
    assert float((found.dense() - matrix.dense()).norm()) == pytest.approx(best, abs=1e-11)


def test_a_truncation_to_the_full_rank_loses_nothing() -> None:
    matrix = sum_of([(0.5, product(8, 6, 2)), (0.5, product(8, 6, 3, seed=1))])
    assert close(truncate(matrix, 5).dense(), matrix.dense())


def fallen(rank: int, *, fall: float) -> LowRank:
    """A 40 x 30 matrix whose singular values fall by a factor each."""
    found = decompose(product(40, 30, rank))
    return LowRank(found.u * fall ** torch.arange(rank, dtype=torch.float64), found.v.T.contiguous())


def test_a_sketch_of_all_directions_is_the_decomposition() -> None:
    matrix = product(40, 30, 6)
    found = sketch(matrix, 6, generator=torch.Generator().manual_seed(1))
    assert close(rebuilt(found), matrix.dense())
    assert close(found.s, decompose(matrix).s)


@pytest.mark.parametrize("seed", range(5))
def test_a_sketch_is_nearly_optimal_where_singular_values_fall(seed: int) -> None:
    matrix = fallen(20, fall=0.5)
    found = sketch(matrix, 4, generator=torch.Generator().manual_seed(seed))
    best = float((truncate(matrix, 4).dense() - matrix.dense()).norm())
    assert found.s.shape == (4,)
    assert best <= float((rebuilt(found) - matrix.dense()).norm()) + 1e-12 <= 1.01 * best


def test_a_sketch_repeats_with_its_generator() -> None:
    matrix = fallen(20, fall=0.9)
    one, other = (sketch(matrix, 3, generator=torch.Generator().manual_seed(2), power=0) for _ in range(2))
    assert torch.equal(one.u, other.u)
    assert not torch.equal(one.u, sketch(matrix, 3, generator=torch.Generator().manual_seed(3), power=0).u)


def test_a_sketch_wider_than_the_matrix_gives_what_there_is() -> None:
    matrix = product(4, 9, 2)
    found = sketch(matrix, 7, generator=torch.Generator().manual_seed(1))
    assert found.s.shape == (4,)
    assert close(rebuilt(found), matrix.dense())


@pytest.mark.parametrize("scaling", [2.0, 0.125])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_balanced_factors_give_back_the_truncation_at_the_scaling(scaling: float, rank: int) -> None:
    matrix = product(6, 7, 3)
    factor_a, factor_b = balanced_factors(decompose(matrix), rank=rank, scaling=scaling)
    assert (factor_a.shape, factor_b.shape) == ((rank, 7), (6, rank))
    assert close(scaling * factor_b @ factor_a, truncate(matrix, rank).dense())
    assert close(factor_a.norm(dim=1), factor_b.norm(dim=0))


def test_directions_that_the_matrix_lacks_are_zero() -> None:
    factor_a, factor_b = balanced_factors(decompose(product(6, 7, 2)), rank=4, scaling=1.0)
    assert not factor_a[2:].any()
    assert not factor_b[:, 2:].any()


@pytest.mark.parametrize(
    ("energy", "expected"), [(1.0, 3), (0.999, 3), (25 / 26, 2), (0.7, 2), (16 / 26, 1), (0.01, 1)]
)
def test_the_smallest_rank_that_keeps_so_much_energy(energy: float, expected: int) -> None:
    matrix = torch.diag(torch.tensor([4.0, 3.0, 1.0, 0.0], dtype=torch.float64))
    found = decompose(LowRank(matrix, torch.eye(4, dtype=torch.float64)))
    assert rank_for_energy(found, energy) == expected
    assert found.kept(expected) >= energy - 1e-12


def test_nothing_has_all_of_its_energy_in_one_direction() -> None:
    found = decompose(LowRank(torch.zeros(4, 2, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)))
    assert (rank_for_energy(found, 0.9), found.kept(1), found.energy) == (1, 1.0, 0.0)
    assert not torch.isnan(found.u).any()


@shapes
def test_a_gram_matrix_holds_the_inner_products_of_all_ranks(d_out: int, d_in: int, rank: int) -> None:
    products = [product(d_out, d_in, rank, seed=1), product(d_out, d_in, rank + 2, seed=2), product(d_out, d_in, 1)]
    found = gram(products)
    dense = torch.stack([one.dense().flatten() for one in products])
    torch.testing.assert_close(found, dense @ dense.T)
    assert torch.equal(found, found.T)
    with pytest.raises(AggregationError, match="no product"):
        gram([])


@shapes
def test_inner_products_and_norms_are_the_dense_ones(d_out: int, d_in: int, rank: int) -> None:
    one, other = product(d_out, d_in, rank), product(d_out, d_in, 2, seed=5)
    assert inner(one, other) == pytest.approx(float((one.dense() * other.dense()).sum()))
    assert norm_of(one) == pytest.approx(float(one.dense().norm()))


def test_the_norm_of_what_cancels_is_nothing() -> None:
    one = product(6, 5, 2)
    assert norm_of(stack([one, one.scaled(-1.0)])) < 1e-13


class TestRefusals:
    @pytest.mark.parametrize(("left", "right"), [((3, 2), (3, 4)), ((3,), (3, 4)), ((3, 2), (2, 4, 1))])
    def test_factors_that_do_not_fit(self, left: tuple[int, ...], right: tuple[int, ...]):
        with pytest.raises(AggregationError, match="expected d_out x k and k x d_in, found"):
            LowRank(torch.zeros(left), torch.zeros(right))

    def test_no_product(self):
        with pytest.raises(AggregationError, match="expected at least one"):
            stack([])

    def test_a_sum_of_nothing_or_in_no_memory(self):
        with pytest.raises(AggregationError, match="expected at least one"):
            sum_streaming([])
        with pytest.raises(AggregationError, match="bound of 1 columns on a sum: expected at least 2"):
            sum_streaming([(1.0, product(3, 4, 1))], bound=1)

    def test_other_shapes(self):
        with pytest.raises(AggregationError, match="different shapes"):
            stack([product(3, 4, 1), product(4, 3, 1)])
        with pytest.raises(AggregationError, match="no inner product"):
            inner(product(3, 4, 1), product(4, 3, 1))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_values_that_are_not_finite(self, bad: float):
        matrix = product(3, 4, 2)
        with pytest.raises(AggregationError, match="not finite"):
            decompose(replace(matrix, left=matrix.left * bad))
        with pytest.raises(AggregationError, match="not finite"):
            truncate(replace(matrix, right=matrix.right * bad), 1)

    def test_rank_zero(self):
        with pytest.raises(AggregationError, match="expected at least 1"):
            truncate(product(3, 4, 2), 0)
        with pytest.raises(AggregationError, match="expected at least 1"):
            sketch(product(3, 4, 2), 0, generator=torch.Generator())
