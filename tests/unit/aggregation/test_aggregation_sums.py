"""WeightedSum: the dense float64 mean, to the last bit in any order, and nothing of what it refuses."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from federated.aggregation import WeightedSum
from federated.errors import AggregationError, NotEnoughUpdates

Delta = dict[str, torch.Tensor]


def summed(*terms: tuple[Delta, float]) -> WeightedSum:
    total = WeightedSum()
    for delta, weight in terms:
        total.add(delta, weight)
    return total


def column(*values: float) -> Delta:
    return {"w": torch.tensor(values, dtype=torch.float32)}


def exact_mean(terms: list[tuple[Delta, float]]) -> list[float]:
    """The exact weighted sum, rounded once, over the exact weight, rounded once."""
    weight = sum(Fraction(weight) for _, weight in terms)
    sums = [Fraction(0)] * terms[0][0]["w"].numel()
    for delta, factor in terms:
        for index, value in enumerate(delta["w"].flatten().tolist()):
            sums[index] += Fraction(value * factor)
    return [float(value) / float(weight) for value in sums]


def random_terms(count: int, size: int = 50) -> list[tuple[Delta, float]]:
    generator = torch.Generator().manual_seed(11)
    scales = 10.0 ** torch.randint(-12, 3, (count, size), generator=generator)
    values = torch.randn(count, size, generator=generator) * scales
    weights = torch.randint(1, 5000, (count,), generator=generator).tolist()
    return [({"w": row.float()}, float(weight)) for row, weight in zip(values, weights, strict=True)]


def test_the_mean_is_the_dense_float64_weighted_mean() -> None:
    terms = random_terms(7)
    dense = sum(delta["w"].double() * weight for delta, weight in terms) / sum(weight for _, weight in terms)
    found = summed(*terms).mean()["w"]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, dense, rtol=1e-12, atol=1e-18)


def test_the_mean_is_the_exact_sum_rounded_once() -> None:
    terms = random_terms(20)
    assert summed(*terms).mean()["w"].tolist() == exact_mean(terms)


def test_any_order_gives_the_same_bits() -> None:
    terms = random_terms(5)
    found = {tuple(summed(*order).mean()["w"].tolist()) for order in itertools.permutations(terms)}
    assert len(found) == 1


CANCELLING = [1e30, 1e10, 1e-10, -1e30, -1e10]


def test_small_terms_survive_under_large_ones_that_cancel() -> None:
    """Float64, and float64 with one compensation, give 0 for some of these orders."""
    terms = [(column(value), 1.0) for value in CANCELLING]
    expected = torch.tensor(1e-10, dtype=torch.float32).double().item() / 5
    found = {summed(*order).mean()["w"].item() for order in itertools.permutations(terms)}
    assert found == {expected}


def test_float32_s_whole_range_in_one_sum() -> None:
    values = (3e38, 2.0**-149, 1.0, -3e38, 2.0**-100)
    terms = [(column(value), 1e6) for value in values]
    found = {summed(*order).mean()["w"].item() for order in itertools.permutations(terms)}
    assert found == set(exact_mean(terms))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("nudge", [2.0**-110, -(2.0**-110), 0.0, 0.75 * 2.0**-106])
@pytest.mark.parametrize("last", [1.0, 1.0 + 2.0**-52], ids=["even", "odd"])
def test_a_near_tie_is_rounded_to_the_right_side(sign: float, nudge: float, last: float) -> None:
    """Half a unit in the last place, and a third part that alone decides: here a second rounding would go wrong."""
    values = [sign * last, sign * 2.0**-53, nudge]
    deltas = [{"w": torch.tensor([value], dtype=torch.float64)} for value in values]
    expected = float(sum(Fraction(value) for value in values)) / 3.0
    found = {summed(*((d, 1.0) for d in order)).mean()["w"].item() for order in itertools.permutations(deltas)}
    assert found == {expected}


def test_equal_updates_mean_themselves() -> None:
    delta = column(0.1, -3.0, 1e-30)
    total = summed(*((delta, weight) for weight in (1.0, 7.0, 13.0)))
    assert torch.equal(total.mean()["w"].float(), delta["w"])


def test_one_client_s_mean_is_its_own_delta() -> None:
    delta = column(0.1, -0.0, 3e38)
    assert torch.equal(summed((delta, 77.0)).mean()["w"], delta["w"].double())


def test_weights_count() -> None:
    assert summed((column(1.0), 3.0), (column(5.0), 1.0)).mean()["w"].tolist() == [2.0]


def test_the_total_weight_does_not_depend_on_the_order() -> None:
    weights = [0.1, 0.2, 0.3, 1e15, 0.7]
    found = {
        summed(*((column(1.0), weight) for weight in order)).total_weight for order in itertools.permutations(weights)
    }
    assert found == {math.fsum(weights)}


def test_bfloat16_deltas_are_widened() -> None:
    delta = {"w": torch.tensor([1.0078125], dtype=torch.bfloat16)}
    assert summed((delta, 3.0), (delta, 1.0)).mean()["w"].tolist() == [1.0078125]


def test_nothing_to_average() -> None:
    with pytest.raises(NotEnoughUpdates, match="at least one good update"):
        WeightedSum().mean()


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_a_bad_weight_is_refused_and_changes_nothing(weight: float) -> None:
    unchanged(column(1.0, 2.0), weight, "expected a finite number > 0")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_value_is_refused_and_changes_nothing(value: float) -> None:
    unchanged(column(1.0, value), 1.0, "tensor w holds values that are not finite")


def test_a_product_beyond_float64_is_refused_and_changes_nothing() -> None:
    unchanged(column(1.0, 3e38), 1e300, "tensor w holds values that are not finite")


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        ({"v": torch.ones(2)}, r"names differ from the first update's: \['v', 'w'\]"),
        ({"w": torch.ones(2), "v": torch.ones(2)}, r"names differ .* \['v'\]"),
        ({"w": torch.ones(1)}, r"tensor w: found shape \(1,\), expected \(2,\)"),
        ({"w": torch.ones(2, 1)}, r"tensor w: found shape \(2, 1\)"),
        ({}, "an update without tensors"),
    ],
    ids=["other name", "extra name", "broadcast", "other rank", "empty"],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(delta: Delta, message: str) -> None:
    unchanged(delta, 1.0, message)


def test_a_bad_second_tensor_does_not_let_the_first_one_in() -> None:
    total = WeightedSum()
    total.add({"a": torch.ones(1), "b": torch.ones(1)}, 1.0)
    with pytest.raises(AggregationError, match="tensor b"):
        total.add({"a": torch.full((1,), 50.0), "b": torch.tensor([math.nan])}, 1.0)
    assert total.mean()["a"].tolist() == [1.0]


def test_a_first_update_that_is_refused_fixes_no_names() -> None:
    total = WeightedSum()
    with pytest.raises(AggregationError):
        total.add(column(math.nan), 1.0)
    total.add({"other": torch.ones(3)}, 1.0)
    assert total.count == 1


def unchanged(delta: Delta, weight: float, message: str) -> None:
    total = summed((column(0.25, -4.0), 3.0))
    before = total.mean()["w"].tolist()
    with pytest.raises(AggregationError, match=message):
        total.add(delta, weight)
    assert (total.mean()["w"].tolist(), total.count, total.total_weight) == (before, 1, 3.0)


def test_deltas_are_not_kept_and_not_changed() -> None:
    delta = column(1.0, 2.0)
    total = summed((delta, 1.0))
    delta["w"].mul_(100.0)
    assert total.mean()["w"].tolist() == [1.0, 2.0]
    total.mean()["w"].mul_(100.0)
    assert total.mean()["w"].tolist() == [1.0, 2.0]


def test_memory_does_not_grow_with_the_number_of_updates() -> None:
    total = WeightedSum()
    held = []
    for delta, weight in random_terms(60, size=100):
        total.add(delta, weight)
        held.append(sum(part.numel() for parts in total._parts.values() for part in parts))
    assert held[-1] == held[9] <= 3 * 100
