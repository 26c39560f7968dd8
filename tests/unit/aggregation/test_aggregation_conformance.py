"""Every rule against dense float64 truth, and the suite itself against rules that are wrong."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from federated.aggregation import RULES, Accumulator, FedIT, FlexLoRA, FLoRA, Result, make_rule
from federated.aggregation.factor_mean import FactorMean
from federated.errors import AggregationError, NotEnoughUpdates
from federated.global_state import GlobalState
from federated.testing import Case, Finding, cases, crowded, dense_mean, effective_of, examine, fits

EVERY = {case.name: case for case in cases(rule=FLoRA())}
CASES = {case.name: case for case in cases()}
WHOLE = {"flasc": {"density_down": 1, "density_up": 1}, "florist": {"threshold": 1.0}, "lora_a2": {"rank": 3}}
"""Options with which a rule leaves nothing out."""
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def of_kind(name: str) -> dict[str, Case]:
    """The cases that a rule takes, with adapters of its kind."""
    return {case.name: case for case in cases(rule=make_rule(name))}


def enough(name: str, case: Case) -> Case:
    """The case, with as many clients as the rule needs."""
    return crowded(case, make_rule(name).properties.min_updates)


@pytest.mark.parametrize("case", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_keeps_its_claim_or_says_what_it_lacks(name: str, case: Case) -> None:
    rule = make_rule(name)
    if not fits(rule, case):
        with pytest.raises(AggregationError, match=f"case '{case.name}' needs .*, which {name} has not"):
            examine(rule, case)
        return
    finding = examine(rule, enough(name, of_kind(name)[case.name]))
    assert finding.passed, finding
    assert torch.isfinite(torch.tensor([finding.error, finding.optimum, finding.dense_error])).all()


@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("name", sorted(RULES))
def test_on_other_numbers_too(name: str, seed: int) -> None:
    findings = [examine(make_rule(name), enough(name, case)) for case in cases(seed, rule=make_rule(name))]
    assert [finding for finding in findings if not finding.passed] == []


def test_factor_averaging_is_far_from_the_truth_and_says_so() -> None:
    finding = examine(FedIT(), CASES["alpha is not r"])
    assert finding.exactness == "approximate"
    assert finding.error > 0.1


@every_case
def test_the_truncation_is_no_worse_than_factor_averaging(case: Case) -> None:
    assert examine(FlexLoRA(), case).error <= examine(FedIT(), case).error + 1e-6


def test_one_client_s_own_result_is_kept_by_all() -> None:
    """But for a threshold, which cuts even that, sparse messages, and steps beyond the mean."""
    rules = [make_rule(name, WHOLE.get(name)) for name in RULES]
    able = [rule for rule in rules if rule.properties.min_updates == 1]
    for rule in able:
        if rule.properties.averages:
            assert examine(rule, of_kind(rule.name)["one client"]).error < 1e-6
    for rule in rules:
        if rule not in able:
            with pytest.raises(NotEnoughUpdates, match=rf"1 good updates: {rule.name} needs at least"):
                examine(rule, of_kind(rule.name)["one client"])


class TestCases:
    def test_without_a_rule_there_are_those_that_every_rule_takes(self):
        assert len(CASES) == 15
        assert all(not case.needs for case in CASES.values())

    def test_a_rule_adds_those_that_need_what_it_has(self):
        needs = {name: {case.needs for case in cases(rule=make_rule(name))} for name in RULES}
        assert needs["fedit"] == {()}
        assert needs["flexlora"] == {(), ("mixed_ranks",)}
        assert needs["fedex"] == {(), ("residual",)}
        assert needs["flora"] == needs["florist"] == {(), ("mixed_ranks",), ("residual",), ("mixed_ranks", "residual")}

    def test_the_same_seed_gives_the_same_case(self):
        for one, other in zip(cases(3, rule=FLoRA()), cases(3, rule=FLoRA()), strict=True):
            assert one.name == other.name
            for mine, its in ((one.adapter, other.adapter), (one.residual, other.residual)):
                assert (mine is None) == (its is None)
                assert mine is None or all(
                    torch.equal(its.tensors[name], value) for name, value in mine.tensors.items()
                )


class _Wrapped:
    """An accumulator whose result is changed."""

    def __init__(self, inner: Accumulator, change: Callable[[Result], Result]) -> None:
        self.add = inner.add
        self._finish = inner.finish
        self._change = change

    def finish(self) -> Result:
        return self._change(self._finish())


class _FoldsScaling(FlexLoRA):
    """The peers' mistake: alpha / r once too often."""

    def start(self, state: GlobalState, phase: int) -> _Wrapped:
        def fold(result: Result) -> Result:
            made = result.state.adapter
            folded = {f"{pair.module.name}.factor_b": pair.factor_b * pair.scaling for pair in made.pairs()}
            return replace(result, state=GlobalState(replace(made, tensors={**made.tensors, **folded})))

        return _Wrapped(super().start(state, phase), fold)


class _Sum(FedIT):
    """Forgets to divide by the weights."""

    def start(self, state: GlobalState, phase: int) -> _Wrapped:
        def undivided(result: Result) -> Result:
            return replace(result, mean_delta={name: 3 * tensor for name, tensor in result.mean_delta.items()})

        return _Wrapped(super().start(state, phase), undivided)


class TestTheSuiteFinds:
    def test_a_forgotten_scaling(self):
        findings = {name: examine(_FoldsScaling(), case) for name, case in CASES.items()}
        assert findings["alpha is r"].passed
        assert not findings["alpha is not r"].passed
        assert not findings["rsLoRA"].passed

    def test_a_residual_that_is_lost(self):
        class Forgets(FLoRA):
            def start(self, state: GlobalState, phase: int) -> _Wrapped:
                def forget(result: Result) -> Result:
                    return replace(result, state=replace(result.state, residual=None))

                return _Wrapped(super().start(state, phase), forget)

        assert not examine(Forgets(), EVERY["a residual"]).passed

    def test_a_residual_that_is_added_once_too_often(self):
        class Doubles(FLoRA):
            def start(self, state: GlobalState, phase: int) -> _Wrapped:
                inner = super().start(state, phase)
                inner.mean = lambda layer: type(inner).mean(inner, layer).scaled(2.0)
                return inner

        assert not examine(Doubles(), EVERY["mixed ranks"]).passed

    def test_a_client_s_own_scaling_that_is_not_heeded(self):
        """At rank 1 and 2 of 3, alpha / r is not the adapter's."""

        class OneScaling(FlexLoRA):
            def start(self, state: GlobalState, phase: int):
                return _OneScaling(super().start(state, phase), state)

        assert examine(OneScaling(), EVERY["alpha is not r"]).passed
        assert not examine(OneScaling(), EVERY["mixed ranks"]).passed

    def test_a_claim_of_exactness_that_is_none(self):
        class Exact(FedIT):
            properties = replace(FedIT.properties, exactness="exact")

        assert not examine(Exact(), CASES["alpha is not r"]).passed

    def test_a_wrong_mean_of_the_head(self):
        assert not examine(_Sum(), CASES["wide"]).passed

    def test_a_frozen_factor_that_is_not_shared(self):
        """FFA-LoRA's exactness rests on one A: averaging B under different ones is no mean of products."""

        class OwnA(FedIT):
            name = "own-a"
            properties = replace(FedIT.properties, exactness="exact")

            def start(self, state: GlobalState, phase: int):
                return _IgnoreA(state)

        assert not examine(OwnA(), CASES["alpha is not r"]).passed


class _OneScaling:
    """Takes every client's factors as if they had the adapter's scaling."""

    def __init__(self, inner: Accumulator, state: GlobalState) -> None:
        self._inner, self._spec = inner, state.adapter.spec
        self.finish = inner.finish

    def add(self, update, weight: float) -> None:
        spec = update.received.spec
        modules = tuple(
            replace(mine, alpha=its.alpha * mine.rank / its.rank)
            for mine, its in zip(spec.modules, self._spec.modules, strict=True)
        )
        received = replace(update.received, spec=replace(spec, modules=modules))
        self._inner.add(replace(update, received=received), weight)


class _IgnoreA:
    def __init__(self, state: GlobalState) -> None:
        self._mean = FactorMean(state.adapter, ("factor_b", "dense"))

    def add(self, update, weight: float) -> None:
        kept = {name: tensor for name, tensor in update.delta.items() if not name.endswith("factor_a")}
        self._mean.add(replace(update, delta=kept), weight)

    def finish(self) -> Result:
        return self._mean.finish()


def test_the_truth_is_the_weighted_mean_of_effective_updates() -> None:
    adapter = CASES["rsLoRA"].adapter
    doubled = replace(
        adapter, tensors={n: t * (2 if n.endswith("factor_b") else 1) for n, t in adapter.tensors.items()}
    )
    truth = dense_mean({"a": adapter, "b": doubled}, {"a": 3.0, "b": 1.0})
    for name, matrix in effective_of(adapter).items():
        torch.testing.assert_close(truth[name], matrix * 1.25)
    expected = 8 / 3**0.5 * adapter.tensors["layer.q.factor_b"].double() @ adapter.tensors["layer.q.factor_a"].double()
    torch.testing.assert_close(effective_of(adapter)["layer.q"], expected)


@every_case
@pytest.mark.parametrize("options", [{"rank": 1}, {"rank": 2}], ids=str)
def test_ranks_that_are_left_out_cost_no_dense_tensor(options: dict[str, int], case: Case) -> None:
    assert examine(make_rule("lora_a2", options), case).passed


def test_what_a_rule_leaves_out_is_part_of_its_gap() -> None:
    case = CASES["alpha is not r"]
    gaps = [examine(make_rule("flasc", {"density_down": 1, "density_up": up}), case).error for up in (0.1, 0.5, 1)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 2 * gaps[2]


def test_a_finding_of_a_wrong_dense_mean_fails_whatever_the_rule_claims() -> None:
    assert not Finding("x", "y", "approximate", error=0.0, optimum=0.0, dense_error=0.1, bound=1e-6).passed


def test_more_clients_leave_those_that_are_there() -> None:
    case = CASES["unequal weights"]
    more = crowded(case, 5)
    assert list(more.trained) == [f"client-{number:03d}" for number in range(5)]
    assert all(more.trained[client_id] is moves for client_id, moves in case.trained.items())
    assert (more.weights["client-001"], more.weights["client-004"]) == (10.0, 1.0)
    sizes = [float(moves["layer.q.factor_a"].square().mean().sqrt()) for moves in more.trained.values()]
    assert max(sizes) < 3 * min(sizes)
    still = crowded(CASES["nobody learns anything"], 4).trained["client-003"]
    assert not any(tensor.any() for tensor in still.values())
    assert crowded(case, 2).trained.keys() == case.trained.keys()
