"""WeightedSum on arbitrary finite float32 values, arbitrary weights, in arbitrary order."""

from fractions import Fraction

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from federated.aggregation import FedIT, WeightedSum
from federated.delta import Update
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec
from federated.state import AdapterState

SPEC = AdapterSpec("lora", 1, 1.0, use_rslora=False, modules=())
ANY = st.floats(allow_nan=False, allow_infinity=False, width=32)
SPREAD = st.builds(lambda mantissa, power: mantissa * 2.0**power, st.integers(-(2**24), 2**24), st.integers(-140, 100))
WEIGHTS = st.integers(1, 2**29) | st.sampled_from([1, 1_000_000]) | st.floats(1e-3, 1e6)
TERMS = st.lists(st.tuples(st.tuples(ANY | SPREAD, ANY | SPREAD, ANY), WEIGHTS), min_size=1, max_size=9)

Terms = list[tuple[tuple[float, ...], float]]


def mean(terms: Terms) -> torch.Tensor:
    total = WeightedSum()
    for values, weight in terms:
        total.add({"w": torch.tensor(values, dtype=torch.float32)}, float(weight))
    return total.mean()["w"]


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.view(torch.int64).tolist()


@settings(max_examples=150, deadline=None)
@given(TERMS, st.randoms(use_true_random=False))
@example([((1e30, 1.0, 0.0), 1), ((1e10, -1.0, -0.0), 1), ((1e-10, 1e-30, 0.0), 1), ((-1e30, 0.0, 0.0), 1)], None)
def test_any_order_of_arrival_gives_the_same_bits(terms: Terms, chance: object) -> None:
    shuffled = list(reversed(terms))
    if chance is not None:
        chance.shuffle(shuffled)  # type: ignore[attr-defined]
    assert bits(mean(shuffled)) == bits(mean(terms))


@settings(max_examples=100, deadline=None)
@given(TERMS)
def test_the_sum_is_exact_and_rounded_once(terms: Terms) -> None:
    weight = float(sum(Fraction(weight) for _, weight in terms))
    found = mean(terms).tolist()
    for index, value in enumerate(found):
        products = [torch.tensor(values[index], dtype=torch.float32).item() * float(w) for values, w in terms]
        assert value == float(sum(Fraction(product) for product in products)) / weight


@settings(max_examples=60, deadline=None)
@given(st.tuples(ANY, ANY), st.lists(st.integers(1, 2**20), min_size=1, max_size=8))
def test_equal_updates_mean_themselves(values: tuple[float, ...], weights: list[int]) -> None:
    found = mean([(values, float(weight)) for weight in weights])
    assert torch.equal(found.float(), torch.tensor(values, dtype=torch.float32))


@settings(max_examples=60, deadline=None)
@given(TERMS)
def test_the_mean_lies_between_the_extremes(terms: Terms) -> None:
    columns = torch.stack([torch.tensor(values, dtype=torch.float32).double() for values, _ in terms])
    slack = columns.abs().max(0).values * 1e-12
    found = mean(terms)
    assert (found >= columns.min(0).values - slack).all()
    assert (found <= columns.max(0).values + slack).all()


@settings(max_examples=40, deadline=None)
@given(TERMS, st.randoms(use_true_random=False))
def test_a_rule_s_result_does_not_depend_on_the_order_either(terms: Terms, chance: object) -> None:
    state = GlobalState(AdapterState(SPEC, {"w": torch.zeros(3)}))
    updates = [
        Update(str(index), {"w": torch.tensor(values, dtype=torch.float32)}, num_examples=1)
        for index, (values, _) in enumerate(terms)
    ]
    found = []
    for _ in range(2):
        accumulator = FedIT().start(state, 1)
        for update in updates:
            accumulator.add(update, float(terms[int(update.client_id)][1]))
        result = accumulator.finish()
        found.append((bits(result.mean_delta["w"]), result.total_weight))  # type: ignore[index]
        chance.shuffle(updates)  # type: ignore[attr-defined]
    assert found[0] == found[1]
