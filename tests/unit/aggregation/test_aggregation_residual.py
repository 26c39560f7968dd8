"""FLoRA, FedEx-LoRA and FLoRIST: their own equations in float64, what the residual holds, and what its bound costs."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from federated.aggregation import ClientView, FedEx, FedIT, FLoRA, FLoRIST, Result, Rule, make_rule
from federated.delta import Update
from federated.errors import AggregationError, ConfigError, NotEnoughUpdates
from federated.global_state import GlobalState
from federated.residual import at_rank, product_of
from federated.state import AdapterState, RuleState
from federated.testing import Case, cases, dense_mean, effective_of, examine, fits

torch.set_num_threads(1)
CASES = {case.name: case for case in cases(rule=FLoRA())}
CASE = CASES["a residual and mixed ranks"]
ONE_RANK = CASES["a residual"]
EXACT: dict[str, Rule] = {
    "flora": FLoRA(),
    "flora, warm": FLoRA(start="warm"),
    "fedex": FedEx(),
    "florist, all": FLoRIST(threshold=1.0),
}
exact_rule = pytest.mark.parametrize("rule", EXACT.values(), ids=EXACT)
all_rules = pytest.mark.parametrize("rule", [*EXACT.values(), FLoRIST(), FedEx(residual="truncated", residual_rank=1)])


def begun(rule: Rule, case: Case) -> GlobalState:
    return GlobalState(case.adapter, case.residual, rule_state=rule.init(case.adapter.spec))


def updates(rule: Rule, state: GlobalState, case: Case) -> list[Update]:
    made = []
    for client, moves in case.trained.items():
        _, payload = rule.plan(state, ClientView(client, case.ranks.get(client)), 1)
        cut = {name: move[tuple(map(slice, payload.tensors[name].shape))] for name, move in moves.items()}
        made.append(Update(client, cut, 1, received=payload))
    return made


def combined(rule: Rule, state: GlobalState, given: list[Update], weights: Any) -> Result:
    accumulator = rule.start(state, 1)
    for update in given:
        accumulator.add(update, weights[update.client_id])
    result = accumulator.finish()
    assert isinstance(result, Result)
    return result


def once(rule: Rule, case: Case) -> Result:
    state = begun(rule, case)
    return combined(rule, state, updates(rule, state, case), case.weights)


def truth(rule: Rule, case: Case) -> dict[str, Tensor]:
    """What the clients hold after training, residual included, dense and in float64."""
    after = {}
    for update in updates(rule, begun(rule, case), case):
        tensors = {name: tensor.float() + update.delta[name] for name, tensor in update.received.tensors.items()}
        after[update.client_id] = replace(update.received, tensors=tensors)
    return dense_mean(after, case.weights)


def error(found: GlobalState, expected: dict[str, Tensor]) -> float:
    """Of what a client is given next, relative to the whole."""
    made = effective_of(found.materialise())
    missed = sum(float((made[name] - matrix).square().sum()) for name, matrix in expected.items())
    return (missed / (sum(float(matrix.square().sum()) for matrix in expected.values()) or 1.0)) ** 0.5


def equal(one: AdapterState | None, other: AdapterState | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.spec == other.spec and all(
        torch.equal(other.tensors[name], value) for name, value in one.tensors.items()
    )


@pytest.mark.parametrize(
    ("rule", "name"),
    [(label, name) for label, rule in EXACT.items() for name, case in CASES.items() if fits(rule, case)],
)
def test_what_clients_are_given_next_is_the_dense_sum_also_in_bfloat16(rule: str, name: str) -> None:
    """The bounds of the suite allow for the rounding of bfloat16; here it is in the residual."""
    assert error(once(EXACT[rule], CASES[name]).state, truth(EXACT[rule], CASES[name])) < 3e-7


@exact_rule
def test_it_stays_exact_over_many_rounds(rule: Rule) -> None:
    """Each round starts from what the last one made, with new numbers and other clients."""
    state, drawn = begun(rule, ONE_RANK), torch.Generator().manual_seed(5)
    for number in range(12):
        names = [f"client-{one:03d}" for one in range(number % 3, number % 3 + 2)]
        given, after = [], {}
        for client in names:
            _, payload = rule.plan(state, ClientView(client), 1)
            delta = {n: 0.3 * torch.randn(t.shape, generator=drawn) for n, t in payload.tensors.items()}
            after[client] = replace(payload, tensors={n: t + delta[n] for n, t in payload.tensors.items()})
            given.append(Update(client, delta, 1, received=payload))
        weights = dict(zip(names, (3.0, 1.0), strict=True))
        result = combined(rule, state, given, weights)
        state = replace(result.state, rule_state=result.rule_state or state.rule_state)
        assert error(state, dense_mean(after, weights)) < 1e-6
    assert max(module.rank for module in state.residual.spec.modules) <= 6


@all_rules
def test_the_order_of_arrival_changes_no_bit(rule: Rule) -> None:
    case = CASE if rule.properties.mixed_ranks else ONE_RANK
    state = begun(rule, case)
    results = [
        combined(rule, state, list(order), case.weights) for order in itertools.permutations(updates(rule, state, case))
    ]
    for result in results:
        assert equal(result.state.adapter, results[0].state.adapter)
        assert equal(result.state.residual, results[0].state.residual)
        assert result.metrics == results[0].metrics


@all_rules
def test_a_failed_add_leaves_no_trace(rule: Rule) -> None:
    case = CASE if rule.properties.mixed_ranks else ONE_RANK
    state = begun(rule, case)
    good = updates(rule, state, case)
    accumulator = rule.start(state, 1)
    odd = {**good[1].delta, "head.weight": torch.full((2, 6), torch.inf)}
    for bad, weight in ((replace(good[0], delta={}), 1.0), (good[0], 0.0), (good[0], torch.nan),
                        (replace(good[1], client_id="aaa", delta=odd), 1.0)):  # fmt: skip
        with pytest.raises(AggregationError):
            accumulator.add(bad, weight)
    with pytest.raises(NotEnoughUpdates):
        accumulator.finish()
    for update in good:
        accumulator.add(update, case.weights[update.client_id])
    with pytest.raises(AggregationError, match="two updates of client-000"):
        accumulator.add(good[0], 1.0)
    found, expected = accumulator.finish(), combined(rule, state, good, case.weights)
    assert equal(found.state.adapter, expected.state.adapter)
    assert equal(found.state.residual, expected.state.residual)


@all_rules
def test_one_phase(rule: Rule) -> None:
    with pytest.raises(AggregationError, match="has one phase, found phase 2"):
        rule.start(begun(rule, ONE_RANK), 2)


@all_rules
def test_the_residual_s_size_is_that_of_its_tensors(rule: Rule) -> None:
    result = once(rule, ONE_RANK)
    residual = result.state.residual
    assert result.metrics["residual_rank"] == max(module.rank for module in residual.spec.modules)
    assert result.metrics["residual_bytes"] == 4 * sum(tensor.numel() for tensor in residual.tensors.values())
    assert result.metrics["residual_kept"] == pytest.approx(1.0)
    assert (result.participants, result.total_weight) == (3, 6.0)


@all_rules
def test_an_update_without_what_was_sent_starts_from_the_global_adapter(rule: Rule) -> None:
    """As whoever calls a rule directly may give it."""
    state = begun(rule, ONE_RANK)
    given = updates(rule, state, ONE_RANK)
    bare = [replace(update, received=None) for update in given]
    found, expected = (combined(rule, state, one, ONE_RANK.weights).state for one in (bare, given))
    assert equal(found.adapter, expected.adapter)
    assert equal(found.residual, expected.residual)


class TestMixedRanks:
    RULES = pytest.mark.parametrize(
        "rule", [FLoRA(), FLoRA(start="warm"), FLoRIST()], ids=["reinit", "warm", "florist"]
    )

    @RULES
    def test_every_client_starts_from_the_same_weights(self, rule: Rule):
        for name in ("a residual and mixed ranks", "mixed ranks", "mixed ranks, rsLoRA, unequal weights"):
            state = begun(rule, CASES[name])
            whole = effective_of(state.materialise())
            for rank in (1, 2, 3, None):
                plan, payload = rule.plan(state, ClientView("anybody", rank), 1)
                assert (plan.rank, payload.spec.rank) == (rank or 3, rank or 3)
                for layer, matrix in effective_of(payload).items():
                    torch.testing.assert_close(matrix, whole[layer], rtol=1e-5, atol=1e-5)
                    alone = at_rank(state.adapter, rank or 3)
                    assert torch.equal(payload.tensors[f"{layer}.factor_a"], alone.tensors[f"{layer}.factor_a"])

    @RULES
    def test_in_bfloat16_too(self, rule: Rule):
        state = begun(rule, CASES["mixed ranks, bfloat16"])
        whole = effective_of(state.materialise())
        _, payload = rule.plan(state, ClientView("anybody", 1), 1)
        assert payload.tensors["layer.k.factor_a"].dtype == torch.bfloat16
        for layer, matrix in effective_of(payload).items():
            torch.testing.assert_close(matrix, whole[layer], rtol=1e-5, atol=1e-5)

    @RULES
    def test_a_fresh_adapter_lends_nothing(self, rule: Rule):
        state = begun(rule, CASES["mixed ranks, a fresh adapter"])
        assert rule.plan(state, ClientView("anybody", 1), 1)[1].residual is None

    def test_a_client_that_learns_nothing_takes_nothing_away(self):
        """A small client's truncated start is no vote against the directions that it cannot train."""
        rule = FLoRA(start="warm")
        state = begun(rule, CASE)
        still = {client: {name: torch.zeros_like(t) for name, t in moves.items()}
                 for client, moves in CASE.trained.items()}  # fmt: skip
        result = once(rule, replace(CASE, trained=still))
        assert error(result.state, effective_of(state.materialise())) < 3e-7

    def test_a_layer_that_is_smaller_than_the_client_s_rank_is_trained_whole(self):
        wide = CASES["rank is a dimension"]
        rule = FLoRA(start="warm")
        spec = replace(wide.adapter.spec, rank=3)
        case = replace(wide, adapter=replace(wide.adapter, spec=spec), ranks={"client-000": 2})
        assert examine(rule, case).passed

    def test_fedex_takes_none(self):
        with pytest.raises(AggregationError, match="trains at rank 1: this rule needs rank 3"):
            FedEx().plan(begun(FedEx(), CASE), ClientView("client-001", 1), 1)


class TestFLoRA:
    def test_the_whole_sum_is_frozen_and_the_adapter_starts_again(self):
        case = CASES["alpha is not r"]
        result = once(FLoRA(), case)
        residual, expected = effective_of(result.state.residual), truth(FLoRA(), case)
        for name, matrix in expected.items():
            torch.testing.assert_close(residual[name], matrix, rtol=1e-5, atol=1e-5)
        for pair in result.state.adapter.pairs():
            assert not pair.factor_b.any()
            assert pair.factor_a.any(dim=1).all()
            assert float(pair.factor_a.abs().max()) <= pair.module.d_in**-0.5

    def test_its_equation_by_stacking_in_float64(self):
        case = CASES["rsLoRA"]
        stacked = {}
        for update in updates(FLoRA(), begun(FLoRA(), case), case):
            share = case.weights[update.client_id] / sum(case.weights.values())
            after = replace(
                update.received, tensors={n: t + update.delta[n] for n, t in update.received.tensors.items()}
            )
            for pair in after.pairs():
                left, right = stacked.setdefault(pair.module.name, ([], []))
                left.append(share * pair.scaling * pair.factor_b.double())
                right.append(pair.factor_a.double())
        found = effective_of(once(FLoRA(), case).state.materialise())
        for name, (left, right) in stacked.items():
            torch.testing.assert_close(found[name], torch.cat(left, 1) @ torch.cat(right, 0), rtol=1e-5, atol=1e-5)

    def test_fresh_factors_come_from_the_state_alone(self):
        before = torch.random.get_rng_state()
        one, other = once(FLoRA(), CASES["wide"]), once(FLoRA(), CASES["wide"])
        assert equal(one.state.adapter, other.state.adapter)
        assert torch.equal(before, torch.random.get_rng_state())
        assert not torch.equal(*(one.state.adapter.tensors[f"layer.{key}.factor_a"] for key in "kq"))

    def test_and_differ_from_round_to_round_and_seed_to_seed(self):
        rule, case = FLoRA(), CASES["wide"]
        assert rule.init(case.adapter.spec) == RuleState({"seed": 0, "drawn": 0})
        first = once(rule, case)
        assert first.rule_state == RuleState({"seed": 0, "drawn": 1})
        state = replace(begun(rule, case), rule_state=first.rule_state)
        second = combined(rule, state, updates(rule, state, case), case.weights)
        other = once(FLoRA(seed=1), case)
        drawn = [one.state.adapter.tensors["layer.k.factor_a"] for one in (first, second, other)]
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))

    def test_a_state_of_another_rule_is_refused(self):
        for scalars in ({}, {"seed": 0}, {"seed": 0, "drawn": "one"}, {"seed": True, "drawn": 0}):
            with pytest.raises(AggregationError, match="was not made by FLoRA"):
                FLoRA().start(GlobalState(CASE.adapter, rule_state=RuleState(scalars)), 1)

    def test_warm_keeps_the_best_of_the_sum(self):
        case = CASES["alpha is not r"]
        result, expected = once(FLoRA(start="warm"), case), truth(FLoRA(start="warm"), case)
        assert result.rule_state is None
        for name, matrix in effective_of(result.state.adapter).items():
            missed = float(torch.linalg.svdvals(expected[name])[3:].norm())
            assert float((matrix - expected[name]).norm()) == pytest.approx(missed, rel=1e-5)

    def test_warm_leaves_no_residual_where_nothing_is_left(self):
        for name in ("one client", "nobody learns anything", "rank is a dimension"):
            result = once(FLoRA(start="warm"), CASES[name])
            assert result.state.residual is None
            assert result.metrics == {"residual_rank": 0.0, "residual_bytes": 0.0, "residual_kept": 1.0}

    def test_nobody_learnt_anything(self):
        result = once(FLoRA(), CASES["nobody learns anything"])
        assert result.state.residual is None


def fedit_and_difference(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """FedEx-LoRA's equation, dense and in float64: the averaged factors, and the difference of each layer."""
    state, total = begun(FedEx(), case), sum(case.weights.values())
    after = [
        (case.weights[one.client_id] / total, {n: (t + one.delta[n]).double() for n, t in one.received.tensors.items()})
        for one in updates(FedEx(), state, case)
    ]
    means = {name: sum(share * tensors[name] for share, tensors in after) for name in case.adapter.tensors}
    differences = {}
    for module in case.adapter.spec.modules:
        scaling, a, b = case.adapter.spec.scaling(module), f"{module.name}.factor_a", f"{module.name}.factor_b"
        products = sum(share * scaling * tensors[b] @ tensors[a] for share, tensors in after)
        differences[module.name] = products - scaling * means[b] @ means[a]
    return means, differences


class TestFedEx:
    @pytest.mark.parametrize("name", ["alpha is not r", "rsLoRA", "Conv1D", "wide", "unequal weights", "many clients"])
    def test_its_own_equation(self, name: str):
        means, differences = fedit_and_difference(CASES[name])
        state = once(FedEx(), CASES[name]).state
        for key, mean in means.items():
            torch.testing.assert_close(state.adapter.tensors[key].double(), mean, rtol=1e-6, atol=1e-6)
        for layer, matrix in effective_of(state.residual).items():
            torch.testing.assert_close(matrix, differences[layer], rtol=1e-5, atol=3e-6)

    def test_the_adapter_is_fedit_s(self):
        case = CASES["unequal weights"]
        mean = combined(FedIT(), GlobalState(case.adapter), updates(FedIT(), GlobalState(case.adapter), case),
                        case.weights).mean_delta  # fmt: skip
        made = once(FedEx(), case).state.adapter.tensors
        for name, tensor in case.adapter.tensors.items():
            torch.testing.assert_close(made[name], (tensor.double() + mean[name]).float(), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("weights", [(7.0,), (1.0, 10.0, 0.25)])
    def test_one_client_or_equal_updates_leave_no_residual(self, weights: tuple[float, ...]):
        """Rounding leaves a difference of nearly zero, of full rank: it must not travel."""
        alike = CASES["many clients"].trained["client-000"]
        names = [f"client-{number:03d}" for number in range(len(weights))]
        case = replace(CASES["alpha is not r"], trained=dict.fromkeys(names, alike),
                       weights=dict(zip(names, weights, strict=True)))  # fmt: skip
        result = once(FedEx(), case)
        assert result.state.residual is None
        assert result.metrics["residual_bytes"] == 0.0

    def test_its_rank_is_that_of_the_clients_disagreement(self):
        """(K - 1) r, and not (K + 1) r: what float32 rounds off in the means is left out."""
        case = wide_case()
        result = once(FedEx(), case)
        assert {module.rank for module in result.state.residual.spec.modules} == {2 * 3}
        assert error(result.state, truth(FedEx(), case)) < 3e-7

    @pytest.mark.parametrize("rank", [1, 2, 5])
    def test_truncated_it_misses_what_no_residual_of_that_rank_could_hold(self, rank: int):
        case = wide_case()
        rule = FedEx(residual="truncated", residual_rank=rank)
        result, (_, differences) = once(rule, case), fedit_and_difference(case)
        found, whole = effective_of(result.state.materialise()), truth(rule, case)
        squares = {layer: torch.linalg.svdvals(matrix).square() for layer, matrix in differences.items()}
        for layer, matrix in whole.items():
            missed = float((found[layer] - matrix).square().sum())
            assert missed == pytest.approx(float(squares[layer][rank:].sum()), rel=1e-4)
        kept = sum(float(one[:rank].sum()) for one in squares.values()) / sum(float(s.sum()) for s in squares.values())
        assert result.metrics["energy_kept"] == pytest.approx(kept, rel=1e-6)
        assert 0.0 < kept < 1.0
        assert result.metrics["residual_rank"] == rank

    def test_truncated_far_enough_it_is_full(self):
        case = wide_case()
        result = once(FedEx(residual="truncated", residual_rank=6), case)
        assert result.metrics["energy_kept"] == pytest.approx(1.0)
        assert error(result.state, truth(FedEx(), case)) < 3e-7
        alone = once(FedEx(residual="truncated", residual_rank=1), CASES["one client"])
        assert (alone.state.residual, alone.metrics["residual_rank"]) == (None, 0.0)


def wide_case() -> Case:
    """Layers of 20 x 30: the residual of three clients does not fill them."""
    case = CASES["alpha is not r"]
    spec = replace(case.adapter.spec, modules=tuple(replace(m, d_in=30, d_out=20) for m in case.adapter.spec.modules))
    generator = torch.Generator().manual_seed(9)

    def drawn(size: float) -> dict[str, Tensor]:
        shapes = {"factor_a": (3, 30), "factor_b": (20, 3), "weight": (2, 6)}
        return {name: size * torch.randn(shapes[name.rpartition(".")[2]], generator=generator)
                for name in case.adapter.tensors}  # fmt: skip

    return replace(
        case, adapter=AdapterState(spec, drawn(1.0)), trained={client: drawn(0.7) for client in case.trained}
    )


class TestFLoRIST:
    @pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 0.99, 0.9999])
    @pytest.mark.parametrize("name", ["alpha is not r", "many clients", "mixed ranks", "a residual and mixed ranks"])
    def test_it_keeps_the_fewest_directions_that_hold_the_threshold(self, name: str, threshold: float):
        rule, case = FLoRIST(threshold=threshold), CASES[name]
        result, whole = once(rule, case), truth(rule, case)
        found = effective_of(result.state.materialise())
        frozen = product_of(case.residual) if case.residual else {}
        ranks, kept, energy = [], 0.0, 0.0
        for layer, matrix in whole.items():
            squares = torch.linalg.svdvals(matrix - (frozen[layer].dense() if frozen else 0.0)).square()
            share = squares.cumsum(0) / squares.sum()
            ranks.append(int((share < threshold).sum()) + 1)
            kept, energy = kept + float(squares[: ranks[-1]].sum()), energy + float(squares.sum())
            missed = float((found[layer] - matrix).square().sum())
            assert missed == pytest.approx(float(squares[ranks[-1] :].sum()), rel=1e-4, abs=1e-9)
            assert missed <= (1 - threshold) * float(squares.sum()) * (1 + 1e-6)
        assert result.metrics["energy_kept"] == pytest.approx(kept / energy)
        assert result.metrics["rank_kept_most"] == max(ranks)
        assert result.metrics["rank_kept"] == pytest.approx(sum(ranks) / len(ranks))

    def test_what_is_beyond_the_adapter_s_rank_is_in_the_residual(self):
        result = once(FLoRIST(threshold=0.999), CASES["many clients"])
        assert result.metrics["residual_rank"] == result.metrics["rank_kept_most"] - 3 > 0

    def test_directions_that_are_cut_off_can_be_trained_again(self):
        case = CASES["alpha is not r"]
        result = once(FLoRIST(threshold=0.01), case)
        assert result.metrics["rank_kept_most"] == 1
        assert result.state.residual is None
        for pair in result.state.adapter.pairs():
            assert torch.equal(pair.factor_a[1:], case.adapter.tensors[f"{pair.module.name}.factor_a"][1:])
            assert not pair.factor_b[:, 1:].any()

    def test_nobody_learnt_anything(self):
        case = CASES["nobody learns anything"]
        result = once(FLoRIST(), case)
        assert result.metrics["energy_kept"] == 1.0
        assert equal(replace(result.state.adapter, spec=case.adapter.spec), case.adapter)


class TestBound:
    """A residual above `max_residual_rank`: the round is refused, or its smallest directions are lost."""

    RULES = pytest.mark.parametrize(
        ("name", "options"),
        [("flora", {}), ("flora", {"start": "warm"}), ("fedex", {}), ("florist", {"threshold": 1.0})],
        ids=["flora", "warm", "fedex", "florist"],
    )

    @RULES
    def test_the_round_is_refused(self, name: str, options: dict[str, Any]):
        rule = make_rule(name, {**options, "max_residual_rank": 2})
        assert rule.properties.exactness == "exact"
        with pytest.raises(AggregationError, match=r"at most 2 is allowed.*overflow=truncate"):
            once(rule, ONE_RANK)

    @RULES
    def test_or_the_residual_is_truncated_and_says_what_is_left(self, name: str, options: dict[str, Any]):
        rule = make_rule(name, {**options, "max_residual_rank": 2, "overflow": "truncate"})
        assert rule.properties.exactness == "approximate"
        result, whole = once(rule, ONE_RANK), once(make_rule(name, options), ONE_RANK)
        assert result.metrics["residual_rank"] == 2
        lost = kept = 0.0
        full = effective_of(whole.state.residual)
        for layer, matrix in effective_of(result.state.residual).items():
            squares = torch.linalg.svdvals(full[layer]).square()
            missed = float((matrix - full[layer]).square().sum())
            assert missed == pytest.approx(float(squares[2:].sum()), rel=1e-4)
            lost, kept = lost + float(squares[2:].sum()), kept + float(squares[:2].sum())
        assert result.metrics["residual_kept"] == pytest.approx(kept / (kept + lost))
        assert equal(result.state.adapter, whole.state.adapter)

    @RULES
    def test_within_it_nothing_changes(self, name: str, options: dict[str, Any]):
        rule = make_rule(name, {**options, "max_residual_rank": 6, "overflow": "truncate"})
        assert equal(once(rule, ONE_RANK).state.residual, once(make_rule(name, options), ONE_RANK).state.residual)

    def test_the_claim_follows_the_options(self):
        claims = {
            ("flora", ()): "exact",
            ("flora", (("overflow", "truncate"),)): "exact",
            ("fedex", (("residual", "truncated"), ("residual_rank", 4))): "approximate",
            ("florist", ()): "approximate",
            ("florist", (("threshold", 1.0), ("max_residual_rank", 4))): "exact",
            ("florist", (("threshold", 1),)): "exact",
        }
        for (name, options), claim in claims.items():
            assert make_rule(name, dict(options)).properties.exactness == claim


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flora", {"start": "cold"}, r"strategy\.options\.start = 'cold': Input should be 'reinit' or 'warm'"),
        ("flora", {"seed": -1}, r"strategy\.options\.seed = -1: Input should be greater than or equal to 0"),
        ("flora", {"max_residual_rank": -1}, r"max_residual_rank = -1"),
        ("flora", {"overflow": "drop"}, r"overflow = 'drop': Input should be 'refuse' or 'truncate'"),
        ("flora", {"threshold": 1.0}, r"threshold = 1\.0: no option of flora; expected some of start, seed, max"),
        ("fedex", {"residual": "half"}, r"residual = 'half': Input should be 'full' or 'truncated'"),
        ("fedex", {"residual": "truncated"}, r"residual_rank = 0: truncated needs one of at least 1"),
        ("fedex", {"residual_rank": 4}, r"residual_rank = 4: .* full takes none \(.*residual = 'full'"),
        ("florist", {"threshold": 0.0}, r"threshold = 0\.0: Input should be greater than 0"),
        ("florist", {"threshold": 1.5}, r"threshold = 1\.5: Input should be less than or equal to 1"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_refused_in_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_rule(name, options)
    assert "\n" not in str(caught.value)
