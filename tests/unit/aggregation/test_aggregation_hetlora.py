"""HetLoRA against its own equation in float64, what goes down at a smaller rank, and who is pruned."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from federated.aggregation import ClientView, FedIT, HetLoRA, Result, make_rule
from federated.aggregation.hetlora import first_rows
from federated.delta import Update
from federated.errors import AggregationError, ConfigError, NotEnoughUpdates
from federated.global_state import GlobalState
from federated.state import AdapterState, RuleState, Tensors, group_of
from federated.testing import Case, cases, effective_of, examine

CASES = {case.name: case for case in cases(rule=HetLoRA())}
MIXED = replace(CASES["unequal weights"], ranks={"client-000": 1, "client-001": 2})
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def begun(rule: HetLoRA, case: Case) -> GlobalState:
    return GlobalState(case.adapter, rule_state=rule.init(case.adapter.spec))


def updates_of(rule: HetLoRA, state: GlobalState, case: Case) -> list[Update]:
    made = []
    for client, moves in case.trained.items():
        _, payload = rule.plan(state, ClientView(client, case.ranks.get(client)), 1)
        delta = {n: moves[n][tuple(slice(size) for size in t.shape)] for n, t in payload.tensors.items()}
        made.append(Update(client, delta, 1, received=payload))
    return made


def combined(rule: HetLoRA, state: GlobalState, updates: list[Update], case: Case) -> Result:
    accumulator = rule.start(state, 1)
    for update in updates:
        accumulator.add(update, case.weights[update.client_id])
    return accumulator.finish()


def moved(case: Case, result: Result) -> Tensors:
    return {n: case.adapter.tensors[n].double() + move for n, move in result.mean_delta.items()}


class TestTheWayDown:
    @pytest.mark.parametrize("name", ["alpha is not r", "rsLoRA", "Conv1D", "wide", "tall", "rank is a dimension"])
    @pytest.mark.parametrize("rank", [1, 2])
    def test_a_client_starts_from_the_effective_update_of_its_rows(self, name: str, rank: int):
        adapter = CASES[name].adapter
        found = effective_of(first_rows(adapter, rank))
        for pair in adapter.pairs():
            expected = pair.scaling * pair.factor_b[:, :rank].double() @ pair.factor_a[:rank].double()
            torch.testing.assert_close(found[pair.module.name], expected, rtol=1e-5, atol=1e-5)

    def test_a_is_sent_as_it_is(self):
        adapter = MIXED.adapter
        found = first_rows(adapter, 2)
        assert torch.equal(found.tensors["layer.q.factor_a"], adapter.tensors["layer.q.factor_a"][:2])
        assert found.tensors["head.weight"] is adapter.tensors["head.weight"]
        assert (found.spec.rank, found.spec.alpha) == (2, adapter.spec.alpha)

    def test_the_whole_rank_is_the_adapter(self):
        assert first_rows(MIXED.adapter, 3) is MIXED.adapter

    @pytest.mark.parametrize("rank", [0, 4])
    def test_a_rank_that_there_is_not(self, rank: int):
        with pytest.raises(AggregationError, match=f"rank {rank} was asked of an adapter of rank 3"):
            HetLoRA().plan(begun(HetLoRA(), MIXED), ClientView("one", rank), 1)

    def test_what_is_sent_has_the_adapter_s_dtype(self):
        case = CASES["mixed ranks, bfloat16"]
        plan, payload = HetLoRA().plan(begun(HetLoRA(), case), ClientView("one", 2), 1)
        assert {tensor.dtype for tensor in payload.tensors.values()} == {torch.bfloat16}
        assert (plan.rank, plan.trainable) == (2, ("factor_a", "factor_b", "dense"))

    def test_down_and_up_again_changes_nothing(self):
        """A client that learns nothing gives back the rows that it was sent."""
        case = replace(MIXED, trained={"client-000": {n: 0 * t for n, t in MIXED.adapter.tensors.items()}})
        state = begun(HetLoRA(), case)
        made = moved(case, combined(HetLoRA(), state, updates_of(HetLoRA(), state, case), case))
        for name, tensor in case.adapter.tensors.items():
            kept = {"factor_a": tensor[:1], "factor_b": tensor[:, :1], "dense": tensor}[group_of(name)]
            place = tuple(slice(size) for size in kept.shape)
            torch.testing.assert_close(made[name][place], kept.double(), rtol=1e-6, atol=1e-6)


def by_the_equation(case: Case, updates: list[Update]) -> dict[str, Tensor]:
    """``sum_k w_k pad(...)`` densely in float64, at the adapter's scaling."""
    spec = case.adapter.spec
    after = {
        u.client_id: AdapterState(
            u.received.spec, {n: t.double() + u.delta[n].double() for n, t in u.received.tensors.items()}
        )
        for u in updates
    }
    norms = {c: math.sqrt(sum(float(m.square().sum()) for m in effective_of(a).values())) for c, a in after.items()}
    if not any(norms.values()):
        norms = dict(case.weights)
    total, made = sum(norms.values()), {}
    for module in spec.modules:
        name = module.name
        mean_a = torch.zeros(module.rank, module.d_in, dtype=torch.float64)
        mean_b = torch.zeros(module.d_out, module.rank, dtype=torch.float64)
        for client, adapter in after.items():
            (own,) = (pair for pair in adapter.pairs() if pair.module.name == name)
            rank, share = own.module.rank, norms[client] / total
            mean_a[:rank] += share * own.factor_a
            mean_b[:, :rank] += share * own.factor_b * own.scaling / spec.scaling(module)
        made |= {f"{name}.factor_a": mean_a, f"{name}.factor_b": mean_b}
    weight = sum(case.weights[u.client_id] for u in updates)
    for name in case.adapter.dense():
        made[name] = sum(case.weights[c] / weight * adapter.tensors[name] for c, adapter in after.items())
    return made


class TestTheMean:
    @every_case
    def test_it_is_its_own_equation(self, case: Case):
        rule, state = HetLoRA(), begun(HetLoRA(), case)
        given = updates_of(rule, state, case)
        found, expected = moved(case, combined(rule, state, given, case)), by_the_equation(case, given)
        bound = 2e-2 if case.adapter.spec.dtype == "BF16" else 2e-6
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=bound, atol=bound)

    @every_case
    def test_the_suite_passes(self, case: Case):
        assert examine(HetLoRA(), case).passed

    def test_equal_updates_of_one_rank_are_fedit(self):
        case = replace(CASES["unequal weights"], trained=dict.fromkeys(MIXED.trained, MIXED.trained["client-000"]))
        state = begun(HetLoRA(), case)
        found = combined(HetLoRA(), state, updates_of(HetLoRA(), state, case), case).mean_delta
        accumulator = FedIT().start(state, 1)
        for client, moves in case.trained.items():
            accumulator.add(Update(client, moves, 1), case.weights[client])
        for name, tensor in accumulator.finish().mean_delta.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-12)

    def test_twice_the_update_is_twice_the_weight(self):
        """Fresh adapters: B ends at b and at 2 b under one A, so the weights are 1/3 and 2/3."""
        case = CASES["a fresh adapter"]
        one = {n: t if n.endswith("factor_b") else 0 * t for n, t in case.trained["client-000"].items()}
        trained = {"a": one, "b": {n: 2 * t for n, t in one.items()}}
        case = replace(case, trained=trained, weights={"a": 100.0, "b": 1.0})
        state = begun(HetLoRA(), case)
        found = combined(HetLoRA(), state, updates_of(HetLoRA(), state, case), case).mean_delta
        name = "layer.k.factor_b"
        torch.testing.assert_close(found[name], one[name].double() * 5 / 3, rtol=1e-6, atol=1e-9)

    def test_whoever_has_no_update_has_no_say(self):
        case = CASES["a fresh adapter"]
        idle = {n: torch.ones_like(t) if n.endswith("factor_a") else 0 * t for n, t in case.adapter.tensors.items()}
        both = replace(case, trained={"client-000": case.trained["client-000"], "client-001": idle})
        alone = replace(case, trained={"client-000": case.trained["client-000"]})
        state = begun(HetLoRA(), case)
        found = combined(HetLoRA(), state, updates_of(HetLoRA(), state, both), both).mean_delta
        expected = combined(HetLoRA(), state, updates_of(HetLoRA(), state, alone), alone).mean_delta
        assert all(torch.equal(found[n], t) for n, t in expected.items() if group_of(n) != "dense")

    def test_where_nobody_has_one_the_usual_weights_count(self):
        case = CASES["a fresh adapter"]
        moves = {n: torch.ones_like(t) if n.endswith("factor_a") else 0 * t for n, t in case.adapter.tensors.items()}
        trained = {"client-000": moves, "client-001": {n: 0 * t for n, t in moves.items()}}
        case = replace(case, trained=trained, weights={"client-000": 3.0, "client-001": 1.0})
        state = begun(HetLoRA(), case)
        found = combined(HetLoRA(), state, updates_of(HetLoRA(), state, case), case).mean_delta
        assert found["layer.q.factor_a"].unique().tolist() == [0.75]

    @pytest.mark.parametrize("gamma", [0.0, 0.7])
    def test_the_order_of_arrival_changes_no_bit(self, gamma: float):
        rule = HetLoRA(prune_gamma=gamma)
        state = begun(rule, MIXED)
        given = updates_of(rule, state, MIXED)
        results = [combined(rule, state, list(order), MIXED) for order in itertools.permutations(given)]
        for result in results:
            assert all(torch.equal(result.mean_delta[n], t) for n, t in results[0].mean_delta.items())
            assert result.rule_state.scalars == results[0].rule_state.scalars

    def test_a_bfloat16_master_gathers_small_steps(self):
        """A step below bfloat16's resolution moves the float32 master all the same."""
        case = CASES["mixed ranks, bfloat16"]
        step = {n: torch.full_like(t, 1e-5) for n, t in case.trained["client-000"].items()}
        case = replace(case, trained=dict.fromkeys(case.trained, step), ranks={})
        state = begun(HetLoRA(), case)
        for tensor in combined(HetLoRA(), state, updates_of(HetLoRA(), state, case), case).mean_delta.values():
            torch.testing.assert_close(tensor, torch.full_like(tensor, 1e-5), rtol=1e-6, atol=0)

    def test_what_does_not_fit_is_refused_and_not_mixed_in(self):
        rule, state = HetLoRA(prune_gamma=0.7), begun(HetLoRA(), MIXED)
        good = updates_of(rule, state, MIXED)
        accumulator = rule.start(state, 1)
        accumulator.add(good[0], MIXED.weights["client-000"])
        spoilt = {**good[1].delta, "head.weight": torch.full((2, 6), torch.nan)}
        bad = [
            (replace(good[1], delta=good[2].delta), 1.0, "found shape"),
            (replace(good[1], delta={}), 1.0, "names differ"),
            (replace(good[1], delta=spoilt), 1.0, "not finite"),
            (good[1], 0.0, "weight 0"),
            (good[1], math.inf, "weight inf"),
            (good[1], math.nan, "weight nan"),
            (good[0], 1.0, "two updates of client-000"),
        ]
        for update, weight, message in bad:
            with pytest.raises(AggregationError, match=message):
                accumulator.add(update, weight)
        for update in good[1:]:
            accumulator.add(update, MIXED.weights[update.client_id])
        found, expected = accumulator.finish(), combined(rule, state, good, MIXED)
        assert all(torch.equal(found.mean_delta[n], t) for n, t in expected.mean_delta.items())
        assert found.rule_state == expected.rule_state
        assert found.participants == 3

    def test_nothing_at_all(self):
        with pytest.raises(NotEnoughUpdates):
            HetLoRA().start(begun(HetLoRA(), MIXED), 1).finish()


def shrunk(adapter: AdapterState, start: int, factor: float) -> Tensors:
    """A move that multiplies the tail and leaves the rest."""
    moves = {n: torch.zeros_like(t, dtype=torch.float32) for n, t in adapter.tensors.items()}
    for name, tensor in adapter.tensors.items():
        if group_of(name) == "factor_a":
            moves[name][start:] = (factor - 1) * tensor[start:]
        elif group_of(name) == "factor_b":
            moves[name][:, start:] = (factor - 1) * tensor[:, start:]
    return moves


class TestPruning:
    RULE = HetLoRA(prune_gamma=0.7)

    def after(self, factor: float, *, rank: int | None = None, rule: HetLoRA | None = None) -> Result:
        used = rule or self.RULE
        state = begun(used, MIXED)
        _, payload = used.plan(state, ClientView("clinic", rank), 1)
        accumulator = used.start(state, 1)
        delta = shrunk(payload, used.kept_of(payload.spec.rank), factor)
        accumulator.add(Update("clinic", delta, 1, received=payload), 1.0)
        return accumulator.finish()

    def test_a_tail_that_shrank_is_cut_off_and_not_averaged(self):
        result = self.after(0.9)
        assert result.rule_state.scalars == {"ranks": {"clinic": 2}}
        made = moved(MIXED, result)
        assert float(made["layer.q.factor_a"][2:].abs().max()) < 1e-15
        assert float(made["layer.q.factor_b"][:, 2:].abs().max()) < 1e-15
        torch.testing.assert_close(made["layer.q.factor_a"][:2], MIXED.adapter.tensors["layer.q.factor_a"][:2].double())
        assert result.metrics == {"pruned": 1.0, "mean_rank": 2.0}

    @pytest.mark.parametrize("factor", [1.0, 1.1])
    def test_a_tail_that_did_not_shrink_stays(self, factor: float):
        result = self.after(factor)
        assert result.rule_state.scalars == {"ranks": {}}
        assert moved(MIXED, result)["layer.q.factor_a"][2:].all()

    def test_without_gamma_nobody_is_pruned(self):
        assert self.after(0.5, rule=HetLoRA()).rule_state.scalars == {"ranks": {}}

    def test_a_client_of_rank_one_has_no_tail(self):
        assert self.after(0.5, rank=1).rule_state.scalars == {"ranks": {}}

    def test_what_starts_at_zero_cannot_shrink(self):
        case = CASES["mixed ranks, a fresh adapter"]
        state = begun(self.RULE, case)
        result = combined(self.RULE, state, updates_of(self.RULE, state, case), case)
        assert result.rule_state.scalars == {"ranks": {}}

    def test_the_weight_is_that_of_what_is_left(self):
        rule, state = self.RULE, begun(self.RULE, MIXED)
        _, payload = rule.plan(state, ClientView("pruned"), 1)
        up = {n: 0.1 * MIXED.trained["client-002"][n].abs() * t.sign() for n, t in MIXED.adapter.tensors.items()}
        accumulator = rule.start(state, 1)
        accumulator.add(Update("pruned", shrunk(payload, 2, 0.5), 1, received=payload), 1.0)
        accumulator.add(Update("whole", up, 1, received=payload), 1.0)
        result = accumulator.finish()
        assert result.rule_state.scalars["ranks"] == {"pruned": 2}
        rows = first_rows(MIXED.adapter, 2)
        grown = {n: t + up[n] for n, t in MIXED.adapter.tensors.items()}
        sizes = [
            math.sqrt(sum(float(one.square().sum()) for one in effective_of(adapter).values()))
            for adapter in (rows, replace(MIXED.adapter, tensors=grown))
        ]
        share = sizes[1] / sum(sizes)
        found = moved(MIXED, result)["layer.q.factor_a"][2]
        torch.testing.assert_close(found, share * grown["layer.q.factor_a"][2].double(), rtol=1e-5, atol=1e-6)

    def test_ranks_are_remembered_and_only_fall(self):
        rule = self.RULE
        state = begun(rule, MIXED)
        ranks = []
        for _ in range(4):
            plan, payload = rule.plan(state, ClientView("clinic"), 1)
            ranks.append(plan.rank)
            accumulator = rule.start(state, 1)
            delta = shrunk(payload, rule.kept_of(plan.rank), 0.5)
            accumulator.add(Update("clinic", delta, 1, received=payload), 1.0)
            result = accumulator.finish()
            made = {n: t.float() for n, t in moved(replace(MIXED, adapter=state.adapter), result).items()}
            state = GlobalState(replace(MIXED.adapter, tensors=made), rule_state=result.rule_state)
        assert ranks == [3, 2, 1, 1]
        assert rule.plan(state, ClientView("another"), 1)[0].rank == 3

    def test_a_client_that_declares_less_than_it_had_gets_less(self):
        state = replace(begun(self.RULE, MIXED), rule_state=RuleState({"ranks": {"clinic": 2}}))
        assert [self.RULE.plan(state, ClientView("clinic", rank), 1)[0].rank for rank in (None, 2, 1)] == [2, 2, 1]

    @pytest.mark.parametrize(("gamma", "rank", "kept"), [(0.99, 8, 7), (0.5, 8, 4), (0.29, 100, 29), (0.1, 4, 1)])
    def test_the_rank_that_is_kept(self, gamma: float, rank: int, kept: int):
        assert HetLoRA(prune_gamma=gamma).kept_of(rank) == kept

    def test_the_penalty_is_in_the_plan(self):
        rule = HetLoRA(prune_gamma=0.7, tail_penalty=0.25)
        plan, _ = rule.plan(begun(rule, MIXED), ClientView("clinic"), 1)
        assert (plan.tail_penalty, plan.tail_start) == (0.25, 2)
        plan, _ = self.RULE.plan(begun(self.RULE, MIXED), ClientView("clinic"), 1)
        assert (plan.tail_penalty, plan.tail_start) == (0.0, 0)

    def test_own_payloads_only_where_ranks_are_pruned(self):
        assert self.RULE.properties.own_payloads
        assert not HetLoRA().properties.own_payloads


def test_a_state_that_it_did_not_make() -> None:
    with pytest.raises(AggregationError, match="was not made by HetLoRA"):
        HetLoRA().plan(GlobalState(MIXED.adapter), ClientView("one"), 1)
    with pytest.raises(AggregationError, match="was not made by HetLoRA"):
        HetLoRA().start(GlobalState(MIXED.adapter), 1)


def test_options_out_of_range_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.options\.prune_gamma = 1: .*less than 1"):
        make_rule("hetlora", {"prune_gamma": 1})
    with pytest.raises(ConfigError, match=r"options\.tail_penalty = 0\.1: .*give strategy\.options\.prune_gamma"):
        make_rule("hetlora", {"tail_penalty": 0.1})
