"""Low-rank work on whole adapters: another rank, a residual that grows and stays compact, both as one adapter."""

from dataclasses import replace

import pytest
import torch

from federated.errors import AggregationError
from federated.lowrank import LowRank, decompose
from federated.manifest import AdapterSpec, HeadSpec, ModuleSpec
from federated.residual import Growth, at_rank, factors_from, grow, merged, product_of, used_rank
from federated.state import AdapterState
from federated.testing import effective_of


def adapter(rank=3, *, use_rslora=False, shapes=((7, 6), (4, 11)), seed=0, dtype="F32") -> AdapterState:
    """Two layers, the second one a Conv1D; alpha is not the rank."""
    modules = tuple(
        ModuleSpec(f"layer.{letter}", d_in, d_out, rank, 8.0, fan_in_fan_out=letter == "q")
        for letter, (d_out, d_in) in zip("kq", shapes, strict=True)
    )
    spec = AdapterSpec("lora", rank, 8.0, use_rslora, modules, head=HeadSpec("mean_pool", 2, True, 0), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    tensors = {"head.weight": torch.randn(2, 5, generator=generator)}
    for one in modules:
        tensors[f"{one.name}.factor_a"] = torch.randn(rank, one.d_in, generator=generator)
        tensors[f"{one.name}.factor_b"] = torch.randn(one.d_out, rank, generator=generator)
    return AdapterState(spec, tensors)


def product(module, rank, *, size=1.0, seed=1) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    left = size * torch.randn(module.d_out, rank, generator=generator, dtype=torch.float64)
    return LowRank(left, torch.randn(rank, module.d_in, generator=generator, dtype=torch.float64))


def products(like: AdapterState, rank=2, **changes) -> dict[str, LowRank]:
    return {module.name: product(module, rank, **changes) for module in like.spec.modules}


def grown(residual, additions, beside, *, max_rank=0, truncate=False) -> Growth:
    return grow(residual, additions, beside, max_rank=max_rank, truncate=truncate)


def with_residual(**changes) -> AdapterState:
    beside = adapter(**changes)
    return replace(beside, residual=grown(None, products(beside), beside).residual)


def close(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    for name, matrix in expected.items():
        assert float((found[name] - matrix).norm()) <= tolerance * max(float(matrix.norm()), 1.0), name


def dense(found: dict[str, LowRank]) -> dict[str, torch.Tensor]:
    return {name: one.dense() for name, one in found.items()}


class TestProductOf:
    def test_is_the_effective_update_with_the_residual_in_it(self):
        state = with_residual()
        alone = effective_of(replace(state, residual=None))
        beside = dense(products(state))
        close(dense(product_of(state)), {name: alone[name] + beside[name] for name in alone})
        close(dense(product_of(replace(state, residual=None))), alone)

    def test_a_layer_that_the_residual_leaves_out(self):
        beside = adapter()
        one = {"layer.q": product(beside.spec.modules[1], 2)}
        state = replace(beside, residual=grown(None, one, beside).residual)
        found, alone = dense(product_of(state)), effective_of(beside)
        close(found, {"layer.k": alone["layer.k"], "layer.q": alone["layer.q"] + one["layer.q"].dense()})


class TestAtRank:
    @pytest.mark.parametrize("use_rslora", [False, True])
    def test_is_the_closest_there_is(self, use_rslora):
        full = adapter(use_rslora=use_rslora)
        small = at_rank(full, 2)
        assert (small.spec.rank, [one.rank for one in small.spec.modules]) == (2, [2, 2])
        for name, matrix in effective_of(full).items():
            missed = float((effective_of(small)[name] - matrix).norm())
            assert missed == pytest.approx(float(torch.linalg.svdvals(matrix)[2:].norm()), rel=1e-5)

    def test_its_own_rank_changes_nothing(self):
        full = adapter()
        same = at_rank(full, 3)
        assert same.spec == full.spec
        assert all(same.tensors[name] is tensor for name, tensor in full.tensors.items())

    def test_what_is_dense_or_a_residual_is_shared(self):
        full = with_residual()
        small = at_rank(full, 1)
        assert small.residual is full.residual
        assert small.tensors["head.weight"] is full.tensors["head.weight"]

    def test_a_layer_that_is_smaller_than_the_rank_stays_as_it_is(self):
        full = adapter(rank=3, shapes=((2, 9), (7, 6)))
        full = replace(full, spec=full.spec.with_rank(3), tensors=_cut(full, "layer.k", 2))
        small = at_rank(full, 2)
        assert small.tensors["layer.k.factor_a"] is full.tensors["layer.k.factor_a"]
        assert small.tensors["layer.q.factor_a"].shape == (2, 6)

    def test_a_zero_update_keeps_the_first_rows_of_a(self):
        full = adapter()
        zeros = {name: torch.zeros_like(t) for name, t in full.tensors.items() if name.endswith("factor_b")}
        small = at_rank(replace(full, tensors={**full.tensors, **zeros}), 2)
        for name in ("layer.k", "layer.q"):
            assert torch.equal(small.tensors[f"{name}.factor_a"], full.tensors[f"{name}.factor_a"][:2])
            assert not small.tensors[f"{name}.factor_b"].any()

    @pytest.mark.parametrize("rank", [-1, 0, 4])
    def test_a_rank_that_it_has_not(self, rank):
        with pytest.raises(
            AggregationError, match=f"rank {rank} was asked of an adapter of rank 3: expected 1 to that"
        ):
            at_rank(adapter(), rank)


def _cut(state: AdapterState, layer: str, rank: int) -> dict[str, torch.Tensor]:
    a, b = state.tensors[f"{layer}.factor_a"], state.tensors[f"{layer}.factor_b"]
    return {**state.tensors, f"{layer}.factor_a": a[:rank], f"{layer}.factor_b": b[:, :rank]}


def test_factors_of_fewer_directions_than_the_rank_leave_the_other_rows_to_train():
    pair = next(iter(adapter().pairs()))
    made = factors_from(decompose(product(pair.module, 2)), pair)
    assert torch.equal(made["layer.k.factor_a"][2:], pair.factor_a[2:])
    assert not made["layer.k.factor_b"][:, 2:].any()
    assert made["layer.k.factor_b"][:, :2].any(dim=0).all()


class TestGrow:
    def test_is_the_sum_and_scaling_one(self):
        beside = adapter()
        first = grown(None, products(beside, seed=1), beside)
        second = grown(first.residual, products(beside, seed=2), beside)
        close(
            effective_of(second.residual),
            {m.name: product(m, 2, seed=1).dense() + product(m, 2, seed=2).dense() for m in beside.spec.modules},
        )
        assert [pair.scaling for pair in second.residual.pairs()] == [1.0, 1.0]
        assert {tensor.dtype for tensor in second.residual.tensors.values()} == {torch.float32}
        assert (second.rank, second.residual.spec.rank) == (4, 4)
        assert second.kept == pytest.approx(1.0, abs=1e-12)
        assert [m.fan_in_fan_out for m in second.residual.spec.modules] == [False, True]

    def test_its_inputs_stay_as_they_are(self):
        beside, residual = adapter(), with_residual().residual
        before = {name: tensor.clone() for name, tensor in residual.tensors.items()}
        grown(residual, products(beside, seed=2), beside)
        assert all(torch.equal(residual.tensors[name], tensor) for name, tensor in before.items())

    def test_never_passes_a_layer_s_smaller_side_and_loses_nothing(self):
        beside = adapter()
        residual, expected = None, {module.name: 0.0 for module in beside.spec.modules}
        for seed in range(10):
            residual = grown(residual, products(beside, seed=seed), beside).residual
            expected = {name: expected[name] + one.dense() for name, one in products(beside, seed=seed).items()}
        assert [module.rank for module in residual.spec.modules] == [6, 4]
        close(effective_of(residual), expected)

    def test_ten_rounds_of_rank_one_in_a_wide_layer_have_rank_ten(self):
        beside = adapter(shapes=((40, 30), (30, 40)))
        residual = None
        for seed in range(10):
            residual = grown(residual, products(beside, rank=1, seed=seed), beside).residual
        assert [module.rank for module in residual.spec.modules] == [10, 10]

    def test_a_layer_that_gets_nothing_is_not_in_it(self):
        beside = adapter()
        found = grown(None, {"layer.q": product(beside.spec.modules[1], 2)}, beside)
        assert [module.name for module in found.residual.spec.modules] == ["layer.q"]
        again = grown(found.residual, {"layer.k": product(beside.spec.modules[0], 1)}, beside)
        assert [(one.name, one.rank) for one in again.residual.spec.modules] == [("layer.k", 1), ("layer.q", 2)]
        assert again.rank == 2

    def test_nothing_at_all_is_none(self):
        beside = adapter()
        assert grown(None, {}, beside) == Growth(None, 0, 1.0)
        zero = {m.name: LowRank(torch.zeros(m.d_out, 1).double(), torch.zeros(1, m.d_in).double())
                for m in beside.spec.modules}  # fmt: skip
        assert grown(None, zero, beside) == Growth(None, 0, 1.0)

    def test_what_cancels_is_gone(self):
        beside, one = adapter(), products(adapter())
        residual = grown(None, one, beside).residual
        minus = {name: found.scaled(-1.0) for name, found in one.items()}
        assert grown(residual, minus, beside) == Growth(None, 0, 1.0)

    def test_what_float32_rounds_off_in_the_adapter_is_no_direction(self):
        """A difference of nearly equal products: real directions stay, noise of the adapter's size does not."""
        beside = adapter()
        size = {name: float(matrix.norm()) for name, matrix in effective_of(beside).items()}
        noise = {m.name: product(m, 2, size=1e-9 * size[m.name], seed=5) for m in beside.spec.modules}
        assert grown(None, noise, beside).residual is None
        real = {m.name: product(m, 2, size=1e-5 * size[m.name], seed=5) for m in beside.spec.modules}
        found = grown(None, real, beside)
        assert found.rank == 2
        close({n: m / size[n] for n, m in effective_of(found.residual).items()},
              {n: one.dense() / size[n] for n, one in real.items()}, 1e-11)  # fmt: skip

    def test_above_the_bound_it_refuses_and_says_what_to_do(self):
        beside = adapter()
        with pytest.raises(
            AggregationError,
            match=r"residual of layer layer\.k would reach rank 2, at most 1 is allowed: raise "
            r"strategy\.options\.max_residual_rank, or allow strategy\.options\.overflow=truncate",
        ):
            grown(None, products(beside), beside, max_rank=1)
        assert grown(None, products(beside), beside, max_rank=2).rank == 2

    def test_or_truncates_as_closely_as_can_be_and_says_what_is_left(self):
        beside = adapter()
        wanted = products(beside, rank=3)
        found = grown(None, wanted, beside, max_rank=2, truncate=True)
        squares = {name: torch.linalg.svdvals(one.dense()).square() for name, one in wanted.items()}
        for name, one in wanted.items():
            missed = float((effective_of(found.residual)[name] - one.dense()).square().sum())
            assert missed == pytest.approx(float(squares[name][2:].sum()), rel=1e-5)
        total = sum(float(one.sum()) for one in squares.values())
        assert found.kept == pytest.approx(sum(float(one[:2].sum()) for one in squares.values()) / total)
        assert (found.rank, found.kept < 0.999) == (2, True)


class TestMerged:
    @pytest.mark.parametrize("use_rslora", [False, True])
    def test_has_the_same_effective_update_and_scaling(self, use_rslora):
        state = with_residual(use_rslora=use_rslora)
        made = merged(state)
        assert made.residual is None
        close(effective_of(made), effective_of(state))
        assert [pair.scaling for pair in made.pairs()] == pytest.approx([pair.scaling for pair in state.pairs()])
        assert [one.rank for one in made.spec.modules] == [5, 4]
        assert made.spec.rank == 5
        assert made.spec.head == state.spec.head
        assert made.tensors["head.weight"] is state.tensors["head.weight"]

    def test_without_a_residual_it_is_the_adapter_itself(self):
        state = adapter()
        assert merged(state) is state

    def test_a_sum_that_needs_fewer_directions_has_a_smaller_rank(self):
        state = adapter()
        minus = {name: one.scaled(-1.0) for name, one in product_of(state).items()}
        minus["layer.q"] = product(state.spec.modules[1], 1)
        zeros = {"layer.q.factor_b": torch.zeros_like(state.tensors["layer.q.factor_b"])}
        small = replace(state, tensors={**state.tensors, **zeros})
        made = merged(replace(small, residual=grown(None, {"layer.q": minus["layer.q"]}, state).residual))
        assert [one.rank for one in made.spec.modules] == [3, 1]
        close(effective_of(made), {"layer.k": effective_of(state)["layer.k"], "layer.q": minus["layer.q"].dense()})

    def test_a_sum_of_zero_still_has_rank_one_with_the_adapter_s_row(self):
        state = adapter()
        zeros = {name: torch.zeros_like(t) for name, t in state.tensors.items() if name.endswith("factor_b")}
        empty = replace(state, tensors={**state.tensors, **zeros})
        beside = grown(None, {"layer.q": product(state.spec.modules[1], 2)}, state).residual
        made = merged(replace(empty, residual=beside))
        assert made.spec.modules[0].rank == 1
        assert torch.equal(made.tensors["layer.k.factor_a"], state.tensors["layer.k.factor_a"][:1])
        assert not made.tensors["layer.k.factor_b"].any()


def test_used_rank_counts_directions_and_not_rounding():
    module = ModuleSpec("layer", 6, 7, 3, 8.0)
    two = product(module, 2)
    twice = LowRank(torch.cat([two.left, two.left], 1), torch.cat([two.right, two.right], 0))
    assert used_rank(decompose(twice)) == 2
    assert used_rank(decompose(LowRank(torch.zeros(7, 2).double(), torch.zeros(2, 6).double()))) == 0
