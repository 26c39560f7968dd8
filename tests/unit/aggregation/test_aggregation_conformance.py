"""Every rule against dense float64 truth, and the suite itself against rules that are wrong."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from federated.aggregation import RULES, Accumulator, FedIT, FlexLoRA, Result, make_rule
from federated.aggregation.factor_mean import FactorMean
from federated.global_state import GlobalState
from federated.testing import Case, Finding, cases, dense_mean, effective_of, examine, mixed_cases

CASES = {case.name: case for case in cases()}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_case
@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_keeps_its_claim(name: str, case: Case) -> None:
    finding = examine(make_rule(name), case)
    assert finding.passed, finding
    assert torch.isfinite(torch.tensor([finding.error, finding.optimum, finding.dense_error])).all()


@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("name", sorted(RULES))
def test_on_other_numbers_too(name: str, seed: int) -> None:
    findings = [examine(make_rule(name), case) for case in cases(seed)]
    assert [finding for finding in findings if not finding.passed] == []


@pytest.mark.parametrize("case", list(mixed_cases()), ids=lambda case: case.name)
@pytest.mark.parametrize("name", [name for name in sorted(RULES) if make_rule(name).properties.mixed_ranks])
def test_rules_that_mix_ranks_keep_their_claim_then_too(name: str, case: Case) -> None:
    finding = examine(make_rule(name), case)
    assert finding.passed, finding


def test_factor_averaging_is_far_from_the_truth_and_says_so() -> None:
    finding = examine(FedIT(), CASES["alpha is not r"])
    assert finding.exactness == "approximate"
    assert finding.error > 0.1


@every_case
def test_the_truncation_is_no_worse_than_factor_averaging(case: Case) -> None:
    assert examine(FlexLoRA(), case).error <= examine(FedIT(), case).error + 1e-6


def test_one_client_s_own_result_is_kept_by_all() -> None:
    case = CASES["one client"]
    assert all(examine(make_rule(name), case).error < 1e-6 for name in RULES)


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


def test_a_finding_of_a_wrong_dense_mean_fails_whatever_the_rule_claims() -> None:
    assert not Finding("x", "y", "approximate", error=0.0, optimum=0.0, dense_error=0.1, bound=1e-6).passed
