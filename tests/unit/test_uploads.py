"""What an update holds under each plan: known beforehand, packed and unpacked, and what hostile bytes do to it."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from federated.errors import WireError
from federated.manifest import ModuleSpec, TrainPlan, layout_of
from federated.rank_selection import scores
from federated.sparse import count_of, factor_shapes, fill, largest, masked, split, thin
from federated.state import AdapterState, Tensors, group_of, to_raw
from federated.testing import Case, cases
from federated.uploads import layout, pack, unpack

CASES = {case.name: case for case in cases()}
CASE = CASES["wide"]
PLANS = {
    "whole": TrainPlan(),
    "sparse": TrainPlan(density_up=0.3),
    "one entry": TrainPlan(density_up=1e-9),
    "nearly all": TrainPlan(density_up=0.999),
    "ranks of B": TrainPlan(trainable=("factor_b", "dense"), rank_budget=1),
    "ranks of A": TrainPlan(trainable=("factor_a", "dense"), rank_budget=2),
    "all ranks": TrainPlan(trainable=("factor_a",), rank_budget=9),
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


def moved(case: Case, plan: TrainPlan, client: str = "client-000") -> dict[str, Tensor]:
    return {name: move for name, move in case.trained[client].items() if group_of(name) in plan.trainable}


@every_plan
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_update_holds_what_its_plan_says_and_comes_back(case: Case, plan: TrainPlan) -> None:
    for client in case.trained:
        delta = moved(case, plan, client)
        packed = pack(plan, case.adapter, delta)
        assert layout_of(to_raw(packed)) == layout(plan, case.adapter)
        back = unpack(plan, case.adapter, packed)
        assert {name: one.shape for name, one in back.items()} == {name: one.shape for name, one in delta.items()}
        for name, tensor in delta.items():
            assert ((back[name] == tensor) | (back[name] == 0)).all()
            assert group_of(name) != "dense" or torch.equal(back[name], tensor)


def test_a_plan_that_sends_all_ranks_loses_nothing() -> None:
    plan = PLANS["all ranks"]
    delta = moved(CASE, plan)
    back = unpack(plan, CASE.adapter, pack(plan, CASE.adapter, delta))
    assert all(torch.equal(back[name], tensor) for name, tensor in delta.items())


class TestSparse:
    def test_exactly_the_largest_entries_of_all_factors_are_sent(self):
        delta = moved(CASE, PLANS["sparse"])
        factors, _ = split(unpack(PLANS["sparse"], CASE.adapter, pack(PLANS["sparse"], CASE.adapter, delta)))
        sent = torch.cat([tensor.flatten() for tensor in factors.values()])
        every = torch.cat([tensor.flatten() for tensor in split(delta)[0].values()])
        count = count_of(0.3, len(every))
        assert int((sent != 0).sum()) == count
        assert sent.abs().sort(descending=True).values[:count].equal(every.abs().sort(descending=True).values[:count])

    @pytest.mark.parametrize(("density", "size", "count"), [(0.07, 100, 7), (0.25, 10, 3), (1e-9, 5, 1), (1.0, 9, 9)])
    def test_the_count_is_rounded_up(self, density: float, size: int, count: int):
        assert count_of(density, size) == count

    def test_of_equal_entries_the_first_are_taken(self):
        flat = {"a": torch.tensor([1.0, -2.0, 2.0, 0.5]), "b": torch.tensor([[-2.0, 1.0]])}
        assert largest(flat, 2 / 6).tolist() == [1, 2]
        assert largest(flat, 4 / 6).tolist() == [0, 1, 2, 4]
        assert largest({"a": torch.zeros(5)}, 0.4).tolist() == [0, 1]

    def test_what_is_not_a_number_is_sent_and_not_hidden(self):
        values = {"a": torch.tensor([1.0, torch.nan, 3.0, -torch.inf])}
        assert largest(values, 0.5).tolist() == [1, 3]

    def test_a_mask_keeps_the_dtype_and_the_largest(self):
        tensors = {"a": torch.tensor([1.0, -4.0, 2.0, 0.5]).bfloat16()}
        found = masked(tensors, 0.5)["a"]
        assert found.dtype == torch.bfloat16
        assert found.tolist() == [0.0, -4.0, 2.0, 0.0]
        assert tensors["a"].tolist() == [1.0, -4.0, 2.0, 0.5]

    @pytest.mark.parametrize("tensors", [{"a": torch.zeros(2, 3)}, {"a": torch.tensor([[0.0, 7.0, 0.0]] * 2)}])
    def test_zeros_are_left_out_and_come_back(self, tensors: Tensors):
        small = thin(tensors)
        assert small["sparse:values"].numel() <= 2
        assert torch.equal(fill(small, {"a": (2, 3)})["a"], tensors["a"])

    def test_the_factors_shapes_follow_from_the_spec(self):
        factors, _ = split(CASE.adapter.tensors)
        assert factor_shapes(CASE.adapter.spec) == {name: tuple(one.shape) for name, one in factors.items()}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"sparse:positions": torch.zeros(5, dtype=torch.uint8)}, "bytes of positions"),
            ({"sparse:positions": torch.zeros(9)}, "one row of bytes"),
            ({"sparse:values": torch.zeros(2, 2)}, "one row of floats"),
            ({"sparse:values": torch.zeros(3, dtype=torch.int64)}, "one row of floats"),
            ({"sparse:values": torch.zeros(500)}, "500 positions in an array of"),
            ({"sparse:values": None}, "missing"),
        ],
    )
    def test_values_that_do_not_say_where_they_belong(self, change: dict[str, Tensor | None], message: str):
        given = pack(PLANS["sparse"], CASE.adapter, moved(CASE, PLANS["sparse"])) | change
        with pytest.raises(WireError, match=message):
            unpack(PLANS["sparse"], CASE.adapter, {name: one for name, one in given.items() if one is not None})


def uneven() -> AdapterState:
    """Three layers of other widths and ranks, in an order that is not their names'."""
    modules = (ModuleSpec("z", 4, 9, 2, 4.0), ModuleSpec("a", 5, 2, 1, 4.0), ModuleSpec("m", 3, 6, 3, 4.0))
    spec = replace(CASE.adapter.spec, modules=modules, head=None)
    generator = torch.Generator().manual_seed(7)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in factor_shapes(spec).items()}
    return AdapterState(spec, drawn)


def layers(adapter: AdapterState) -> Iterator[tuple[str, int]]:
    for module in sorted(adapter.spec.modules, key=lambda one: one.name):
        yield from ((module.name, rank) for rank in range(module.rank))


class TestRanks:
    @pytest.mark.parametrize("factor", ["factor_a", "factor_b"])
    def test_a_score_is_the_norm_of_what_the_rank_did_to_the_layer(self, factor: str):
        adapter, delta = uneven(), {name: torch.rand_like(one) for name, one in uneven().tensors.items()}
        scaling = {module.name: adapter.spec.scaling(module) for module in adapter.spec.modules}
        expected = []
        for layer, rank in layers(adapter):
            a, b = (
                (delta if factor == kind else adapter.tensors)[f"{layer}.{kind}"].double()
                for kind in ("factor_a", "factor_b")
            )
            expected.append(scaling[layer] * torch.outer(b[:, rank], a[rank]).norm())
        torch.testing.assert_close(scores(adapter, factor, delta), torch.stack(expected))

    @pytest.mark.parametrize("factor", ["factor_a", "factor_b"])
    def test_the_best_ranks_of_all_equal_layers_are_sent(self, factor: str):
        plan = TrainPlan(trainable=(factor, "dense"), rank_budget=1)
        delta = moved(CASE, plan)
        back = unpack(plan, CASE.adapter, pack(plan, CASE.adapter, delta))
        found = scores(CASE.adapter, factor, back).nonzero().flatten().tolist()
        assert found == sorted(scores(CASE.adapter, factor, delta).argsort(descending=True)[:2].tolist())

    @pytest.mark.parametrize("factor", ["factor_a", "factor_b"])
    def test_a_rank_that_does_not_fit_is_passed_over(self, factor: str):
        adapter, plan = uneven(), TrainPlan(trainable=(factor,), rank_budget=1)
        delta = {name: torch.rand_like(one) for name, one in adapter.tensors.items() if name.endswith(factor)}
        widths = [adapter.tensors[f"{layer}.{factor}"].numel() // _rank(adapter, layer) for layer, _ in layers(adapter)]
        one_each = {layer: width for (layer, _), width in zip(layers(adapter), widths, strict=True)}
        left, expected = sum(one_each.values()), set()
        for index in scores(adapter, factor, delta).argsort(descending=True).tolist():
            if widths[index] <= left:
                expected.add(index)
                left -= widths[index]
        back = unpack(plan, adapter, pack(plan, adapter, delta))
        assert set(scores(adapter, factor, back).nonzero().flatten().tolist()) == expected
        sent = sum(int((tensor != 0).sum()) for tensor in back.values())
        assert sent == sum(widths[index] for index in expected)

    def test_a_rank_that_is_not_a_number_is_sent_and_not_hidden(self):
        plan = PLANS["ranks of B"]
        delta = moved(CASE, plan)
        delta["layer.k.factor_b"][0, 2] = torch.nan
        assert pack(plan, CASE.adapter, delta)["ranks:values"].isnan().any()

    @pytest.mark.parametrize(
        ("chosen", "message"),
        [
            ([1, 1, 1, 0, 0, 0, 0, 0], "the marked ranks hold 12 values; expected at most 8, and zeros after them"),
            ([1, 0, 0, 0, 0, 0, 0, 0], "the marked ranks hold 4 values; expected at most 8, and zeros after them"),
            ([1, 1, 0, 0, 0, 0, 1, 0], "a rank beyond the adapter's 6 is marked"),
        ],
        ids=["too many", "values left over", "no such rank"],
    )
    def test_marks_that_do_not_fit_the_values(self, chosen: list[int], message: str):
        plan = PLANS["ranks of B"]
        given = dict(pack(plan, CASE.adapter, moved(CASE, plan)))
        given["ranks:chosen"] = torch.from_numpy(np.packbits(np.array(chosen, dtype=np.uint8), bitorder="little"))
        with pytest.raises(WireError, match=message):
            unpack(plan, CASE.adapter, given)

    def test_fewer_ranks_than_there_is_room_for_are_taken(self):
        plan = PLANS["ranks of B"]
        packed = pack(plan, CASE.adapter, moved(CASE, plan))
        none = {name: torch.zeros_like(tensor) for name, tensor in packed.items()}
        assert not any(tensor.any() for tensor in unpack(plan, CASE.adapter, none).values())


def _rank(adapter: AdapterState, layer: str) -> int:
    return next(module.rank for module in adapter.spec.modules if module.name == layer)
