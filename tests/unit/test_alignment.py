"""Turning factors: the product stays, the basis moves towards the reference, and never by a reflection."""

import math
from dataclasses import replace

import pytest
import torch

from federated.alignment import nearest_rotation, turned
from federated.errors import AggregationError
from federated.manifest import AdapterSpec, ModuleSpec, TrainPlan
from federated.state import AdapterState
from federated.testing import cases, effective_of
from federated.uploads import pack

CASES = {case.name: case for case in cases()}
GROUPS = ("factor_a", "factor_b")
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_group = pytest.mark.parametrize("group", GROUPS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rotation(rank: int, seed: int) -> torch.Tensor:
    """A random rotation, float64."""
    q, r = torch.linalg.qr(torch.randn(rank, rank, generator=generator(seed), dtype=torch.float64))
    q = q * r.diagonal().sign()
    q[:, -1] *= torch.linalg.det(q).sign()
    return q


def moved(adapter: AdapterState, delta: dict[str, torch.Tensor]) -> AdapterState:
    return replace(adapter, tensors={n: t.double() + delta.get(n, torch.zeros(())) for n, t in adapter.tensors.items()})


@pytest.mark.parametrize("rank", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_it_is_a_rotation_whatever_the_matrix(rank: int, seed: int) -> None:
    matrix = torch.randn(rank, rank, generator=generator(seed))
    poor = matrix[:, :1] @ matrix[:1]
    for given in (matrix, -matrix, matrix * 1e-30, matrix * 1e30, torch.zeros_like(matrix), poor):
        found = nearest_rotation(given)
        torch.testing.assert_close(found @ found.T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)
        assert torch.linalg.det(found).item() == pytest.approx(1.0)


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_no_other_rotation_is_nearer(rank: int) -> None:
    matrix = torch.randn(rank, rank, generator=generator(rank), dtype=torch.float64)
    best = (nearest_rotation(matrix) * matrix).sum()
    assert all((rotation(rank, seed) * matrix).sum() <= best for seed in range(200))
    for one in torch.randn(50, rank, rank, dtype=torch.float64, generator=generator(1)):
        assert ((nearest_rotation(matrix) @ torch.linalg.matrix_exp(1e-3 * (one - one.T))) * matrix).sum() <= best


def test_a_rotation_is_its_own_nearest_one() -> None:
    for seed in range(5):
        torch.testing.assert_close(nearest_rotation(rotation(4, seed)), rotation(4, seed), rtol=0, atol=1e-9)


def test_where_the_matrix_does_not_decide_nothing_is_turned() -> None:
    assert torch.equal(nearest_rotation(torch.zeros(3, 3)), torch.eye(3, dtype=torch.float64))
    half = torch.zeros(4, 4)
    half[:2, :2] = rotation(2, 1).float()
    found = nearest_rotation(half)
    torch.testing.assert_close(found[2:, 2:], torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(found[:2, :2], rotation(2, 1), rtol=0, atol=1e-6)


@every_case
@every_group
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_the_product_is_unchanged_and_the_factor_no_farther(case, group: str, strength: float) -> None:
    received = case.adapter.cast(case.adapter.spec.dtype)
    for delta in case.trained.values():
        made = turned(received, delta, group=group, strength=strength)
        before, after = effective_of(moved(received, delta)), effective_of(moved(received, made))
        size = max(float(torch.stack([one.norm() for one in before.values()]).norm()), 1e-30)
        assert all(float((after[name] - before[name]).norm()) <= 1e-6 * size for name in before)
        for module in received.spec.modules:
            name = f"{module.name}.{group}"
            assert float(made[name].norm()) <= float(delta[name].norm()) * (1 + 1e-5) + 1e-6


@every_case
def test_dense_tensors_are_not_touched_and_names_stay(case) -> None:
    delta = case.trained["client-000"]
    made = turned(case.adapter, delta, group="factor_a", strength=1.0)
    assert made.keys() == delta.keys()
    assert made["head.weight"] is delta["head.weight"]
    assert {one.dtype for one in made.values()} == {torch.float32}


@every_group
def test_the_distance_falls_with_the_strength(group: str) -> None:
    case = CASES["alpha is not r"]
    names = [f"{module.name}.{group}" for module in case.adapter.spec.modules]
    turn = {
        f"{m.name}.{g}": (rotation(3, 2).T @ t if g == "factor_a" else t @ rotation(3, 2)) - t
        for m in case.adapter.spec.modules
        for g in GROUPS
        for t in [case.adapter.tensors[f"{m.name}.{g}"].double()]
    }
    distances = []
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
        plan = TrainPlan(align=group, align_strength=strength)
        sent = pack(plan, case.adapter, {name: one.float() for name, one in turn.items()})
        distances.append(math.hypot(*(float(sent[name].norm()) for name in names)))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-5 < distances[0]


@every_group
def test_no_strength_sends_what_was_trained_bit_for_bit(group: str) -> None:
    case = CASES["rsLoRA"]
    delta = case.trained["client-001"]
    sent = pack(TrainPlan(align=group, align_strength=0.0), case.adapter, delta)
    assert all(sent[name] is tensor for name, tensor in delta.items())


def test_half_a_turn_s_middle_is_still_a_rotation() -> None:
    """``(I + R) / 2`` is singular for R a half turn: the middle is not unique, and must still be a rotation."""
    module = ModuleSpec("q", 3, 3, 2, 2.0)
    half = torch.tensor([[-1.0, 0.0], [0.0, -1.0]])
    wide, tall = torch.eye(2, 3), torch.eye(3, 2)
    spec = AdapterSpec("lora", 2, 2.0, use_rslora=False, modules=(module,))
    received = AdapterState(spec, {"q.factor_a": wide, "q.factor_b": tall})
    delta = {"q.factor_a": half @ wide - wide, "q.factor_b": tall @ half - tall}
    made = moved(received, turned(received, delta, group="factor_a", strength=0.5))
    torch.testing.assert_close(effective_of(made)["q"], effective_of(received)["q"])


def test_both_factors_must_be_there() -> None:
    case = CASES["wide"]
    delta = {name: one for name, one in case.trained["client-000"].items() if not name.endswith("q.factor_b")}
    with pytest.raises(AggregationError, match=r"only be turned together, and layer\.q\.factor_b is not in the update"):
        pack(TrainPlan(align="factor_a"), case.adapter, delta)
