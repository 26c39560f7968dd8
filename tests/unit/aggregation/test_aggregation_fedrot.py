"""FedRot-LoRA: what it adds to FedIT, and what it leaves."""

from dataclasses import replace

import pytest
import torch

from federated.aggregation import ClientView, FedIT, FedRotLoRA, Rule, make_rule
from federated.delta import Update
from federated.errors import AggregationError, ConfigError, NotEnoughUpdates
from federated.global_state import GlobalState
from federated.state import AdapterState, RuleState, Tensors
from federated.testing import Case, cases, examine
from federated.uploads import pack

CASES = {case.name: case for case in cases()}
CLIENT = ClientView("client-000")


class ByB(FedRotLoRA):
    """The even turn, in which B is the reference."""

    def init(self, spec):
        return RuleState({"reference": "factor_b"})


def rotation(rank: int, generator: torch.Generator) -> torch.Tensor:
    q, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))
    q[:, -1] *= torch.linalg.det(q).sign()
    return q


def rotated(seed: int, *, apart: float, base: str = "unequal weights") -> Case:
    """Clients that learnt the like (up to ``apart``), each in a basis of its own."""
    case, generator = CASES[base], torch.Generator().manual_seed(seed)
    common = {name: 0.5 * torch.randn(one.shape, generator=generator) for name, one in case.adapter.tensors.items()}
    trained: dict[str, Tensors] = {}
    for client in case.trained:
        moves = {n: one + apart * torch.randn(one.shape, generator=generator) for n, one in common.items()}
        for module in case.adapter.spec.modules:
            a, b = f"{module.name}.factor_a", f"{module.name}.factor_b"
            turn = rotation(module.rank, generator)
            before_a, before_b = case.adapter.tensors[a].double(), case.adapter.tensors[b].double()
            moves[a] = (turn.T @ (before_a + moves[a]) - before_a).float()
            moves[b] = ((before_b + moves[b]) @ turn - before_b).float()
        trained[client] = moves
    return replace(case, trained=trained)


@pytest.mark.parametrize("rule", [FedRotLoRA(), ByB()], ids=["by A", "by B"])
@pytest.mark.parametrize(
    "base", ["alpha is not r", "rsLoRA", "Conv1D", "wide", "tall", "rank is a dimension", "many clients"]
)
def test_clients_that_are_equal_up_to_a_rotation_are_averaged_exactly(rule: FedRotLoRA, base: str) -> None:
    case = rotated(3, apart=0.0, base=base)
    assert examine(rule, case).error < 1e-6
    assert examine(FedIT(), case).error > 0.1


@pytest.mark.parametrize("rule", [FedRotLoRA(), ByB()], ids=["by A", "by B"])
@pytest.mark.parametrize("apart", [0.05, 0.2])
def test_on_rotated_clients_it_is_nearer_to_the_truth_than_fedit(rule: FedRotLoRA, apart: float) -> None:
    pairs = [
        (examine(rule, one).error, examine(FedIT(), one).error) for one in (rotated(s, apart=apart) for s in range(20))
    ]
    assert all(found < plain for found, plain in pairs), pairs


def mean_of(rule: Rule, case: Case) -> Tensors:
    state = GlobalState(case.adapter, rule_state=rule.init(case.adapter.spec))
    plan, payload = rule.plan(state, CLIENT, 1)
    accumulator = rule.start(state, 1)
    for client, moves in case.trained.items():
        accumulator.add(Update(client, pack(plan, payload, moves), 1), case.weights[client])
    return accumulator.finish().mean_delta or {}


def test_no_strength_is_fedit_bit_for_bit() -> None:
    case = CASES["unequal weights"]
    found, expected = mean_of(FedRotLoRA(strength=0.0), case), mean_of(FedIT(), case)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_rank_one_has_nothing_to_turn() -> None:
    case = CASES["rank one"]
    assert examine(FedRotLoRA(), case).error == pytest.approx(examine(FedIT(), case).error, rel=1e-5)


def test_a_fresh_b_says_nothing_and_turns_nothing() -> None:
    case = CASES["a fresh adapter"]
    assert examine(ByB(), case).error == pytest.approx(examine(FedIT(), case).error, rel=1e-5)


def test_the_reference_changes_with_each_finished_round() -> None:
    case, rule = CASES["alpha is not r"], FedRotLoRA(strength=0.5)
    state, asked = GlobalState(case.adapter, rule_state=rule.init(case.adapter.spec)), []
    for _ in range(3):
        plan, _ = rule.plan(state, CLIENT, 1)
        asked.append((plan.align, plan.align_strength, plan.sent))
        with pytest.raises(NotEnoughUpdates):
            rule.start(state, 1).finish()
        accumulator = rule.start(state, 1)
        accumulator.add(Update("client-000", case.trained["client-000"], 1), 1.0)
        state = replace(state, rule_state=accumulator.finish().rule_state)
    everything = ("factor_a", "factor_b", "dense")
    assert asked == [(group, 0.5, everything) for group in ("factor_a", "factor_b", "factor_a")]


def test_another_rule_s_state_and_a_second_phase_are_refused() -> None:
    state = GlobalState(CASES["wide"].adapter)
    with pytest.raises(AggregationError, match="was not made by FedRot-LoRA: its reference is None"):
        FedRotLoRA().plan(state, CLIENT, 1)
    with pytest.raises(AggregationError, match="FedRot-LoRA has one phase, found phase 2"):
        FedRotLoRA().start(state, 2)


@pytest.mark.parametrize("value", [-0.1, 1.5, "far"])
def test_a_strength_beyond_its_range_is_refused_in_one_line(value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^strategy\.options\.strength = {value!r}: Input should be [^\n]*$"):
        make_rule("fedrot", {"strength": value})


def test_its_own_equation() -> None:
    """In float64, by another route: the polar factor by an eigendecomposition."""
    case, total = CASES["many clients"], sum(CASES["many clients"].weights.values())
    mean = {name: torch.zeros(one.shape, dtype=torch.float64) for name, one in case.adapter.tensors.items()}
    for client, moves in case.trained.items():
        after = {name: tensor.double() + moves[name] for name, tensor in case.adapter.tensors.items()}
        for pair in AdapterState(case.adapter.spec, after).pairs():
            name, share = pair.module.name, case.weights[client] / total
            matrix = pair.factor_a @ case.adapter.tensors[f"{name}.factor_a"].double().T
            values, vectors = torch.linalg.eigh(matrix.T @ matrix)
            flip = torch.ones(3, dtype=torch.float64)
            flip[0] = torch.linalg.det(matrix).sign()  # eigenvalues rise: the first is the weakest
            turn = matrix @ vectors @ torch.diag(flip / values.sqrt()) @ vectors.T
            mean[f"{name}.factor_a"] += share * turn.T @ pair.factor_a
            mean[f"{name}.factor_b"] += share * pair.factor_b @ turn
    found = mean_of(FedRotLoRA(), case)
    for name in (name for name in mean if "factor" in name):
        made = case.adapter.tensors[name].double() + found[name]
        torch.testing.assert_close(made, mean[name], rtol=1e-6, atol=1e-6)
