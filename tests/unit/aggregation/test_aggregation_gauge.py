"""The gauge attack on every rule: ``(B G^-1, G A)`` is the same update in another basis.

A rule's class is in its properties: nothing happens (immune), it cannot be sent (refused), or it is known to do harm
(exposed). A new entry in RULES is held to what it says without a line here.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from federated.aggregation import RULES, ClientView, FedIT, NextPhase, Result, Rule, RuleProperties, make_rule
from federated.delta import Update, apply_some
from federated.errors import AggregationError
from federated.global_state import GlobalState
from federated.manifest import TrainPlan
from federated.state import AdapterState, Tensors, group_of
from federated.testing import GAUGES, Case, cases, crowded, effective_of, in_another_basis
from federated.uploads import layout, pack, unpack

CASES = {case.name: case for case in cases()}
TRIED = ("alpha is not r", "rsLoRA", "Conv1D", "wide", "rank is a dimension", "a fresh adapter", "bfloat16")
TOLERANCE = {"flip": 1e-5, "turn": 1e-5, "scale": 2e-3}
"""Of the result, relative: what float32 deltas can say. ``A / 1000`` as a change of A loses three digits."""
HOSTILE = "client-001"
every_gauge = pytest.mark.parametrize("gauge", sorted(GAUGES))
Change = Callable[[AdapterState, Tensors], Tensors]


def of_class(*names: str) -> Any:
    return pytest.mark.parametrize("name", [one for one in sorted(RULES) if make_rule(one).properties.gauge in names])


def case_for(rule: Rule, name: str) -> Case:
    found = {case.name: case for case in cases(rule=rule)}
    return crowded(found[name], max(3, rule.properties.min_updates + 1))


def trained(plan: TrainPlan, moves: Tensors) -> dict[str, Tensor]:
    return {name: move for name, move in moves.items() if group_of(name) in plan.trainable}


def played(rule: Rule, case: Case, changes: Mapping[str, Change], state: GlobalState | None = None) -> GlobalState:
    """One whole round as a server plays it, with what some clients send changed; the state after it."""
    state = state or GlobalState(case.adapter, rule_state=rule.init(case.adapter.spec))
    phase, held = 1, dict[str, AdapterState]()
    while True:
        accumulator = rule.start(state, phase)
        for client_id, moves in case.trained.items():
            plan, payload = rule.plan(state, ClientView(client_id), phase)
            if plan.cached:  # answers from what it held after the first exchange
                start, delta = replace(held[client_id], extra=payload.extra), trained(plan, {})
            else:
                start, delta = payload, trained(plan, moves)
                if client_id in changes:
                    delta = dict(changes[client_id](payload, delta))
                held[client_id] = apply_some(payload, delta)
            sent = unpack(plan, payload, pack(plan, start, delta))
            accumulator.add(Update(client_id, sent, 1, received=payload), 1.0)
        found = accumulator.finish()
        if isinstance(found, Result):
            return after(state, found)
        assert isinstance(found, NextPhase)
        state, phase = found.state, found.phase


def after(state: GlobalState, result: Result) -> GlobalState:
    """The step of plain averaging, or the rule's own state."""
    made = result.state or state
    if result.mean_delta is not None:
        before = state.adapter.tensors
        moved = {name: (before[name].double() + move.double()).float() for name, move in result.mean_delta.items()}
        made = replace(made, adapter=replace(state.adapter, tensors={**before, **moved}))
    return replace(made, rule_state=result.rule_state or made.rule_state)


def apart(one: GlobalState, other: GlobalState) -> float:
    """Relative distance of what two states serve: effective updates and dense tensors."""
    left, right = one.export(), other.export()
    pairs = list(zip(effective_of(left).values(), effective_of(right).values(), strict=True))
    pairs += [(left.dense()[name].double(), right.dense()[name].double()) for name in left.dense()]
    far = torch.stack([(mine - yours).square().sum() for mine, yours in pairs]).sum().sqrt()
    return float(far / torch.stack([mine.square().sum() for mine, _ in pairs]).sum().sqrt())


def attack(gauge: str) -> dict[str, Change]:
    return {HOSTILE: lambda payload, delta: in_another_basis(payload, delta, GAUGES[gauge])}


@every_gauge
@of_class("immune")
def test_an_immune_rule_s_result_is_the_same(name: str, gauge: str) -> None:
    rule = make_rule(name)
    for tried in TRIED:
        case = case_for(rule, tried)
        assert apart(played(rule, case, {}), played(rule, case, attack(gauge))) < TOLERANCE[gauge], tried


@every_gauge
@of_class("immune")
def test_nor_does_it_help_if_all_change_their_basis(name: str, gauge: str) -> None:
    rule = make_rule(name)
    case = case_for(rule, "alpha is not r")
    everybody = dict.fromkeys(case.trained, attack(gauge)[HOSTILE])
    assert apart(played(rule, case, {}), played(rule, case, everybody)) < TOLERANCE[gauge]


@of_class("refused")
def test_a_refusing_rule_has_no_place_for_another_basis(name: str) -> None:
    """One factor is frozen and in no update: not for a client that tries, nor for one that sends it nevertheless."""
    rule = make_rule(name)
    case = case_for(rule, "alpha is not r")
    state = GlobalState(case.adapter, rule_state=rule.init(case.adapter.spec))
    for _ in range(2):  # RoLoRA's turns
        plan, payload = rule.plan(state, ClientView(HOSTILE), 1)
        groups = {group_of(entry.name) for entry in layout(plan, payload)}
        assert len(groups & {"factor_a", "factor_b"}) <= 1
        delta = trained(plan, case.trained[HOSTILE])
        with pytest.raises(AggregationError, match="another basis needs both factors"):
            in_another_basis(payload, delta, GAUGES["turn"])
        forced = in_another_basis(payload, case.trained[HOSTILE], GAUGES["turn"])
        with pytest.raises(AggregationError):
            rule.start(state, 1).add(Update(HOSTILE, forced, 1, received=payload), 1.0)
        state = played(rule, case, {}, state)


@every_gauge
@of_class("exposed")
def test_an_exposed_rule_says_so_and_still_gives_something_finite(name: str, gauge: str) -> None:
    rule = make_rule(name)
    case = case_for(rule, "alpha is not r")

    def tried(payload: AdapterState, delta: Tensors) -> Tensors:
        try:
            return in_another_basis(payload, delta, GAUGES[gauge])
        except AggregationError:  # trains one factor alone
            return delta

    assert all(torch.isfinite(t).all() for t in played(rule, case, {HOSTILE: tried}).export().tensors.values())


@every_gauge
def test_fedit_s_exposure_is_real(gauge: str) -> None:
    """One client of twelve, with the same effective update as before, moves the mean of factors."""
    case = CASES["many clients"]
    assert FedIT.properties.gauge == "exposed"
    assert apart(played(FedIT(), case, {}), played(FedIT(), case, attack(gauge))) > 0.05


def test_a_rule_that_says_nothing_counts_as_exposed() -> None:
    assert RuleProperties("exact", "factor", linear=True).gauge == "exposed"
    assert set(get_args(get_type_hints(RuleProperties)["gauge"])) == {"immune", "refused", "exposed"}


@every_gauge
def test_another_basis_is_the_same_update(gauge: str) -> None:
    case = CASES["rsLoRA"]
    delta = case.trained[HOSTILE]
    moved = in_another_basis(case.adapter, delta, GAUGES[gauge])
    one, other = (
        effective_of(replace(case.adapter, tensors={n: t + change[n] for n, t in case.adapter.tensors.items()}))
        for change in (delta, moved)
    )
    for layer, matrix in one.items():
        torch.testing.assert_close(other[layer], matrix, rtol=2e-3, atol=2e-3)
    assert not torch.allclose(moved["layer.q.factor_a"], delta["layer.q.factor_a"])
    assert torch.equal(moved["head.weight"], delta["head.weight"])
