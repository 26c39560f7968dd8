"""A number of examples is a client's claim: it counts by the weight that the server made of it, and in no other way."""

from dataclasses import replace

import pytest
import torch

from federated.aggregation import RULES, ClientView, NextPhase, Result, Rule, make_rule
from federated.delta import Update, apply_some
from federated.global_state import GlobalState
from federated.state import AdapterState, Tensors, group_of
from federated.testing import Case, cases, crowded
from federated.uploads import pack, unpack


def played(rule: Rule, case: Case, claims: dict[str, int]) -> Result:
    """A round in which each client weighs 1 and claims what it claims."""
    state, phase, held = (
        GlobalState(case.adapter, rule_state=rule.init(case.adapter.spec)),
        1,
        dict[str, AdapterState](),
    )
    while True:
        accumulator = rule.start(state, phase)
        for client_id, moves in case.trained.items():
            plan, payload = rule.plan(state, ClientView(client_id), phase)
            delta = {name: move for name, move in moves.items() if group_of(name) in plan.trainable}
            start = replace(held[client_id], extra=payload.extra) if plan.cached else payload
            if not plan.cached:
                held[client_id] = apply_some(payload, delta)
            sent = unpack(plan, payload, pack(plan, start, {} if plan.cached else delta))
            accumulator.add(Update(client_id, sent, claims.get(client_id, 1), received=payload), 1.0)
        found = accumulator.finish()
        if isinstance(found, Result):
            return found
        assert isinstance(found, NextPhase)
        state, phase = found.state, found.phase


def moved(found: Result) -> Tensors:
    """All that a result says, by name."""
    made = {f"mean:{name}": tensor for name, tensor in (found.mean_delta or {}).items()}
    if found.state is not None:
        made |= {f"state:{name}": tensor for name, tensor in found.state.export().tensors.items()}
    return made


@pytest.mark.parametrize("name", sorted(RULES))
def test_where_each_counts_once_a_claim_changes_no_bit(name: str) -> None:
    rule = make_rule(name)
    case = crowded(next(iter(cases(rule=rule))), max(3, rule.properties.min_updates))
    liar = sorted(case.trained)[0]
    honest, claimed = (moved(played(make_rule(name), case, claims)) for claims in ({}, {liar: 10**6}))
    assert honest
    assert honest.keys() == claimed.keys()
    assert all(torch.equal(honest[key], claimed[key]) for key in honest)
