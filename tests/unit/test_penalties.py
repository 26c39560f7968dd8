"""The tail penalty: its value and gradient against autograd, and where it has none."""

import pytest
import torch
from torch import Tensor, nn

from federated.manifest import TrainPlan
from federated.penalties import TailPenalty, tail_penalty


def parameters(rank: int = 3, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"k.factor_a": (rank, 5), "k.factor_b": (4, rank), "q.factor_a": (2, 5), "q.factor_b": (6, 2)}
    shapes |= {"head.weight": (2, 5)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def written_out(given: dict[str, nn.Parameter], start: int, weight: float) -> Tensor:
    terms = [given[f"{n}.factor_b"][:, start:].norm() * given[f"{n}.factor_a"][start:].norm() for n in "kq"]
    return weight * torch.stack(terms).sum()


@pytest.mark.parametrize("start", [0, 1, 2])
def test_value_and_gradient_are_those_of_the_formula(start: int) -> None:
    given = parameters()
    loss = written_out(given, start, 0.3)
    wanted = torch.autograd.grad(loss, list(given.values()), allow_unused=True)
    for parameter in given.values():
        parameter.grad = torch.ones_like(parameter)
    penalty = TailPenalty(given, start=start, weight=0.3)
    assert penalty.value() == pytest.approx(float(loss.detach()))
    penalty.add_gradient()
    for parameter, gradient in zip(given.values(), wanted, strict=True):
        expected = torch.ones_like(parameter) + (0.0 if gradient is None else gradient.nan_to_num())
        torch.testing.assert_close(parameter.grad, expected)


def test_a_tail_of_zero_or_beyond_the_rank_has_no_slope() -> None:
    given = parameters()
    with torch.no_grad():
        given["k.factor_b"].zero_()
    for parameter in given.values():
        parameter.grad = torch.zeros_like(parameter)
    penalty = TailPenalty(given, start=2, weight=1.0)
    penalty.add_gradient()
    assert penalty.value() == 0.0
    assert not any(parameter.grad.any() for parameter in given.values())


def test_a_factor_that_is_frozen_is_left_alone() -> None:
    given = parameters()
    del given["q.factor_b"]
    given["k.factor_b"].grad = torch.zeros_like(given["k.factor_b"])
    TailPenalty(given, start=1, weight=1.0).add_gradient()
    assert given["k.factor_a"].grad is None
    assert given["q.factor_a"].grad is None
    assert given["k.factor_b"].grad[:, 1:].any()
    assert not given["k.factor_b"].grad[:, :1].any()


def test_a_plan_without_one_makes_none() -> None:
    assert tail_penalty(TrainPlan(), parameters()) is None
    assert isinstance(tail_penalty(TrainPlan(tail_penalty=0.1, tail_start=1), parameters()), TailPenalty)
