"""FedASK: optimal where the sketch covers the sum, near it where not; sums only; a new start when a client is lost."""

import itertools
from collections.abc import Collection
from dataclasses import replace

import pytest
import torch

from federated.aggregation import ClientView, FedASK, NextPhase, Result, make_rule
from federated.delta import Update
from federated.errors import AggregationError, ConfigError, NotEnoughUpdates
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, ModuleSpec
from federated.state import AdapterState, RuleState, group_of
from federated.testing import Case, cases, dense_mean, effective_of, examine
from federated.uploads import layout, pack, unpack

CASES = {case.name: case for case in cases(rule=FedASK())}


def large(*, clients: int = 4, rank: int = 3, ranks: dict[str, int] | None = None, dtype: str = "F32") -> Case:
    """Layers far larger than the sketch."""
    generator = torch.Generator().manual_seed(9)
    layers = (ModuleSpec("layer.k", 60, 90, rank, 8.0), ModuleSpec("layer.q", 90, 60, rank, 8.0, fan_in_fan_out=True))
    spec = AdapterSpec("lora", rank, 8.0, use_rslora=False, modules=layers, dtype=dtype)
    shapes = {f"{one.name}.factor_a": (rank, one.d_in) for one in layers}
    shapes |= {f"{one.name}.factor_b": (one.d_out, rank) for one in layers} | {"head.weight": (2, 60)}

    def drawn() -> dict[str, torch.Tensor]:
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    start = AdapterState(spec, drawn())
    names = [f"client-{number:03d}" for number in range(clients)]
    weights = {name: 1.0 + index for index, name in enumerate(names)}
    return Case("large", start, {name: drawn() for name in names}, weights, ranks=ranks or {})


class Federation:
    """Clients as the real ones are: they train in phase 1, keep what they have, and answer later phases from it."""

    def __init__(self, rule: FedASK, case: Case, state: GlobalState | None = None) -> None:
        self.rule = rule
        self.case = case
        self.state = state or GlobalState(case.adapter, rule_state=rule.init(case.adapter.spec))
        self.held: dict[str, AdapterState] = {}

    def messages(self, state: GlobalState, phase: int, clients: Collection[str]) -> list[Update]:
        return [self.message(state, phase, client) for client in clients]

    def message(self, state: GlobalState, phase: int, client: str) -> Update:
        plan, payload = self.rule.plan(state, ClientView(client, self.case.ranks.get(client)), phase)
        moves = self.case.trained[client]
        if plan.cached:
            start = replace(payload, tensors=self.held[client].tensors)
            delta = {n: t for n, t in moves.items() if group_of(n) == "dense"}
        else:
            start = payload
            delta = {n: moves[n][tuple(slice(size) for size in t.shape)] for n, t in payload.tensors.items()}
            moved = {n: t.float() + delta[n] for n, t in payload.tensors.items()}
            self.held[client] = replace(payload, tensors=moved)
        sent = pack(plan, start, delta)
        assert {one.name: one.shape for one in layout(plan, payload)} == {n: tuple(t.shape) for n, t in sent.items()}
        return Update(client, unpack(plan, payload, sent), 1, received=payload)

    def phase(self, state: GlobalState, phase: int, clients: Collection[str]) -> NextPhase | Result:
        accumulator = self.rule.start(state, phase)
        for update in self.messages(state, phase, clients):
            accumulator.add(update, self.case.weights[update.client_id])
        return accumulator.finish()

    def round(self, *lost: Collection[str]) -> Result:
        """A whole round; ``lost[n]`` are lost before phase n + 2."""
        here, found, phase = sorted(self.case.trained), NextPhase(self.state, 1), 0
        while isinstance(found, NextPhase):
            here = [client for client in here if phase < 1 or client not in (lost + ((),) * 9)[phase - 1]]
            assert found.phase == phase + 1
            found, phase = self.phase(found.state, phase + 1, here), phase + 1
        self.phases = phase
        return found

    def truth(self, clients: Collection[str] | None = None) -> dict[str, torch.Tensor]:
        chosen = {name: self.held[name] for name in clients or self.held}
        return dense_mean(chosen, self.case.weights)


def error(made: AdapterState, truth: dict[str, torch.Tensor], *, rank: int) -> tuple[float, float]:
    """Distance from the truth, and that of the best of its rank, relative to it."""
    found = effective_of(made)
    size = float(torch.stack([one.square().sum() for one in truth.values()]).sum().sqrt())
    away = torch.stack([(found[n] - one).square().sum() for n, one in truth.items()]).sum().sqrt()
    best = torch.stack([torch.linalg.svdvals(one)[rank:].square().sum() for one in truth.values()]).sum().sqrt()
    return float(away) / size, float(best) / size


class TestWhereTheSketchCovers:
    @pytest.mark.parametrize("dtype", ["F32", "BF16"])
    @pytest.mark.parametrize("oversample", [9, 20, 500])
    def test_it_is_the_best_of_its_rank(self, oversample: int, dtype: str):
        """Four clients of rank three: a mean of rank twelve, and as many columns or more."""
        federation = Federation(FedASK(oversample=oversample), large(dtype=dtype))
        result = federation.round()
        found, best = error(result.state.adapter, federation.truth(), rank=3)
        assert best > 0.1
        assert found == pytest.approx(best, abs=1e-6)
        assert result.metrics["uncovered_layers"] == (2 if oversample == 9 else 0)  # the last direction may hide more
        assert (result.participants, result.total_weight, federation.phases) == (4, 10.0, 2)

    def test_clients_of_several_ranks(self):
        case = large(ranks={"client-000": 1, "client-001": 2})
        federation = Federation(FedASK(oversample=8), case)
        result = federation.round()
        assert {one.spec.rank for one in federation.held.values()} == {1, 2, 3}
        found, best = error(result.state.adapter, federation.truth(), rank=3)
        assert found == pytest.approx(best, abs=1e-6)
        assert result.metrics["uncovered_layers"] == 0

    def test_one_client_s_own_result_is_kept(self):
        federation = Federation(FedASK(oversample=0), large(clients=1))
        result = federation.round()
        assert error(result.state.adapter, federation.truth(), rank=3)[0] < 1e-6
        assert result.metrics["energy_kept"] == pytest.approx(1.0)

    def test_equal_clients_are_one_client(self):
        case = large()
        case = replace(case, trained=dict.fromkeys(case.trained, case.trained["client-000"]))
        federation = Federation(FedASK(oversample=2), case)
        assert error(federation.round().state.adapter, federation.truth(), rank=3)[0] < 1e-6

    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.parametrize("seed", [0, 1])
    def test_the_suite_passes(self, name: str, seed: int):
        assert examine(FedASK(seed=seed), CASES[name]).passed

    def test_directions_that_nobody_uses_can_still_be_trained(self):
        case = CASES["nobody learns anything"]
        made = Federation(FedASK(), case).round().state.adapter
        assert all(not matrix.any() for matrix in effective_of(made).values())
        for pair in made.pairs():
            assert torch.equal(pair.factor_a, case.adapter.tensors[f"{pair.module.name}.factor_a"])


class TestWhereItDoesNot:
    @pytest.mark.parametrize("seed", range(4))
    def test_it_is_near_the_best_and_says_that_it_may_not_be_it(self, seed: int):
        federation = Federation(FedASK(oversample=4, seed=seed), large(clients=12))
        result = federation.round()
        found, best = error(result.state.adapter, federation.truth(), rank=3)
        assert best < found < 1.3 * best
        assert result.metrics["uncovered_layers"] == 2

    def test_more_columns_bring_it_nearer(self):
        gaps = []
        for oversample in (0, 4, 12, 33):
            federation = Federation(FedASK(oversample=oversample), large(clients=12))
            found, best = error(federation.round().state.adapter, federation.truth(), rank=3)
            gaps.append(found - best)
        assert gaps == sorted(gaps, reverse=True)
        assert gaps[-1] == pytest.approx(0.0, abs=1e-6)


class TestSums:
    def test_the_server_needs_only_the_sums(self):
        """Secure aggregation: all weighted messages added up, as if one client of all the weight had sent them."""
        case = large()
        federation = Federation(FedASK(oversample=9), case)
        apart = federation.round()
        total = sum(case.weights.values())

        def summed(state: GlobalState, phase: int) -> NextPhase | Result:
            accumulator = federation.rule.start(state, phase)
            updates = federation.messages(state, phase, case.trained)
            mean = {
                name: sum(case.weights[one.client_id] / total * one.delta[name].double() for one in updates)
                for name in updates[0].delta
            }
            accumulator.add(replace(updates[0], client_id="sum", delta=mean), total)
            return accumulator.finish()

        first = summed(federation.state, 1)
        together = summed(first.state, 2).state.adapter
        for name, matrix in effective_of(apart.state.adapter).items():
            torch.testing.assert_close(effective_of(together)[name], matrix, rtol=1e-4, atol=1e-4)

    def test_the_order_of_arrival_changes_no_bit(self):
        case = large(clients=3)
        results = []
        for order in itertools.permutations(case.trained):
            federation = Federation(FedASK(), case)
            first = federation.phase(federation.state, 1, order)
            results.append(federation.phase(first.state, 2, order[::-1]).state.adapter.tensors)
        assert all(torch.equal(other[n], t) for other in results for n, t in results[0].items())

    def test_a_client_of_a_smaller_rank_scales_its_own(self):
        """alpha / r differs by rank; the server sees no ranks."""
        case = large(ranks={"client-000": 1})
        federation = Federation(FedASK(oversample=60), case)
        (update,) = federation.messages(federation.state, 1, ["client-000"])
        held = federation.held["client-000"]
        assert float(update.delta["layer.k.sketch"].norm()) == pytest.approx(
            float(effective_of(held)["layer.k"].norm()), rel=1e-4
        )


class TestTwoPhases:
    def test_what_is_asked_and_sent_in_each(self):
        federation = Federation(FedASK(oversample=5), large())
        plan, payload = federation.rule.plan(federation.state, ClientView("client-000"), 1)
        assert (plan.upload, plan.cached, plan.sketch_columns, plan.rank) == ("sketch", False, 8, 3)
        assert payload.tensors.keys() == federation.case.adapter.tensors.keys()
        first = federation.phase(federation.state, 1, federation.case.trained)
        assert (type(first), first.phase) == (NextPhase, 2)
        plan, payload = federation.rule.plan(first.state, ClientView("client-000"), 2)
        assert (plan.upload, plan.cached, plan.phase) == ("projection", True, 2)
        assert not payload.tensors
        assert {n: tuple(t.shape) for n, t in payload.extra.items()} == {
            "layer.k.basis": (90, 8),
            "layer.q.basis": (60, 8),
        }
        for basis in payload.extra.values():
            torch.testing.assert_close(basis.T @ basis, torch.eye(8), rtol=0, atol=1e-5)

    def test_the_same_columns_for_all_in_a_round_and_others_in_the_next(self):
        federation = Federation(FedASK(seed=3), large())
        seeds = {federation.rule.plan(federation.state, ClientView(name), 1)[0].sketch_seed for name in "abc"}
        state = federation.round().state
        seeds_later = {federation.rule.plan(state, ClientView(name), 1)[0].sketch_seed for name in "abc"}
        other = FedASK(seed=4).plan(federation.state, ClientView("a"), 1)[0].sketch_seed
        assert len(seeds) == len(seeds_later) == 1
        assert len(seeds | seeds_later | {other}) == 3

    def test_nothing_of_a_round_is_left_in_the_memory(self):
        federation = Federation(FedASK(), large())
        assert federation.round().state.rule_state == RuleState({"turn": 1})

    def test_dense_tensors_are_averaged_with_the_first_message(self):
        case = large()
        made = Federation(FedASK(), case).round().state.adapter.tensors["head.weight"]
        mean = sum(case.weights[c] / 10 * moves["head.weight"].double() for c, moves in case.trained.items())
        torch.testing.assert_close(made.double(), case.adapter.tensors["head.weight"].double() + mean)

    def test_an_adapter_without_dense_tensors(self):
        case = large()
        strip = lambda tensors: {n: t for n, t in tensors.items() if group_of(n) != "dense"}  # noqa: E731
        adapter = replace(case.adapter, tensors=strip(case.adapter.tensors))
        case = replace(case, adapter=adapter, trained={c: strip(moves) for c, moves in case.trained.items()})
        federation = Federation(FedASK(oversample=9), case)
        made = federation.round(["client-001"]).state.adapter
        assert made.tensors.keys() == adapter.tensors.keys()
        stay = [name for name in case.trained if name != "client-001"]
        found, best = error(made, federation.truth(stay), rank=3)
        assert found == pytest.approx(best, abs=1e-6)

    def test_a_message_of_the_other_phase_is_refused(self):
        federation = Federation(FedASK(), large())
        first = federation.phase(federation.state, 1, federation.case.trained)
        sketches = federation.messages(federation.state, 1, ["client-000"])
        accumulator = federation.rule.start(first.state, 2)
        with pytest.raises(AggregationError, match="update of client-000 does not fit phase 2"):
            accumulator.add(sketches[0], 1.0)

    def test_another_weight_in_the_second_phase_is_refused_and_so_is_a_stranger(self):
        federation = Federation(FedASK(), large())
        first = federation.phase(federation.state, 1, ["client-000", "client-001"])
        accumulator = federation.rule.start(first.state, 2)
        (update,) = federation.messages(first.state, 2, ["client-001"])
        with pytest.raises(AggregationError, match=r"weight 200\.0 of client-001, expected 2\.0 as in phase 1"):
            accumulator.add(update, 200.0)
        with pytest.raises(AggregationError, match=r"weight 2\.0 of mallory, expected None"):
            accumulator.add(replace(update, client_id="mallory"), 2.0)
        accumulator.add(update, 2.0)
        with pytest.raises(AggregationError, match="two updates of client-001 in one phase"):
            accumulator.add(update, 2.0)

    def test_what_is_refused_is_not_mixed_in(self):
        federation = Federation(FedASK(), large())
        expected = federation.round().state.adapter.tensors
        accumulator = federation.rule.start(federation.state, 1)
        good = federation.messages(federation.state, 1, sorted(federation.case.trained))
        bad = {**good[0].delta, "head.weight": torch.full((2, 60), torch.inf)}
        for update, weight in [(replace(good[0], delta=bad), 1.0), (good[0], 0.0), (replace(good[0], delta={}), 1.0)]:
            with pytest.raises(AggregationError):
                accumulator.add(update, weight)
        for update in good:
            accumulator.add(update, federation.case.weights[update.client_id])
        found = federation.phase(accumulator.finish().state, 2, sorted(federation.case.trained)).state.adapter.tensors
        assert all(torch.equal(found[n], t) for n, t in expected.items())

    @pytest.mark.parametrize("phase", [1, 2])
    def test_nothing_at_all(self, phase: int):
        federation = Federation(FedASK(), large())
        state = federation.state if phase == 1 else federation.phase(federation.state, 1, ["client-000"]).state
        with pytest.raises(NotEnoughUpdates):
            federation.rule.start(state, phase).finish()

    def test_a_second_phase_without_a_first(self):
        with pytest.raises(AggregationError, match="phase 2 of FedASK needs the basis that phase 1 makes, found none"):
            FedASK().start(GlobalState(large().adapter, rule_state=RuleState({"turn": 0})), 2)

    def test_a_state_that_it_did_not_make(self):
        with pytest.raises(AggregationError, match="was not made by FedASK"):
            FedASK().plan(GlobalState(large().adapter), ClientView("one"), 1)


class TestLosses:
    @pytest.mark.parametrize("lost", [["client-000"], ["client-002", "client-003"]])
    def test_those_who_are_left_start_over_and_the_lost_have_no_say(self, lost: list[str]):
        case = large()
        federation = Federation(FedASK(oversample=9), case)
        result = federation.round(lost)
        stay = [name for name in case.trained if name not in lost]
        found, best = error(result.state.adapter, federation.truth(stay), rank=3)
        assert found == pytest.approx(best, abs=1e-6)
        assert (federation.phases, result.participants, result.metrics["sketches"]) == (4, len(stay), 2.0)
        weight = sum(case.weights[name] for name in stay)
        mean = sum(case.weights[c] / weight * case.trained[c]["head.weight"].double() for c in stay)
        expected = case.adapter.tensors["head.weight"].double() + mean
        torch.testing.assert_close(result.state.adapter.tensors["head.weight"].double(), expected)

    def test_it_is_bit_for_bit_the_round_that_they_had_alone(self):
        case = large()
        lossy = Federation(FedASK(), case).round(["client-001"]).state.adapter.tensors
        alone = {name: moves for name, moves in case.trained.items() if name != "client-001"}
        expected = Federation(FedASK(), replace(case, trained=alone)).round().state.adapter.tensors
        assert all(torch.equal(lossy[n], t) for n, t in expected.items())

    def test_who_is_lost_before_a_new_sketch_is_only_left_out(self):
        federation = Federation(FedASK(), large())
        result = federation.round(["client-000"], ["client-001"])
        assert (federation.phases, result.participants) == (4, 2)

    def test_losses_in_every_projection(self):
        federation = Federation(FedASK(), large())
        result = federation.round(["client-000"], [], ["client-001"], [], ["client-002"])
        assert (federation.phases, result.participants) == (8, 1)
        assert error(result.state.adapter, federation.truth(["client-003"]), rank=3)[0] < 1e-6

    def test_a_new_start_sends_no_factors_down(self):
        federation = Federation(FedASK(), large())
        first = federation.phase(federation.state, 1, sorted(federation.case.trained))
        again = federation.phase(first.state, 2, ["client-001", "client-002"])
        plan, payload = federation.rule.plan(again.state, ClientView("client-001"), 3)
        assert (plan.upload, plan.cached, plan.phase) == ("sketch", True, 3)
        assert set(payload.tensors) == {"head.weight"}
        assert not payload.extra


def test_two_rounds_go_on_from_each_other() -> None:
    case = large()
    first = Federation(FedASK(oversample=9), case)
    state = first.round().state
    second = Federation(FedASK(oversample=9), replace(case, adapter=state.adapter), state)
    found, best = error(second.round().state.adapter, second.truth(), rank=3)
    assert found == pytest.approx(best, abs=1e-6)


def test_options_out_of_range_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.options\.oversample = -1: .*greater than or equal to 0"):
        make_rule("fedask", {"oversample": -1})
    with pytest.raises(ConfigError, match=r"strategy\.options\.columns = 3: no option of fedask"):
        make_rule("fedask", {"columns": 3})
