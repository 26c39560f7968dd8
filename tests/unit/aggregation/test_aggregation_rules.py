"""What is particular to each rule: who trains what, in which turn, in which order, and what is refused."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from federated import server_optimizers
from federated.aggregation import (
    FLASC,
    RULES,
    ClientView,
    FedIT,
    FedSALoRA,
    FedSB,
    FedSVD,
    FFALoRA,
    FlexLoRA,
    LoRAA2,
    Result,
    RoLoRA,
    Rule,
    check_combination,
    make_rule,
)
from federated.config import (
    AdapterConfig,
    ExperimentConfig,
    ServerOptimizerConfig,
    StrategyConfig,
    TaskConfig,
    TrainConfig,
)
from federated.delta import Update
from federated.errors import AggregationError, ConfigError, NotEnoughUpdates
from federated.global_state import GlobalState
from federated.state import AdapterState, RuleState, Tensors, group_of
from federated.testing import Case, cases, crowded, dense_mean, effective_of, examine
from federated.uploads import pack, unpack

CASES = {case.name: case for case in cases()}
CASE = CASES["unequal weights"]
CLIENT = ClientView("client-000")
CORED = {case.name: case for case in cases(rule=FedSB())}
ONE_PHASE = [name for name in sorted(RULES) if make_rule(name).properties.phases == 1]


def begun(rule: Rule, case: Case = CASE) -> GlobalState:
    return GlobalState(case.adapter, rule_state=rule.init(case.adapter.spec))


def updates(rule: Rule, state: GlobalState, case: Case = CASE) -> list[Update]:
    plan, payload = rule.plan(state, CLIENT, 1)
    trained = {
        client: {name: move for name, move in moves.items() if group_of(name) in plan.trainable}
        for client, moves in case.trained.items()
    }
    return [Update(client, unpack(plan, payload, pack(plan, payload, delta)), 1) for client, delta in trained.items()]


def combined(rule: Rule, state: GlobalState, given: list[Update], case: Case = CASE) -> Result:
    accumulator = rule.start(state, 1)
    for update in given:
        accumulator.add(update, case.weights[update.client_id])
    result = accumulator.finish()
    assert isinstance(result, Result)
    return result


def made_by(result: Result) -> Tensors:
    """Whichever of the two a rule yields, with the residual."""
    if result.mean_delta:
        return result.mean_delta
    residual = result.state.residual
    beside = {f"residual:{name}": tensor for name, tensor in residual.tensors.items()} if residual else {}
    return {**result.state.adapter.tensors, **beside}


def test_ffa_trains_and_sends_b_and_the_dense_tensors_only() -> None:
    rule = FFALoRA()
    plan, payload = rule.plan(begun(rule), CLIENT, 1)
    assert plan.trainable == ("factor_b", "dense")
    assert payload.tensors.keys() == CASE.adapter.tensors.keys()
    mean = combined(rule, begun(rule), updates(rule, begun(rule))).mean_delta
    assert mean is not None
    assert {group_of(name) for name in mean} == {"factor_b", "dense"}


def test_fedsa_trains_all_and_sends_a_only() -> None:
    rule = FedSALoRA()
    plan, payload = rule.plan(begun(rule), CLIENT, 1)
    assert plan.trainable == ("factor_a", "factor_b", "dense")
    assert (plan.sent, plan.kept) == (("factor_a",), ("factor_b", "dense"))
    assert payload.tensors.keys() == CASE.adapter.tensors.keys()
    result = combined(rule, begun(rule), updates(rule, begun(rule)))
    assert {group_of(name) for name in result.mean_delta or {}} == {"factor_a"}
    assert not result.servable
    moves, weights = [CASE.trained[client]["layer.q.factor_a"].double() for client in CASE.trained], CASE.weights
    mean = sum(weights[client] * move for client, move in zip(CASE.trained, moves, strict=True)) / sum(weights.values())
    torch.testing.assert_close(result.mean_delta["layer.q.factor_a"], mean, rtol=1e-12, atol=1e-12)


def test_rolora_s_turns_change_with_each_finished_round() -> None:
    rule, state, turns = RoLoRA(), begun(RoLoRA()), []
    for _ in range(4):
        turns.append(rule.plan(state, CLIENT, 1)[0].trainable[0])
        result = combined(rule, state, updates(rule, state))
        assert {group_of(name) for name in result.mean_delta or {}} == {turns[-1], "dense"}
        state = replace(state, rule_state=result.rule_state)
    assert turns == ["factor_b", "factor_a", "factor_b", "factor_a"]


def test_a_round_that_is_not_finished_uses_up_no_turn() -> None:
    rule, state = RoLoRA(), begun(RoLoRA())
    with pytest.raises(NotEnoughUpdates):
        rule.start(state, 1).finish()
    assert rule.plan(state, CLIENT, 1)[0].trainable == ("factor_b", "dense")


def test_rolora_refuses_a_state_that_it_did_not_make() -> None:
    with pytest.raises(AggregationError, match="was not made by RoLoRA: its turn is None"):
        RoLoRA().plan(GlobalState(CASE.adapter), CLIENT, 1)
    with pytest.raises(AggregationError, match="its turn is dense"):
        RoLoRA().start(GlobalState(CASE.adapter, rule_state=RuleState({"turn": "dense"})), 1)


def _shallow() -> Case:
    """A layer of two outputs under an adapter of rank three."""
    generator = torch.Generator().manual_seed(3)
    spec = replace(CASE.adapter.spec, modules=tuple(replace(one, d_out=2) for one in CASE.adapter.spec.modules))

    def cut(tensors: Tensors) -> dict[str, torch.Tensor]:
        drawn = {name: torch.randn(2, 3, generator=generator) for name in tensors if name.endswith("factor_b")}
        return {**tensors, **drawn}

    moves = {client: cut(tensors) for client, tensors in CASE.trained.items()}
    return replace(CASE, adapter=AdapterState(spec, cut(CASE.adapter.tensors)), trained=moves)


class TestFedSVD:
    def test_a_has_orthonormal_rows_and_the_product_is_that_of_the_mean(self):
        rule, state = FedSVD(), begun(FedSVD())
        made = combined(rule, state, updates(rule, state)).state.adapter
        mean = combined(FFALoRA(), begun(FFALoRA()), updates(FFALoRA(), begun(FFALoRA()))).mean_delta
        for pair in made.pairs():
            name = pair.module.name
            torch.testing.assert_close(pair.factor_a @ pair.factor_a.T, torch.eye(3), rtol=0, atol=1e-6)
            factor_b = CASE.adapter.tensors[f"{name}.factor_b"] + mean[f"{name}.factor_b"]
            expected = pair.scaling * factor_b.double() @ CASE.adapter.tensors[f"{name}.factor_a"].double()
            torch.testing.assert_close(effective_of(made)[name], expected, rtol=1e-5, atol=1e-5)

    def test_directions_that_nobody_uses_can_still_be_trained(self):
        case = CASES["nobody learns anything"]
        rule, state = FedSVD(), begun(FedSVD(), case)
        for pair in combined(rule, state, updates(rule, state, case), case).state.adapter.pairs():
            assert not pair.factor_b.any()
            torch.testing.assert_close(pair.factor_a @ pair.factor_a.T, torch.eye(3), rtol=0, atol=1e-6)

    def test_a_rank_beyond_the_layer_s_side_keeps_its_other_rows(self):
        case = _shallow()
        rule, state = FedSVD(), begun(FedSVD(), case)
        for pair in combined(rule, state, updates(rule, state, case), case).state.adapter.pairs():
            assert torch.equal(pair.factor_a[2:], case.adapter.tensors[f"{pair.module.name}.factor_a"][2:])
            assert not pair.factor_b[:, 2:].any()
        assert examine(rule, case).passed


@pytest.mark.parametrize("name", ["fedsa", "fedsvd", "ffa", "rolora"])
def test_an_update_of_a_frozen_factor_is_refused_and_not_mixed_in(name: str) -> None:
    rule = make_rule(name)
    state = begun(rule)
    good = updates(rule, state)
    accumulator = rule.start(state, 1)
    with pytest.raises(AggregationError, match=r"update of mallory does not fit .*factor_"):
        accumulator.add(Update("mallory", CASE.trained["client-000"], 1), 1.0)
    for update in good:
        accumulator.add(update, CASE.weights[update.client_id])
    found, expected = made_by(accumulator.finish()), made_by(combined(rule, state, good))
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("name", ONE_PHASE)
def test_the_order_of_arrival_changes_no_bit(name: str) -> None:
    rule = make_rule(name)
    case = CASE if rule.properties.adapter == "lora" else CORED[CASE.name]
    case = crowded(case, rule.properties.min_updates)
    state = begun(rule, case)
    given, results = updates(rule, state, case), []
    for order in [given[::-1], *itertools.islice(itertools.permutations(given), 6)]:
        result = combined(rule, state, list(order), case)
        results.append(made_by(result))
    assert all(torch.equal(other[key], results[0][key]) for other in results for key in results[0])


class TestSparseMessages:
    """FLASC and LoRA-A2: each its own equation in float64, and what they are when nothing is left out."""

    @pytest.mark.parametrize(
        "case", [CASE, CASES["Conv1D"], CASES["rsLoRA"], CASES["bfloat16"]], ids=lambda one: one.name
    )
    @pytest.mark.parametrize("density", [0.05, 0.5])
    def test_flasc_is_the_mean_of_the_largest_entries(self, case: Case, density: float):
        rule = FLASC(density_down=density, density_up=density)
        state = begun(rule, case)
        plan, payload = rule.plan(state, CLIENT, 1)
        names = [name for name in payload.tensors if group_of(name) != "dense"]

        def top(tensors: Tensors) -> dict[str, torch.Tensor]:
            flat = torch.cat([tensors[name].double().flatten() for name in names])
            bound = flat.abs().sort(descending=True).values[math.ceil(density * len(flat)) - 1]
            return {
                name: torch.where(tensors[name].double().abs() >= bound, tensors[name].double(), 0) for name in names
            }

        held = state.materialise().tensors
        for name, tensor in (top(held) | {"head.weight": held["head.weight"]}).items():
            assert torch.equal(payload.tensors[name].double(), tensor.double())
        given = [
            Update(client, unpack(plan, payload, pack(plan, payload, moves)), 1)
            for client, moves in case.trained.items()
        ]
        mean = combined(rule, state, given, case).mean_delta
        total = sum(case.weights.values())
        for name in names:
            expected = sum(case.weights[one] / total * top(moves)[name] for one, moves in case.trained.items())
            torch.testing.assert_close(mean[name], expected, rtol=1e-12, atol=1e-15)

    def test_flasc_that_leaves_nothing_out_is_fedit(self):
        flasc, state = FLASC(density_down=1, density_up=1), begun(FedIT())
        assert flasc.plan(state, CLIENT, 1)[0] == FedIT().plan(state, CLIENT, 1)[0]
        payloads = [rule.plan(state, CLIENT, 1)[1].tensors for rule in (flasc, FedIT())]
        assert all(torch.equal(payloads[0][name], tensor) for name, tensor in payloads[1].items())
        found, expected = (combined(rule, state, updates(rule, state)).mean_delta for rule in (flasc, FedIT()))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    @pytest.mark.parametrize("turn", ["factor_b", "factor_a"])
    def test_lora_a2_is_the_mean_of_the_chosen_ranks(self, turn: str):
        rule, state = LoRAA2(rank=1), replace(begun(LoRAA2()), rule_state=RuleState({"turn": turn}))
        plan, payload = rule.plan(state, CLIENT, 1)
        assert (plan.trainable, plan.rank_budget) == ((turn, "dense"), 1)
        expected, given = {}, []
        for client, moves in CASE.trained.items():
            share = CASE.weights[client] / sum(CASE.weights.values())
            delta = {name: move for name, move in moves.items() if group_of(name) in plan.trainable}
            given.append(Update(client, unpack(plan, payload, pack(plan, payload, delta)), 1))
            scored = []
            for pair in payload.pairs():
                b, a = (moves if turn == kind else payload.tensors for kind in ("factor_b", "factor_a"))
                for rank in range(pair.module.rank):
                    column, row = b[f"{pair.module.name}.factor_b"][:, rank], a[f"{pair.module.name}.factor_a"][rank]
                    scored.append((float(torch.outer(column, row).norm()), pair.module.name, rank))
            for _, layer, rank in sorted(scored, reverse=True)[:2]:
                at = (slice(None), rank) if turn == "factor_b" else (rank, slice(None))
                kept = expected.setdefault(f"{layer}.{turn}", torch.zeros_like(delta[f"{layer}.{turn}"]).double())
                kept[at] += share * delta[f"{layer}.{turn}"].double()[at]
        result = combined(rule, state, given)
        assert result.rule_state.scalars == {"turn": "factor_a" if turn == "factor_b" else "factor_b"}
        for name, tensor in expected.items():
            torch.testing.assert_close(result.mean_delta[name], tensor, rtol=1e-12, atol=1e-15)

    @pytest.mark.parametrize("rank", [3, 99])
    def test_lora_a2_with_room_for_all_ranks_is_rolora(self, rank: int):
        a2, state = LoRAA2(rank=rank), begun(RoLoRA())
        assert a2.plan(state, CLIENT, 1)[0] == RoLoRA().plan(state, CLIENT, 1)[0]
        found, expected = (combined(rule, state, updates(rule, state)) for rule in (a2, RoLoRA()))
        assert found.rule_state == expected.rule_state
        assert all(torch.equal(found.mean_delta[name], tensor) for name, tensor in expected.mean_delta.items())


class TestFlexLoRA:
    def test_the_share_of_energy_in_the_adapter_is_reported(self):
        even = CASES["many clients"]
        rule, state = FlexLoRA(), begun(FlexLoRA(), even)
        share = combined(rule, state, updates(rule, state, even), even).metrics["energy_kept"]
        after = {
            client: replace(even.adapter, tensors={name: even.adapter.tensors[name] + moves[name] for name in moves})
            for client, moves in even.trained.items()
        }
        squares = [torch.linalg.svdvals(matrix).square() for matrix in dense_mean(after, even.weights).values()]
        kept = sum(float(one[:3].sum()) for one in squares) / sum(float(one.sum()) for one in squares)
        assert share == pytest.approx(kept)
        assert share < 0.9999
        alone = CASES["one client"]
        result = combined(rule, begun(rule, alone), updates(rule, begun(rule, alone), alone), alone)
        assert result.metrics["energy_kept"] == pytest.approx(1.0)

    def test_directions_that_nobody_uses_can_still_be_trained(self):
        case = CASES["nobody learns anything"]
        rule, state = FlexLoRA(), begun(FlexLoRA(), case)
        result = combined(rule, state, updates(rule, state, case), case)
        made = result.state.adapter
        assert result.metrics["energy_kept"] == 1.0
        assert all(not matrix.any() for matrix in effective_of(made).values())
        for pair in made.pairs():
            assert torch.equal(pair.factor_a, case.adapter.tensors[f"{pair.module.name}.factor_a"])

    def test_both_factors_are_of_one_size(self):
        rule, state = FlexLoRA(), begun(FlexLoRA())
        for pair in combined(rule, state, updates(rule, state)).state.adapter.pairs():
            torch.testing.assert_close(pair.factor_a.norm(dim=1), pair.factor_b.norm(dim=0))

    def test_another_basis_of_the_same_product_changes_nothing(self):
        """The gauge attack: (B Q, Q^-1 A) is the same update, whatever Q."""
        rule, state = FlexLoRA(), begun(FlexLoRA())
        honest = updates(rule, state)
        turned = {}
        for pair in CASE.adapter.pairs():
            name, mix = pair.module.name, torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double()
            delta = honest[0].delta
            after_b = (pair.factor_b + delta[f"{name}.factor_b"]).double() @ mix
            after_a = torch.linalg.solve(mix, (pair.factor_a + delta[f"{name}.factor_a"]).double())
            turned[f"{name}.factor_b"] = (after_b - pair.factor_b).float()
            turned[f"{name}.factor_a"] = (after_a - pair.factor_a).float()
        attack = replace(honest[0], delta={**honest[0].delta, **turned})
        one = effective_of(combined(rule, state, honest).state.adapter)
        other = effective_of(combined(rule, state, [attack, *honest[1:]]).state.adapter)
        for name, matrix in one.items():
            torch.testing.assert_close(other[name], matrix, rtol=1e-4, atol=1e-4)

    def test_an_adapter_without_dense_tensors(self):
        plain = {name: tensor for name, tensor in CASE.adapter.tensors.items() if group_of(name) != "dense"}
        spec = replace(CASE.adapter.spec, head=None)
        case = replace(CASE, adapter=replace(CASE.adapter, spec=spec, tensors=plain))
        rule, state = FlexLoRA(), begun(FlexLoRA(), case)
        given = [
            replace(update, delta={name: move for name, move in update.delta.items() if name in plain})
            for update in updates(rule, state)
        ]
        assert combined(rule, state, given).state.adapter.tensors.keys() == plain.keys()

    def test_nothing_and_bad_weights_are_refused(self):
        rule, state = FlexLoRA(), begun(FlexLoRA())
        accumulator = rule.start(state, 1)
        with pytest.raises(AggregationError, match="weight 0"):
            accumulator.add(updates(rule, state)[0], 0.0)
        with pytest.raises(AggregationError, match="tensor names differ"):
            accumulator.add(replace(updates(rule, state)[0], delta={}), 1.0)
        with pytest.raises(NotEnoughUpdates):
            accumulator.finish()

    def test_an_update_that_fails_half_way_is_not_mixed_in(self):
        rule, state = FlexLoRA(), begun(FlexLoRA())
        good, bad = updates(rule, state), {**CASE.trained["client-000"], "head.weight": torch.full((2, 6), torch.inf)}
        accumulator = rule.start(state, 1)
        with pytest.raises(AggregationError, match="not finite"):
            accumulator.add(Update("aaa", bad, 1), 1.0)
        with pytest.raises(AggregationError, match="weight inf"):
            accumulator.add(good[0], torch.inf)
        for update in good:
            accumulator.add(update, CASE.weights[update.client_id])
        found, expected = made_by(accumulator.finish()), made_by(combined(rule, state, good))
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())

    def test_a_client_counts_once(self):
        rule, state = FlexLoRA(), begun(FlexLoRA())
        accumulator = rule.start(state, 1)
        accumulator.add(updates(rule, state)[0], 1.0)
        with pytest.raises(AggregationError, match="two updates of client-000"):
            accumulator.add(updates(rule, state)[0], 1.0)


def experiment(rule: str, optimizer: ServerOptimizerConfig, **adapter: Any) -> ExperimentConfig:
    properties = make_rule(rule).properties
    strategy = StrategyConfig(rule, weighted=not properties.robust, server_optimizer=optimizer)
    kind = {"kind": properties.adapter, **adapter}
    parts = {"strategy": strategy, "adapter": AdapterConfig(**kind), "train": TrainConfig(optimizer="sgd")}
    return ExperimentConfig(task=TaskConfig(labels=("no", "yes")), **parts)


@pytest.mark.parametrize("name", sorted(RULES))
@pytest.mark.parametrize("optimizer", [("sgd", 1.0), ("sgd", 0.5), ("adam", 0.01)])
def test_server_optimizers_go_with_rules_that_yield_a_delta(name: str, optimizer: tuple[str, float]) -> None:
    rule = make_rule(name)
    config = experiment(name, ServerOptimizerConfig(optimizer[0], learning_rate=optimizer[1]))
    if rule.properties.fixed_space or optimizer == ("sgd", 1.0):
        check_combination(rule, config)
    else:
        how = "and a residual" if rule.properties.residual else "by a factorisation"
        how = how if rule.properties.averages else "with a memory"
        expected = f"{name} makes the next adapter itself, {how}.*use sgd with learning rate 1"
        with pytest.raises(ConfigError, match=expected):
            check_combination(rule, config)


@pytest.mark.parametrize("name", ["adam", "yogi", "adagrad"])
def test_an_adaptive_step_of_one_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"learning_rate = 1: {name} moves every value by about that much"):
        check_combination(FFALoRA(), experiment("ffa", ServerOptimizerConfig(name)))
    check_combination(FFALoRA(), experiment("ffa", ServerOptimizerConfig(name, tau=1.0)))


@pytest.mark.parametrize("name", sorted(RULES))
def test_mixed_ranks_go_with_rules_that_combine_them(name: str) -> None:
    rule, optimizer = make_rule(name), ServerOptimizerConfig("sgd")
    check_combination(rule, experiment(name, optimizer, rank=8, client_ranks=(8, 16)))  # none is smaller
    smaller = experiment(name, optimizer, rank=8, client_ranks=(8, 4))
    if rule.properties.mixed_ranks:
        check_combination(rule, smaller)
    else:
        with pytest.raises(
            ConfigError, match=rf"adapter\.client_ranks = \[8, 4\]: {name} averages factors of one rank"
        ):
            check_combination(rule, smaller)


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_rule_goes_with_its_own_kind_of_adapter(name: str) -> None:
    rule = make_rule(name)
    own = rule.properties.adapter
    other = {"lora": "lora_xs", "lora_xs": "lora"}[own]
    check_combination(rule, experiment(name, ServerOptimizerConfig()))
    expected = rf"adapter\.kind = '{other}': {name} is a rule for adapters of kind {own}; set adapter\.kind={own}"
    with pytest.raises(ConfigError, match=expected):
        check_combination(rule, experiment(name, ServerOptimizerConfig(), kind=other))


class TestFedSB:
    def test_it_trains_and_sends_cores_and_dense_tensors_only(self):
        rule, case = FedSB(), CORED["unequal weights"]
        plan, payload = rule.plan(begun(rule, case), CLIENT, 1)
        assert plan.trainable == plan.sent == ("core", "dense")
        assert payload.tensors.keys() == case.adapter.tensors.keys()
        mean = combined(rule, begun(rule, case), updates(rule, begun(rule, case), case), case).mean_delta
        total = sum(case.weights.values())
        for name in ("layer.k.core", "head.weight"):
            expected = sum(case.weights[one] / total * moves[name].double() for one, moves in case.trained.items())
            torch.testing.assert_close(mean[name], expected, rtol=1e-12, atol=1e-12)
        assert {group_of(name) for name in mean} == {"core", "dense"}

    def test_an_adapter_without_cores_is_refused(self):
        with pytest.raises(AggregationError, match="a lora adapter has none: use lora_xs"):
            FedSB().plan(begun(FedSB()), CLIENT, 1)

    def test_an_update_of_a_frozen_factor_is_refused(self):
        rule, case = FedSB(), CORED["unequal weights"]
        accumulator = rule.start(begun(rule, case), 1)
        with pytest.raises(AggregationError, match=r"update of mallory does not fit .*factor_a"):
            accumulator.add(Update("mallory", case.trained["client-000"], 1), 1.0)

    @pytest.mark.parametrize("name", ["momentum", "adam", "yogi", "adagrad"])
    def test_server_optimizers_move_the_core_and_nothing_frozen(self, name: str):
        rule, case = FedSB(), CORED["rsLoRA"]
        mean = combined(rule, begun(rule, case), updates(rule, begun(rule, case), case), case).mean_delta
        config = ServerOptimizerConfig(name, learning_rate=0.1)
        gradient = {key: -tensor for key, tensor in mean.items()}
        moments = server_optimizers.init(config, case.adapter)
        made, _ = server_optimizers.step(config, moments, case.adapter, pseudo_gradient=gradient)
        moved = {key for key, tensor in made.tensors.items() if not torch.equal(tensor, case.adapter.tensors[key])}
        assert moved == set(mean)


def test_an_option_that_a_rule_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.options\.tau = 3: no option of ffa; it takes none"):
        make_rule("ffa", {"tau": 3})
