"""What an update is relative to, by what a client is sent, and which rules buffered rounds take."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from federated.aggregation import RULES, ClientView, FedIT, Rule, basis_of, check_combination, make_rule
from federated.config import ExperimentConfig, experiment_from
from federated.errors import AggregationError, ConfigError
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, ModuleSpec, TrainPlan
from federated.state import AdapterState, RuleState

SPEC = AdapterSpec("lora", 2, 4.0, use_rslora=False, modules=(ModuleSpec("q", 3, 5, 2, 4.0),))
GROUPS = {"a": "q.factor_a", "b": "q.factor_b", "head": "head.weight"}


def state_of(rule: Rule, **moved: float) -> GlobalState:
    """A state in which some tensors are away from where they were."""
    shapes = {"q.factor_a": (2, 3), "q.factor_b": (5, 2), "head.weight": (2, 5)}
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    for key, step in moved.items():
        tensors[GROUPS[key]] = tensors[GROUPS[key]] + step
    return GlobalState(AdapterState(SPEC, tensors), rule_state=rule.init(SPEC))


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("fedit", {"a", "b", "head"}),
        ("ffa", {"b", "head"}),
        ("rolora", {"b", "head"}),
        ("fedrot", {"a", "b", "head"}),
        ("fedsa", {"a", "b", "head"}),
        ("fedsvd", set()),
        ("flexlora", set()),
        ("fedex", set()),
        ("flora", set()),
        ("florist", set()),
    ],
)
def test_a_version_keeps_the_basis_when_only_what_is_trained_moved(name: str, kept: set[str]) -> None:
    rule = make_rule(name)
    before = basis_of(rule, state_of(rule))
    assert basis_of(rule, state_of(rule)) == before
    assert {key for key in GROUPS if basis_of(rule, state_of(rule, **{key: 1e-6})) == before} == kept


def test_a_turn_is_a_basis_of_its_own() -> None:
    rule = make_rule("rolora")
    first = state_of(rule)
    second = replace(first, rule_state=RuleState({"turn": "factor_a"}))
    assert basis_of(rule, first) != basis_of(rule, second)
    moved = replace(state_of(rule, b=0.5), rule_state=RuleState({"turn": "factor_a"}))
    assert basis_of(rule, second) != basis_of(rule, moved)  # what stands still in A's turn is B


def test_a_residual_is_part_of_it_whatever_the_rule() -> None:
    rule = FedIT()
    plain = state_of(rule)

    def beside(value: float) -> GlobalState:
        factors = {"q.factor_a": torch.full((1, 3), value), "q.factor_b": torch.ones(5, 1)}
        spec = AdapterSpec("lora", 1, 1.0, use_rslora=False, modules=(ModuleSpec("q", 3, 5, 1, 1.0),))
        return replace(plain, residual=AdapterState(spec, factors))

    assert len({basis_of(rule, state) for state in (plain, beside(1.0), beside(2.0))}) == 3
    assert basis_of(rule, beside(1.0)) == basis_of(rule, replace(beside(1.0), adapter=state_of(rule, a=1.0).adapter))


def test_so_is_whatever_a_rule_sends_along_and_the_plan() -> None:
    class Sends(FedIT):
        def __init__(self, extra: float = 0.0, **plan: Any) -> None:
            self.extra, self.changes = extra, plan

        def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
            plan, payload = super().plan(state, client, phase)
            return replace(plan, **self.changes), replace(payload, extra={"control": torch.full((2,), self.extra)})

    made = [Sends(), Sends(1.0), Sends(proximal_mu=0.5), Sends(kept=("factor_b",))]
    assert len({basis_of(rule, state_of(rule)) for rule in made}) == 4


def test_what_stays_on_the_clients_may_differ() -> None:
    class Keeps(FedIT):
        def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
            plan, payload = super().plan(state, client, phase)
            return replace(plan, kept=("factor_b",)), payload

    assert basis_of(Keeps(), state_of(Keeps())) == basis_of(Keeps(), state_of(Keeps(), b=1.0, a=1.0))


def test_a_state_of_another_rule_has_none() -> None:
    with pytest.raises(AggregationError, match="not made by RoLoRA"):
        basis_of(make_rule("rolora"), state_of(FedIT()))


def config(**policy: Any) -> ExperimentConfig:
    return experiment_from({"task": {"labels": ["a", "b"]}, "round": {"mode": "buffered", **policy}})


class TestCombinations:
    @pytest.mark.parametrize("name", sorted(RULES))
    def test_a_rule_with_one_basis_per_version_needs_few_at_work(self, name: str):
        rule = make_rule(name)
        check_combination(rule, config(buffer=3, concurrency=3)) if rule.properties.asynchronous != "no" else None
        if rule.properties.asynchronous == "any":
            check_combination(rule, config(buffer=1, concurrency=50))
        elif rule.properties.asynchronous == "same_basis":
            with pytest.raises(
                ConfigError, match=r"round\.concurrency = 4 above round\.buffer = 3: .* up to 3 updates"
            ):
                check_combination(rule, config(buffer=3, concurrency=4))

    def test_a_rule_that_does_not_say_so_is_refused(self):
        class Silent(FedIT):
            name = "silent"
            properties = replace(FedIT.properties, asynchronous="no")

        with pytest.raises(ConfigError, match=r"round\.mode = 'buffered': silent needs a cohort"):
            check_combination(Silent(), config(concurrency=1))
        check_combination(Silent(), config(mode="sync"))

    def test_a_share_of_the_clients_has_no_meaning(self):
        with pytest.raises(ConfigError, match=r"selection\.fraction = 0\.5: round\.mode=buffered has no cohorts"):
            experiment_from(
                {"task": {"labels": ["a", "b"]}, "round": {"mode": "buffered"}, "selection": {"fraction": 0.5}}
            )
