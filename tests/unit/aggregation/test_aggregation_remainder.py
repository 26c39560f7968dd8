"""Error feedback: what a truncation could not hold is carried, bounded, reported, and comes back in the next sum."""

from dataclasses import replace

import pytest
import torch

from federated.aggregation import ClientView, FlexLoRA, Result, make_rule
from federated.delta import Update
from federated.errors import ConfigError
from federated.global_state import GlobalState
from federated.state import Tensors
from federated.testing import Case, cases, dense_mean, effective_of

CASES = {case.name: case for case in cases()}
CASE = CASES["many clients"]
FED_BACK = FlexLoRA(error_feedback=True)


def round_of(rule: FlexLoRA, state: GlobalState, case: Case) -> tuple[Result, dict[str, torch.Tensor]]:
    """One round from that state; what the rule made, and the dense mean of what its clients hold."""
    accumulator, after = rule.start(state, 1), {}
    for client, moves in case.trained.items():
        _, payload = rule.plan(state, ClientView(client), 1)
        after[client] = replace(payload, tensors={n: t.float() + moves[n] for n, t in payload.tensors.items()})
        accumulator.add(Update(client, moves, 1, received=payload), case.weights[client])
    return accumulator.finish(), dense_mean(after, case.weights)


def begun(rule: FlexLoRA, case: Case) -> GlobalState:
    return GlobalState(case.adapter, rule_state=rule.init(case.adapter.spec))


def carried(tensors: Tensors, layer: str) -> torch.Tensor | float:
    left = tensors.get(f"{layer}.remainder_left")
    return 0.0 if left is None else left.double() @ tensors[f"{layer}.remainder_right"].double()


@pytest.mark.parametrize("name", ["many clients", "tall", "wide", "Conv1D", "rsLoRA", "rank one", "one client"])
def test_adapter_and_remainder_together_are_the_sum_round_after_round(name: str) -> None:
    case, rule = CASES[name], FlexLoRA(error_feedback=True, error_rank=64)
    state = begun(rule, case)
    for number in range(4):
        result, mean = round_of(rule, state, replace(case, trained=next_moves(case, number)))
        for layer, matrix in mean.items():
            total = matrix + carried(state.rule_state.tensors, layer)
            found = effective_of(result.state.adapter)[layer] + carried(result.rule_state.tensors, layer)
            assert float((found - total).norm()) <= 1e-6 * float(total.norm())
        assert result.metrics["remainder_lost"] < 1e-9
        state = replace(result.state, rule_state=result.rule_state)


def next_moves(case: Case, number: int) -> dict[str, Tensors]:
    generator = torch.Generator().manual_seed(number)
    return {
        client: {n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in moves.items()}
        for client, moves in case.trained.items()
    }


def test_the_adapter_is_the_best_one_for_the_sum_with_the_remainder() -> None:
    state = begun(FED_BACK, CASE)
    first, _ = round_of(FED_BACK, state, CASE)
    state = replace(first.state, rule_state=first.rule_state)
    second, mean = round_of(FED_BACK, state, CASE)
    for layer, matrix in mean.items():
        total = matrix + carried(state.rule_state.tensors, layer)
        error = float((effective_of(second.state.adapter)[layer] - total).norm())
        assert error == pytest.approx(float(torch.linalg.svdvals(total)[3:].norm()), rel=1e-5)


def test_a_direction_too_small_for_one_round_gets_in_after_some() -> None:
    """Rank one: two clients always end with a large first direction, one with a small second one."""
    case = CASES["rank one"]
    large, small = ends(case, 0, size=3.0), ends(case, 1, size=1.0)

    def largest_of_the_second(rule: FlexLoRA) -> float:
        state, found = begun(rule, case), 0.0
        for _ in range(20):
            payload = rule.plan(state, ClientView("client-000"), 1)[1]
            trained = dict.fromkeys(case.trained, large) | {"client-000": small}
            moves = {client: {n: end[n] - t for n, t in payload.tensors.items()} for client, end in trained.items()}
            result, _ = round_of(rule, state, replace(case, trained=moves, weights=dict.fromkeys(trained, 1.0)))
            state = replace(result.state, rule_state=result.rule_state)
            found = max(found, float(effective_of(state.adapter)["layer.q"][1, 1].abs()))
        return found

    assert largest_of_the_second(FlexLoRA()) < 1e-4
    assert largest_of_the_second(FED_BACK) > 1.0


def ends(case: Case, direction: int, *, size: float) -> dict[str, torch.Tensor]:
    """An adapter of one direction."""
    made = {name: torch.zeros_like(tensor) for name, tensor in case.adapter.tensors.items()}
    for name, tensor in made.items():
        if name.endswith("factor_a"):
            tensor[0, direction] = size
        elif name.endswith("factor_b"):
            tensor[direction, 0] = size
    return made


@pytest.mark.parametrize("rank", [1, 2])
def test_the_bound_holds_and_what_it_cuts_off_is_reported(rank: int) -> None:
    rule = FlexLoRA(error_feedback=True, error_rank=rank)
    result, mean = round_of(rule, begun(rule, CASE), CASE)
    assert {tensor.shape[1] for name, tensor in result.rule_state.tensors.items() if name.endswith("_left")} == {rank}
    assert all(tensor.dtype == torch.float32 for tensor in result.rule_state.tensors.values())
    squares = [torch.linalg.svdvals(matrix).square() for matrix in mean.values()]
    energy = sum(float(one.sum()) for one in squares)
    expected = {
        "energy_kept": sum(float(one[:3].sum()) for one in squares) / energy,
        "remainder_rank": rank,
        "remainder_carried": (sum(float(one[3 : 3 + rank].sum()) for one in squares) / energy) ** 0.5,
        "remainder_lost": (sum(float(one[3 + rank :].sum()) for one in squares) / energy) ** 0.5,
    }
    assert result.metrics == pytest.approx(expected, abs=1e-9)


def test_without_it_nothing_is_remembered() -> None:
    result, _ = round_of(FlexLoRA(), begun(FlexLoRA(), CASE), CASE)
    assert not result.rule_state.tensors
    assert set(result.metrics) == {"energy_kept"}


def test_switched_off_it_forgets_what_was_carried() -> None:
    first, _ = round_of(FED_BACK, begun(FED_BACK, CASE), CASE)
    state = replace(first.state, rule_state=first.rule_state)
    off, mean = round_of(FlexLoRA(), state, CASE)
    plain, _ = round_of(FlexLoRA(), replace(state, rule_state=FlexLoRA().init(CASE.adapter.spec)), CASE)
    assert not off.rule_state.tensors
    assert all(torch.equal(off.state.adapter.tensors[n], t) for n, t in plain.state.adapter.tensors.items())
    assert mean


def test_one_client_has_nothing_to_carry() -> None:
    case = CASES["one client"]
    result, _ = round_of(FED_BACK, begun(FED_BACK, case), case)
    assert not result.rule_state.tensors
    assert (result.metrics["remainder_rank"], result.metrics["remainder_carried"]) == (0.0, 0.0)


def test_no_update_at_all_carries_nothing() -> None:
    case = CASES["nobody learns anything"]
    result, _ = round_of(FED_BACK, begun(FED_BACK, case), case)
    assert not result.rule_state.tensors
    assert result.metrics == {
        "energy_kept": 1.0,
        "remainder_rank": 0.0,
        "remainder_carried": 0.0,
        "remainder_lost": 0.0,
    }


def test_options_out_of_range_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.options\.error_rank = -1: .* greater than or equal to 0"):
        make_rule("flexlora", {"error_rank": -1})
    with pytest.raises(ConfigError, match=r"error_rank = 3: nothing is carried .*error_feedback=true"):
        make_rule("flexlora", {"error_rank": 3})
    with pytest.raises(ConfigError, match=r"strategy\.options\.carry = True: no option of flexlora; expected some of"):
        make_rule("flexlora", {"carry": True})
