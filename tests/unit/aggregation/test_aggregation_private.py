"""Client-level privacy in front of rules: exact, ahead of all that is not linear, and refused where it is no cover."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from federated.aggregation import RULES, ClientView, NextPhase, check_combination, make_rule
from federated.aggregation.private_mean import CLIP_NORM, PrivateMean, clip_norm_of
from federated.config import experiment_from
from federated.config.privacy import ClientPrivacyConfig
from federated.delta import Update
from federated.errors import AggregationError, ConfigError, PrivacyError
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, ModuleSpec
from federated.privacy.chance import NoiseSource
from federated.state import AdapterState, RuleState, Tensors
from federated.uploads import layout

MODULES = (ModuleSpec("k", 5, 4, 2, 4.0), ModuleSpec("q", 3, 6, 2, 4.0))
FREE = sorted(name for name in RULES if make_rule(name).properties.mean_decides)
CONFIG = ClientPrivacyConfig(enabled=True, clip_norm=0.7, noise_multiplier=1.5)


def start_of(rule: Any, seed: int = 0) -> GlobalState:
    chance = torch.Generator().manual_seed(seed)
    core = rule.properties.adapter == "lora_xs"
    spec = AdapterSpec("lora_xs" if core else "lora", 2, 4.0, use_rslora=False, modules=MODULES)
    tensors: dict[str, torch.Tensor] = {"head.weight": torch.randn(3, generator=chance)}
    for module in MODULES:
        tensors[f"{module.name}.factor_a"] = torch.randn(2, module.d_in, generator=chance)
        tensors[f"{module.name}.factor_b"] = torch.randn(module.d_out, 2, generator=chance)
        if core:
            tensors[f"{module.name}.core"] = torch.randn(2, 2, generator=chance)
    return GlobalState(AdapterState(spec, tensors), rule_state=rule.init(spec))


def updates_for(rule: Any, state: GlobalState, count: int = 4) -> list[Update]:
    plan, payload = rule.plan(state, ClientView("anybody"), 1)
    made = []
    for number in range(count):
        chance = torch.Generator().manual_seed(100 + number)
        delta = {entry.name: number * torch.randn(entry.shape, generator=chance) for entry in layout(plan, payload)}
        made.append(Update(f"client-{number}", delta, num_examples=10 * number + 1, steps=number + 1))
    return made


def outcome(rule: Any, state: GlobalState, updates: list[Update]) -> tuple[Tensors, RuleState]:
    """The adapter after plain averaging's step, float64 where it can be, and the rule's memory."""
    accumulator = rule.start(state, 1)
    for update in updates:
        accumulator.add(update, 1.0)
    return moved(state, accumulator.finish())


def moved(state: GlobalState, result: Any) -> tuple[Tensors, RuleState]:
    after = dict((result.state or state).adapter.tensors)
    for name, tensor in (result.mean_delta or {}).items():
        after[name] = after[name].double() + tensor
    return after, result.rule_state or state.rule_state


def private(rule: Any, state: GlobalState, config: ClientPrivacyConfig = CONFIG, **changes: Any) -> PrivateMean:
    plan, payload = rule.plan(state, ClientView("anybody"), 1)
    parts: dict[str, Any] = {"config": config, "noise_multiplier": 1.5, "planned": 5.0}
    return PrivateMean(rule.start(state, 1), state.rule_state, layout(plan, payload), **{**parts, **changes})


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The noise that is drawn, in the sorted order of the tensors' names."""
    import os

    kept: list[torch.Tensor] = []

    class Captured(NoiseSource):
        def normal(self, count: int) -> torch.Tensor:
            kept.append(super().normal(count))
            return kept[-1]

    monkeypatch.setattr(
        "federated.aggregation.private_mean.noise_source", lambda seed=-1: Captured(os.urandom, private=True)
    )
    return kept


def test_the_rules_that_go_with_it():
    assert {"fedit", "ffa", "rolora", "fedsvd", "fedprox", "fedsb"} <= set(FREE)
    assert all(make_rule(name).properties.linear for name in FREE)


@pytest.mark.parametrize("name", FREE)
def test_of_such_a_rule_the_mean_decides(name: str):
    """Whatever the number of updates, who sent them and their claims: one update equal to the mean does the same."""
    rule = make_rule(name)
    state = start_of(rule)
    updates = updates_for(rule, state)
    mean = {key: sum(one.delta[key].double() for one in updates) / len(updates) for key in updates[0].delta}
    several, memory = outcome(rule, state, updates)
    single, same = outcome(rule, state, [Update("the mean", mean, num_examples=1)])
    assert memory == same
    for key, tensor in several.items():
        torch.testing.assert_close(tensor.double(), single[key].double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["fednova", "feddyn"])
def test_a_rule_that_looks_further_does_not_say_so(name: str):
    rule = make_rule(name)
    state = start_of(rule)
    updates = updates_for(rule, state)
    mean = {key: sum(one.delta[key].double() for one in updates) / len(updates) for key in updates[0].delta}
    several, memory = outcome(rule, state, updates)
    single, other = outcome(rule, state, [Update("the mean", mean, num_examples=1)])
    assert memory != other or any(not torch.allclose(several[key], single[key]) for key in several)


@pytest.mark.parametrize("name", FREE)
def test_it_is_the_dense_definition(name: str, drawn: list[torch.Tensor]):
    """Clipped by the norm of the whole vector, summed, noised and divided in float64, then the rule on that mean."""
    rule = make_rule(name)
    state = start_of(rule)
    updates = updates_for(rule, state)
    accumulator = private(rule, state)
    for update in updates:
        accumulator.add(update, 1.0)
    result = accumulator.finish()
    names = sorted(updates[0].delta)
    total = torch.cat([noise.double() for noise in drawn]) * 1.5 * 0.7
    for update in updates:
        flat = torch.cat([update.delta[key].double().flatten() for key in names])
        total = total + flat * min(1.0, 0.7 / max(float(flat.norm()), 1e-300))
    sizes = [updates[0].delta[key].numel() for key in names]
    parts = dict(zip(names, (total / 5.0).split(sizes), strict=True))
    mean = {key: parts[key].reshape(updates[0].delta[key].shape) for key in names}
    truth, memory = outcome(rule, state, [Update("truth", mean, num_examples=1)])
    found, kept = moved(state, result)
    assert memory == kept
    for key, tensor in truth.items():
        torch.testing.assert_close(found[key].double(), tensor.double(), rtol=1e-6, atol=1e-7)
    assert (result.participants, result.total_weight) == (4, 4.0)
    assert result.metrics["noise_std"] == pytest.approx(1.5 * 0.7 / 5)


def test_a_weight_is_refused():
    rule = make_rule("fedit")
    state = start_of(rule)
    with pytest.raises(AggregationError, match="every update counts once"):
        private(rule, state).add(updates_for(rule, state)[0], 2.0)


def test_a_second_phase_is_refused():
    class Endless:
        def add(self, update: Update, weight: float) -> None:
            pass

        def finish(self) -> NextPhase:
            return NextPhase(state, 2)

    rule = make_rule("fedit")
    state = start_of(rule)
    plan, payload = rule.plan(state, ClientView("anybody"), 1)
    accumulator = PrivateMean(
        Endless(), state.rule_state, layout(plan, payload), config=CONFIG, noise_multiplier=1.0, planned=1.0
    )
    with pytest.raises(AggregationError, match="another phase"):
        accumulator.finish()


def test_the_clipping_norm_lives_beside_the_rule_s_own_memory():
    rule = make_rule("rolora")
    state = start_of(rule)
    config = replace(CONFIG, clipping="adaptive", quantile_noise=5.0)
    accumulator = private(rule, state, config)
    result = accumulator.finish()
    assert result.rule_state is not None
    assert result.rule_state.scalars["turn"] == "factor_a"
    assert clip_norm_of(result.rule_state, config) == result.rule_state.scalars[CLIP_NORM] != 0.7
    assert clip_norm_of(result.rule_state, CONFIG) == 0.7
    assert "unclipped_share" in result.metrics


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_saved_norm_that_bounds_nothing_is_refused(bad: float):
    with pytest.raises(PrivacyError, match="saved clipping norm"):
        clip_norm_of(RuleState({CLIP_NORM: bad}), replace(CONFIG, clipping="adaptive"))


def test_a_count_that_leaves_nothing_is_refused_where_the_cohort_is_known():
    config = experiment_from(
        {
            "task": {"labels": ["a", "b"]},
            "strategy": {"weighted": False},
            "privacy": {"client": {"enabled": True, "noise_multiplier": 1.0, "clipping": "adaptive"}},
        }
    )
    check_combination(make_rule("fedit"), config)
    check_combination(make_rule("fedit"), config, clients=100)
    with pytest.raises(ConfigError, match="quantile_noise"):
        check_combination(make_rule("fedit"), config, clients=8)


# ---- correlated noise ------------------------------------------------------------------------------------------------


def turns(name: str, fraction: float = 0.1) -> Any:
    adapter = {"adapter": {"kind": "lora_xs"}} if make_rule(name).properties.adapter == "lora_xs" else {}
    return experiment_from(
        {
            "task": {"labels": ["a", "b"]},
            "strategy": {"rule": name, "weighted": False},
            "selection": {"fraction": fraction},
            "privacy": {"client": {"enabled": True, "noise_multiplier": 1.0, "mechanism": "banded"}},
            **adapter,
        }
    )


def adds_up(rule: Any, rounds: int = 4) -> bool:
    """Whether all rounds' updates hold the same tensors, and the adapter moves by their mean and nothing else."""
    state, layouts = start_of(rule), []
    for seed in range(rounds):
        plan, payload = rule.plan(state, ClientView("anybody"), 1)
        layouts.append([(entry.name, entry.shape) for entry in layout(plan, payload)])
        chance = torch.Generator().manual_seed(seed)
        delta = {name: torch.randn(shape, generator=chance) for name, shape in layouts[-1]}
        accumulator = rule.start(state, 1)
        accumulator.add(Update("the noised mean", delta, num_examples=1), 1.0)
        result = accumulator.finish()
        moved_by = result.mean_delta or {}
        if set(moved_by) != set(delta) or not all(torch.equal(moved_by[name], delta[name].double()) for name in delta):
            return False
        after, memory = moved(state, result)
        tensors = {name: tensor.float() for name, tensor in after.items()}
        state = GlobalState(AdapterState(state.adapter.spec, tensors), rule_state=memory)
    return all(one == layouts[0] for one in layouts)


@pytest.mark.parametrize("name", FREE)
def test_correlated_noise_goes_with_the_rules_whose_updates_add_up(name: str):
    rule = make_rule(name)
    properties = rule.properties
    allowed = properties.fixed_space and not properties.alternates
    if name != "fedsa":  # its clients send more than what is summed: their own B stays with them
        assert adds_up(rule) == allowed
    if allowed:
        check_combination(rule, turns(name), clients=10)
        return
    with pytest.raises(ConfigError, match=f"mechanism = 'banded': {name} "):
        check_combination(rule, turns(name))


def test_both_kinds_of_rules_are_there():
    assert {name for name in FREE if not make_rule(name).properties.fixed_space} == {"fedsvd"}
    assert {name for name in FREE if make_rule(name).properties.alternates} == {"rolora"}


def test_fewer_clients_than_groups_are_refused_where_they_are_known():
    check_combination(make_rule("fedit"), turns("fedit"))
    with pytest.raises(ConfigError, match="9 clients in 10 groups"):
        check_combination(make_rule("fedit"), turns("fedit"), clients=9)


@pytest.mark.parametrize("name", ["lora_a2", "rolora"])
def test_a_rule_that_says_that_it_alternates_does(name: str):
    rule = make_rule(name)
    state = start_of(rule)
    asked = []
    for _ in range(2):
        plan, payload = rule.plan(state, ClientView("anybody"), 1)
        asked.append(set(plan.trainable))
        zeros = {entry.name: torch.zeros(entry.shape) for entry in layout(plan, payload)}
        accumulator = rule.start(state, 1)
        accumulator.add(Update("client-0", zeros, num_examples=1, received=payload), 1.0)
        state = GlobalState(state.adapter, rule_state=accumulator.finish().rule_state)
    assert asked[0] != asked[1]
    assert rule.properties.alternates
