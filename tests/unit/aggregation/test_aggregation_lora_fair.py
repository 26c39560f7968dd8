"""LoRA-FAIR against the same objectives written densely, and where they have nothing to say."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from federated.aggregation import FedIT, LoRAFAIR, Result, Rule, make_rule
from federated.aggregation.product_fit import by_cosine, by_ridge
from federated.delta import Update
from federated.errors import AggregationError, ConfigError, NotEnoughUpdates
from federated.global_state import GlobalState
from federated.lowrank import LowRank
from federated.state import AdapterState, Tensors
from federated.testing import Case, cases, dense_mean, effective_of, examine

CASES = {case.name: case for case in cases()}
SHAPES = [(7, 5, 2), (5, 7, 2), (6, 6, 3), (9, 12, 4), (3, 8, 3), (8, 3, 3), (1, 6, 1)]
shapes = pytest.mark.parametrize(("d_out", "d_in", "rank"), SHAPES)
strengths = pytest.mark.parametrize("strength", [0.001, 0.01, 1.0])


def problem(d_out: int, d_in: int, rank: int, *, clients: int = 3, seed: int = 0) -> tuple[LowRank, Tensor, Tensor]:
    """T, A and B of clients that moved apart from a common start."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    common = drawn(rank, d_in), drawn(d_out, rank)
    pairs = [(common[0] + 0.7 * drawn(rank, d_in), common[1] + 0.7 * drawn(d_out, rank)) for _ in range(clients)]
    left = torch.cat([factor_b / clients for _, factor_b in pairs], dim=1)
    target = LowRank(left, torch.cat([factor_a for factor_a, _ in pairs]))
    means = [sum(pair[place] for pair in pairs) / clients for place in (0, 1)]
    return target, means[0], means[1]


def dense_cosine(target: LowRank, factor_a: Tensor, factor_b: Tensor, strength: float) -> Callable[[Tensor], Tensor]:
    """The paper's objective, with d x d products."""
    wanted = target.dense()

    def value(correction: Tensor) -> Tensor:
        made = (factor_b + correction) @ factor_a
        cosine = (wanted * made).sum() / (wanted.norm() * made.norm())
        return 1 - cosine + strength * correction.square().sum()

    return value


def descended(value: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The minimum that a long plain search over the whole of dB finds from zero."""
    found = torch.zeros_like(like, requires_grad=True)
    search = torch.optim.LBFGS(
        [found], max_iter=3000, history_size=60, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        search.zero_grad()
        loss = value(found)
        loss.backward()
        return loss

    search.step(closure)
    return found.detach()


class TestCosine:
    @shapes
    @strengths
    def test_it_is_the_minimum_of_the_dense_objective(self, d_out: int, d_in: int, rank: int, strength: float):
        target, factor_a, factor_b = problem(d_out, d_in, rank)
        value = dense_cosine(target, factor_a, factor_b, strength)
        found = by_cosine(target, factor_a, factor_b, strength=strength)
        expected = descended(value, factor_b)
        assert float(value(found)) == pytest.approx(float(value(expected)), abs=1e-10)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    @shapes
    def test_the_dense_objective_has_no_slope_there(self, d_out: int, d_in: int, rank: int):
        target, factor_a, factor_b = problem(d_out, d_in, rank, seed=1)
        found = by_cosine(target, factor_a, factor_b, strength=0.01).requires_grad_()
        dense_cosine(target, factor_a, factor_b, 0.01)(found).backward()
        assert float(found.grad.norm()) < 1e-6

    @pytest.mark.parametrize("size", [1e-6, 1e-3, 1e3])
    def test_small_and_large_factors_are_searched_alike(self, size: float):
        target, factor_a, factor_b = problem(9, 7, 2)
        whole = by_cosine(target, factor_a, factor_b, strength=0.0)
        found = by_cosine(target.scaled(size), factor_a, size * factor_b, strength=0.0)
        value = dense_cosine(target, factor_a, factor_b, 0.0)
        assert float(value(found / size)) == pytest.approx(float(value(whole)), abs=1e-9)

    def test_without_a_penalty_only_the_direction_counts(self):
        target, factor_a, factor_b = problem(9, 7, 2)
        made = (factor_b + by_cosine(target, factor_a, factor_b, strength=0.0)) @ factor_a
        best = (factor_b + by_ridge(target, factor_a, factor_b, strength=0.0)) @ factor_a
        torch.testing.assert_close(made / made.norm(), best / best.norm(), rtol=0, atol=1e-6)

    def test_a_target_of_nothing_asks_for_nothing(self):
        _, factor_a, factor_b = problem(5, 4, 2)
        nothing = LowRank(torch.zeros_like(factor_b), factor_a)
        assert not by_cosine(nothing, factor_a, factor_b, strength=0.01).any()

    def test_a_target_out_of_a_s_rows_asks_for_nothing(self):
        factor_a = torch.eye(4, dtype=torch.float64)[:1]
        target = LowRank(torch.ones(3, 1, dtype=torch.float64), torch.eye(4, dtype=torch.float64)[1:2])
        assert not by_cosine(target, factor_a, torch.ones(3, 1, dtype=torch.float64), strength=0.01).any()

    @pytest.mark.parametrize("strength", [0.0001, 0.01, 1.0])
    def test_a_target_that_points_away_does_not_make_the_product_vanish(self, strength: float):
        """The objective falls towards B + dB = 0 and has no minimum there."""
        _, factor_a, factor_b = problem(8, 3, 3)
        away = LowRank(-factor_b, factor_a)
        found = by_cosine(away, factor_a, factor_b, strength=strength)
        assert float((factor_b + found).norm()) > 1e-2 * float(factor_b.norm())
        value = dense_cosine(away, factor_a, factor_b, strength)
        assert float(value(found)) <= float(value(torch.zeros_like(found))) + 1e-12

    def test_a_product_of_zero_is_led_out_of_zero(self):
        """Two clients whose B are opposite, and whose A are not: the mean of B is zero, that of the products is not."""
        target, factor_a, factor_b = problem(6, 5, 2)
        zero = torch.zeros_like(factor_b)
        found = by_cosine(target, factor_a, zero, strength=0.001)
        wanted, made = target.dense(), found @ factor_a
        assert torch.isfinite(found).all()
        assert float((wanted * made).sum() / wanted.norm() / made.norm()) > 0.5

    def test_the_same_input_gives_the_same_bits(self):
        given = problem(30, 20, 4)
        assert torch.equal(by_cosine(*given, strength=0.01), by_cosine(*given, strength=0.01))


class TestRidge:
    @shapes
    @pytest.mark.parametrize("strength", [0.0, 0.01, 3.0])
    def test_it_is_the_closed_form(self, d_out: int, d_in: int, rank: int, strength: float):
        target, factor_a, factor_b = problem(d_out, d_in, rank)
        missing = target.dense() - factor_b @ factor_a
        gram = factor_a @ factor_a.T + strength * torch.eye(rank, dtype=torch.float64)
        expected = torch.linalg.solve(gram, (missing @ factor_a.T).T).T
        torch.testing.assert_close(by_ridge(target, factor_a, factor_b, strength=strength), expected)

    def test_idle_rows_of_a_ask_for_nothing(self):
        target, factor_a, factor_b = problem(6, 5, 3)
        idle = torch.cat([factor_a[:2], torch.zeros(1, 5, dtype=torch.float64)])
        found = by_ridge(target, idle, factor_b, strength=0.0)
        assert float(found[:, 2].abs().max()) < 1e-12
        part = by_ridge(target, idle[:2], factor_b[:, :2], strength=0.0)
        torch.testing.assert_close(found[:, :2], part)

    @shapes
    def test_it_is_never_farther_than_the_means(self, d_out: int, d_in: int, rank: int):
        target, factor_a, factor_b = problem(d_out, d_in, rank, seed=4)
        moved = factor_b + by_ridge(target, factor_a, factor_b, strength=0.5)
        wanted = target.dense()
        assert (wanted - moved @ factor_a).norm() <= (wanted - factor_b @ factor_a).norm() + 1e-12


def held_by(case: Case) -> dict[str, AdapterState]:
    return {
        client: replace(case.adapter, tensors={n: case.adapter.tensors[n] + move for n, move in moves.items()})
        for client, moves in case.trained.items()
    }


def made_by(rule: Rule, case: Case) -> tuple[Result, Tensors]:
    accumulator = rule.start(GlobalState(case.adapter, rule_state=rule.init(case.adapter.spec)), 1)
    for client, moves in case.trained.items():
        accumulator.add(Update(client, moves, 1, received=case.adapter), case.weights[client])
    result = accumulator.finish()
    return result, {n: case.adapter.tensors[n].double() + move for n, move in result.mean_delta.items()}


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("bfloat16", "nobody learns anything")])
@pytest.mark.parametrize("objective", ["cosine", "ridge"])
def test_a_round_is_its_own_equation(name: str, objective: str) -> None:
    case = CASES[name]
    rule = LoRAFAIR(objective=objective, strength=0.05)
    result, made = made_by(rule, case)
    after, total = held_by(case), sum(case.weights.values())
    shares = {client: weight / total for client, weight in case.weights.items()}

    def mean(tensor: str) -> Tensor:
        return sum(share * after[client].tensors[tensor].double() for client, share in shares.items())

    for pair in case.adapter.pairs():
        layer = pair.module.name
        factor_a, factor_b = mean(f"{layer}.factor_a"), mean(f"{layer}.factor_b")
        wanted = dense_mean(after, case.weights)[layer] / pair.scaling
        target = LowRank(wanted, torch.eye(wanted.shape[1], dtype=torch.float64))
        if objective == "ridge":
            gram = factor_a @ factor_a.T + 0.05 * torch.eye(len(factor_a), dtype=torch.float64)
            correction = torch.linalg.solve(gram, ((wanted - factor_b @ factor_a) @ factor_a.T).T).T
        else:
            correction = descended(dense_cosine(target, factor_a, factor_b, 0.05), factor_b)
        torch.testing.assert_close(made[f"{layer}.factor_a"], factor_a, rtol=0, atol=1e-6)
        torch.testing.assert_close(made[f"{layer}.factor_b"], factor_b + correction, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made["head.weight"], mean("head.weight"), rtol=0, atol=1e-6)
    assert (result.participants, result.total_weight) == (len(case.weights), total)


@pytest.mark.parametrize("objective", ["cosine", "ridge"])
def test_the_gaps_are_those_of_the_dense_products(objective: str) -> None:
    case = CASES["unequal weights"]
    truth = dense_mean(held_by(case), case.weights)
    size = float(torch.stack([one.square().sum() for one in truth.values()]).sum().sqrt())

    def gap(made: Tensors) -> float:
        found = effective_of(replace(case.adapter, tensors=made))
        return float(torch.stack([(found[n] - truth[n]).square().sum() for n in truth]).sum().sqrt()) / size

    result, made = made_by(LoRAFAIR(objective=objective), case)
    _, means = made_by(FedIT(), case)
    assert result.metrics == pytest.approx({"gap": gap(made), "gap_mean": gap(means)}, rel=1e-5)
    assert result.metrics["gap"] < result.metrics["gap_mean"]


@pytest.mark.parametrize("objective", ["cosine", "ridge"])
def test_a_great_strength_is_fedit(objective: str) -> None:
    case = CASES["rsLoRA"]
    _, made = made_by(LoRAFAIR(objective=objective, strength=1e12), case)
    _, means = made_by(FedIT(), case)
    for name, tensor in means.items():
        torch.testing.assert_close(made[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("objective", ["cosine", "ridge"])
@pytest.mark.parametrize("name", ["one client", "equal updates"])
def test_where_the_mean_of_factors_is_right_nothing_is_corrected(name: str, objective: str) -> None:
    case = CASES["unequal weights"] if name == "equal updates" else CASES[name]
    if name == "equal updates":
        case = replace(case, trained=dict.fromkeys(case.trained, case.trained["client-000"]))
    result, made = made_by(LoRAFAIR(objective=objective), case)
    expected = held_by(case)["client-000"].tensors
    for tensor, value in made.items():
        torch.testing.assert_close(value, expected[tensor].double(), rtol=0, atol=1e-5)
    assert result.metrics["gap"] < 1e-6


@pytest.mark.parametrize("objective", ["cosine", "ridge"])
def test_nothing_learnt_is_nothing_moved(objective: str) -> None:
    result, _ = made_by(LoRAFAIR(objective=objective), CASES["nobody learns anything"])
    assert max(float(tensor.abs().max()) for tensor in result.mean_delta.values()) < 1e-6
    assert result.metrics == {"gap_mean": 0.0, "gap": 0.0}


@pytest.mark.parametrize("objective", ["cosine", "ridge"])
def test_it_keeps_a_bfloat16_master_whole(objective: str) -> None:
    """What a client learnt is added to the float32 master, not to the rounded copy that it was sent."""
    case = CASES["bfloat16"]
    state = GlobalState(case.adapter)
    payload = state.materialise()
    accumulator = LoRAFAIR(objective=objective).start(state, 1)
    accumulator.add(Update("one", {n: torch.full_like(t, 1e-4) for n, t in payload.tensors.items()}, 1), 1.0)
    for tensor in accumulator.finish().mean_delta.values():
        torch.testing.assert_close(tensor, torch.full_like(tensor, 1e-4), rtol=2e-2, atol=0)


@pytest.mark.parametrize("objective", ["cosine", "ridge"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_suite_passes_under_either_objective(objective: str, case: Case) -> None:
    finding = examine(LoRAFAIR(objective=objective), case)
    assert finding.passed, finding


def test_an_update_that_does_not_fit_is_not_mixed_in() -> None:
    case, rule = CASES["unequal weights"], LoRAFAIR()
    accumulator = rule.start(GlobalState(case.adapter), 1)
    with pytest.raises(AggregationError, match="tensor names differ"):
        accumulator.add(Update("bad", {}, 1), 1.0)
    with pytest.raises(AggregationError, match="weight -1"):
        accumulator.add(Update("client-000", case.trained["client-000"], 1), -1.0)
    with pytest.raises(NotEnoughUpdates):
        accumulator.finish()


def test_options_out_of_range_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.options\.objective = 'l1': .*'cosine' or 'ridge'"):
        make_rule("lora_fair", {"objective": "l1"})
    with pytest.raises(ConfigError, match=r"strategy\.options\.strength = -1: .*greater than or equal to 0"):
        make_rule("lora_fair", {"strength": -1})
