"""FedIT: the mean of factors, what that is equal to, and what it is not equal to."""

from typing import Any

import pytest
import torch

from federated import server_optimizers
from federated.aggregation import (
    RULES,
    Accumulator,
    ClientView,
    FedIT,
    NextPhase,
    Result,
    Rule,
    RuleProperties,
    make_rule,
)
from federated.config import ServerOptimizerConfig
from federated.delta import Update, add, apply, subtract
from federated.errors import AggregationError, ConfigError, NotEnoughUpdates
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, HeadSpec, ModuleSpec
from federated.state import AdapterState, RuleState

MODULE = ModuleSpec("q", d_in=6, d_out=5, rank=3, alpha=12.0)
SPEC = AdapterSpec("lora", 3, 12.0, use_rslora=False, modules=(MODULE,), head=HeadSpec("mean_pool", 2, True, 0))
SHAPES = {"q.factor_a": (3, 6), "q.factor_b": (5, 3), "head.weight": (2, 4)}
AVERAGING = ServerOptimizerConfig()


def drawn(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def world(seed: int = 0) -> GlobalState:
    return GlobalState(AdapterState(SPEC, drawn(seed)))


def update(client_id: str, delta: dict[str, torch.Tensor], examples: int = 10) -> Update:
    return Update(client_id, delta, num_examples=examples)


def finished(state: GlobalState, updates: list[Update]) -> Result:
    accumulator = FedIT().start(state, 1)
    for item in updates:
        accumulator.add(item, float(item.num_examples))
    return accumulator.finish()


def stepped(state: GlobalState, result: Result) -> dict[str, torch.Tensor]:
    gradient = {name: -tensor for name, tensor in (result.mean_delta or {}).items()}
    moments = server_optimizers.init(AVERAGING, state.adapter)
    moved, _ = server_optimizers.step(AVERAGING, moments, state.adapter, pseudo_gradient=gradient)
    return dict(moved.tensors)


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name].double(), expected[name].double(), rtol=rtol, atol=1e-6)


def test_one_client_gives_its_own_local_result() -> None:
    state, local = world(), drawn(1)
    result = finished(state, [update("only", subtract(local, state.adapter.tensors), examples=77)])
    assert_near(stepped(state, result), local)


def test_one_client_s_delta_goes_in_exactly() -> None:
    state, delta = world(), drawn(1)
    result = finished(state, [update("only", delta, examples=77)])
    assert all(torch.equal(stepped(state, result)[name], moved) for name, moved in applied(state, delta).items())


def applied(state: GlobalState, delta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State plus delta, added in float64 and rounded once."""
    return {name: (tensor.double() + delta[name].double()).float() for name, tensor in state.adapter.tensors.items()}


def test_the_mean_of_deltas_is_the_mean_of_weights() -> None:
    state, locals_ = world(), [drawn(seed) for seed in (1, 2, 3)]
    result = finished(state, [update(str(i), subtract(one, state.adapter.tensors)) for i, one in enumerate(locals_)])
    mean = {name: sum(one[name].double() for one in locals_) / 3 for name in SHAPES}
    assert_near(stepped(state, result), mean)


def test_examples_are_weights() -> None:
    first, second = drawn(1), drawn(2)
    result = finished(world(), [update("a", first, examples=30), update("b", second, examples=10)])
    mean = {name: (3 * first[name].double() + second[name].double()) / 4 for name in SHAPES}
    assert_near(dict(result.mean_delta or {}), mean, rtol=1e-12)
    assert (result.participants, result.total_weight, result.state) == (2, 40.0, None)


def product(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The effective update, dense and in float64: ``scaling * B @ A``."""
    return SPEC.scaling(MODULE) * tensors["q.factor_b"].double() @ tensors["q.factor_a"].double()


def gap(locals_: list[dict[str, torch.Tensor]], weights: list[int]) -> float:
    """How far FedIT's effective update is from the weighted sum of the clients' own, relative to that sum."""
    state = world()
    updates = [
        update(str(index), subtract(one, state.adapter.tensors), examples=weight)
        for index, (one, weight) in enumerate(zip(locals_, weights, strict=True))
    ]
    found = product(stepped(state, finished(state, updates)))
    truth = sum(weight * product(one) for one, weight in zip(locals_, weights, strict=True)) / sum(weights)
    return float((found - truth).norm() / truth.norm())


def test_different_factors_leave_a_gap_to_the_sum_of_products() -> None:
    """Approximate by design: cross terms ``B_i A_j`` come in."""
    assert gap([drawn(1), drawn(2)], [10, 30]) > 0.1


def test_the_gap_is_the_cross_terms() -> None:
    first, second = drawn(1), drawn(2)
    state = world()
    deltas = [subtract(one, state.adapter.tensors) for one in (first, second)]
    found = product(stepped(state, finished(state, [update("a", deltas[0]), update("b", deltas[1])])))
    truth = (product(first) + product(second)) / 2
    apart = product({name: (first[name].double() - second[name].double()) / 2 for name in ("q.factor_a", "q.factor_b")})
    torch.testing.assert_close(truth - found, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", ["q.factor_a", "q.factor_b"])
def test_one_shared_factor_closes_the_gap(shared: str) -> None:
    first, second = drawn(1), drawn(2)
    assert gap([first, {**second, shared: first[shared]}], [10, 30]) < 1e-6


def test_equal_clients_have_no_gap() -> None:
    assert gap([drawn(1)] * 3, [1, 2, 3]) < 1e-6


@pytest.mark.parametrize(
    "change",
    [
        {"q.factor_a": torch.ones(4, 6)},
        {"q.factor_a": torch.ones(6)},
        {"stranger": torch.ones(1)},
        {"q.factor_a": None},
    ],
    ids=["other rank", "broadcast", "extra", "missing"],
)
def test_what_does_not_fit_is_refused_by_client_and_tensor(change: dict[str, Any]) -> None:
    delta = {name: tensor for name, tensor in {**drawn(1), **change}.items() if tensor is not None}
    accumulator = FedIT().start(world(), 1)
    accumulator.add(update("good", drawn(2)), 1.0)
    with pytest.raises(AggregationError, match=rf"update of clinic-7 does not fit .*{next(iter(change))}"):
        accumulator.add(update("clinic-7", delta), 1.0)
    result = accumulator.finish()
    assert result.participants == 1
    assert_near(dict(result.mean_delta or {}), drawn(2), rtol=0)


def test_an_update_that_is_not_finite_is_refused_and_leaves_the_mean() -> None:
    accumulator = FedIT().start(world(), 1)
    accumulator.add(update("good", drawn(2)), 1.0)
    with pytest.raises(AggregationError, match="not finite"):
        accumulator.add(update("bad", {**drawn(1), "head.weight": torch.full((2, 4), torch.nan)}), 1.0)
    assert accumulator.finish().participants == 1


def test_no_update_at_all() -> None:
    with pytest.raises(NotEnoughUpdates):
        FedIT().start(world(), 1).finish()


@pytest.mark.parametrize("phase", [0, 2])
def test_there_is_one_phase(phase: int) -> None:
    with pytest.raises(AggregationError, match=f"one phase, found phase {phase}"):
        FedIT().start(world(), phase)


def test_a_plan_trains_everything_from_the_global_adapter() -> None:
    state = world()
    plan, payload = FedIT().plan(state, ClientView("clinic"), 1)
    assert (plan.rank, plan.phase, plan.mode) == (3, 1, "train")
    assert plan.trainable == ("factor_a", "factor_b", "dense")
    assert all(torch.equal(payload.tensors[name], tensor) for name, tensor in state.adapter.tensors.items())


def test_a_client_of_another_rank_is_not_served() -> None:
    with pytest.raises(AggregationError, match="rank 2"):
        FedIT().plan(world(), ClientView("clinic", rank=2), 1)


def test_it_remembers_nothing_and_says_what_it_is() -> None:
    assert FedIT().init(SPEC) == RuleState()
    assert FedIT.properties == RuleProperties(
        "approximate",
        "factor",
        linear=True,
        mean_decides=True,
        needs_lora=False,
        asynchronous="any",
        paper=FedIT.properties.paper,
    )
    assert not FedIT.properties.mixed_ranks


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_satisfies_the_protocol_under_its_name(name: str) -> None:
    rule = make_rule(name)
    assert isinstance(rule, Rule)
    assert rule.name == name
    state = GlobalState(world().adapter, rule_state=rule.init(SPEC))
    assert isinstance(rule.start(state, 1), Accumulator)
    if rule.properties.phases == 1:
        with pytest.raises(AggregationError, match="has one phase, found phase 2"):
            rule.start(state, 2)


def test_an_unknown_rule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.rule = 'crumb': unknown rule; expected one of .*fedit"):
        make_rule("crumb")


def test_a_result_and_a_next_phase_are_told_apart() -> None:
    assert Result().servable
    assert not isinstance(NextPhase(world(), 2), Result)


def test_adding_deltas_in_either_grouping_is_near() -> None:
    """Linear: the mean of sums is the sum of means, which client-level noise and masks rest on."""
    state, first, second = world(), drawn(1), drawn(2)
    both = finished(state, [update("a", add(first, second)), update("b", add(second, first))]).mean_delta
    one = finished(state, [update("a", first), update("b", second)]).mean_delta
    assert_near(dict(both or {}), {name: 2 * tensor for name, tensor in (one or {}).items()}, rtol=1e-5)
    assert apply(state.adapter, first).spec is SPEC
