"""Up to f hostile clients of every kind: the result stays among the honest ones, where a plain mean does not.

Measured on effective updates and the head together, in units of the honest ones' radius: the largest distance of an
honest result from their mean.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from federated.aggregation import RULES, FedIT, Rule, make_rule
from federated.delta import Update
from federated.errors import NotEnoughUpdates
from federated.global_state import GlobalState
from federated.state import AdapterState, Tensors
from federated.testing import ADVERSARIES, Case, Scene, cases, effective_of, hostile

CASES = {case.name: case for case in cases()}
TRIED = ("alpha is not r", "Conv1D", "tall", "rank is a dimension", "a fresh adapter", "bfloat16")
WITHIN = 1.5
"""Radii: 1 is an honest client's own distance; means of factors, and truncation, cost some."""
ROBUST = sorted(name for name in RULES if make_rule(name).properties.robust)
COORDINATES = ("bulyan", "median", "trimmed_mean")


def variants() -> Iterator[Any]:
    for name, space, nnm, f in itertools.product(ROBUST, ("factor", "product"), (False, True), (1, 2)):
        if space == "factor" or name not in COORDINATES:
            mark = f"{name}-{space}-f{f}{'-nnm' if nnm else ''}"
            yield pytest.param(name, {"space": space, "nnm": nnm, "byzantine": f}, id=mark)


def honest_of(case: Case, count: int, *, spread: float = 0.015, seed: int = 5) -> dict[str, Tensors]:
    """Clients that agree on most: a common change, and a little of their own."""
    generator = torch.Generator().manual_seed(seed)
    common = case.trained["client-001"]
    return {
        f"client-{number:03d}": {
            name: 0.3 * move + spread * torch.randn(move.shape, generator=generator) for name, move in common.items()
        }
        for number in range(count)
    }


def flat(adapter: AdapterState) -> Tensor:
    dense = [tensor.double() for tensor in adapter.dense().values()]
    return torch.cat([tensor.flatten() for tensor in (*effective_of(adapter).values(), *dense)])


def after(received: AdapterState, moves: Tensors) -> AdapterState:
    return replace(received, tensors={name: tensor.float() + moves[name] for name, tensor in received.tensors.items()})


def result_of(rule: Rule, case: Case, deltas: Mapping[str, Tensors]) -> AdapterState:
    accumulator = rule.start(GlobalState(case.adapter), 1)
    for client_id, delta in deltas.items():
        accumulator.add(Update(client_id, delta, 1), 1.0)
    result = accumulator.finish()
    if result.state:
        return result.state.adapter
    return after(case.adapter, {name: move.float() for name, move in result.mean_delta.items()})


class Field:
    """Honest clients of one case, and how far a result is from them."""

    def __init__(self, name: str, honest: int) -> None:
        self.case = CASES[name]
        self.received = GlobalState(self.case.adapter).materialise()
        self.honest = honest_of(self.case, honest)
        every = torch.stack([flat(after(self.received, moves)) for moves in self.honest.values()])
        self.mean = every.mean(dim=0)
        self.radius = float((every - self.mean).norm(dim=1).max())

    @property
    def step(self) -> float:
        """Radii from what was received to the honest mean."""
        return float((self.mean - flat(self.received)).norm()) / self.radius

    def attacked(self, rule: Rule, adversary: str, count: int) -> float:
        """Radii from the honest mean to the result."""
        attack = hostile(adversary, self.received, self.honest, count=count)
        found = result_of(rule, self.case, {**self.honest, **attack})
        return float((flat(found) - self.mean).norm()) / self.radius


@pytest.mark.parametrize(("name", "options"), list(variants()))
def test_up_to_f_hostile_clients_of_any_kind_are_withstood(name: str, options: dict[str, Any]) -> None:
    rule, f = make_rule(name, options), options["byzantine"]
    needed = rule.properties.min_updates
    for tried in TRIED:
        field = Field(tried, needed - f)
        allowed = WITHIN + (2 * f / needed * field.step if name == "norm_bound" else 0.0)
        found = {adversary: field.attacked(rule, adversary, f) for adversary in ADVERSARIES}
        assert max(found.values()) < allowed, (tried, allowed, found)


@pytest.mark.parametrize("tried", TRIED)
def test_a_plain_mean_withstands_none_that_leaves_the_honest_range(tried: str) -> None:
    """``little_is_enough`` stays inside of it on purpose: no distance tells it from an honest client."""
    field = Field(tried, 9)
    found = {adversary: field.attacked(FedIT(), adversary, 2) for adversary in ADVERSARIES}
    assert min(far for adversary, far in found.items() if adversary != "little_is_enough") > WITHIN, found
    assert found["scaled"] > 1e6
    assert found["little_is_enough"] < WITHIN


@pytest.mark.parametrize("name", ROBUST)
def test_without_hostile_clients_the_result_is_among_the_honest_too(name: str) -> None:
    rule = make_rule(name)
    field = Field("alpha is not r", rule.properties.min_updates)
    assert field.attacked(rule, "zero", 0) < WITHIN


@pytest.mark.parametrize("name", ROBUST)
def test_one_more_than_f_asks_for_more_updates(name: str) -> None:
    """The number of hostile clients is the user's to say: the smallest round that holds for f is refused for f + 1."""
    needed = make_rule(name, {"byzantine": 1}).properties.min_updates
    field = Field("alpha is not r", needed - 2)
    with pytest.raises(NotEnoughUpdates, match=f"{needed} good updates: {name} needs at least"):
        field.attacked(make_rule(name, {"byzantine": 2}), "scaled", 2)


@pytest.mark.parametrize("name", [name for name in ROBUST if name != "norm_bound"])
def test_a_hostile_majority_is_not_withstood(name: str) -> None:
    """Documented: nothing is promised with more than f. They agree with each other better than the honest do."""
    assert Field("alpha is not r", 4).attacked(make_rule(name), "sign_flip", 7) > WITHIN


def test_norm_bounding_alone_lets_hostile_clients_pull_within_the_bound() -> None:
    """Documented: a flipped mean of ordinary size is not shrunk."""
    field = Field("alpha is not r", 4)
    assert field.attacked(make_rule("norm_bound"), "sign_flip", 1) > WITHIN
    assert field.attacked(make_rule("norm_bound"), "scaled", 1) < field.step


@pytest.mark.parametrize("name", ["krum", "multi_krum", "geometric_median"])
def test_mixing_brings_the_result_closer_to_the_honest_mean(name: str) -> None:
    field = Field("alpha is not r", 8)
    plain, mixed = (make_rule(name, {"byzantine": 2, "nnm": nnm}) for nnm in (False, True))
    assert field.attacked(mixed, "zero", 2) < 0.1 * field.attacked(plain, "zero", 2)


class TestAdversaries:
    CASE = CASES["alpha is not r"]

    def deltas(self, name: str, count: int = 2) -> dict[str, dict[str, Tensor]]:
        return hostile(name, self.CASE.adapter, self.CASE.trained, count=count, seed=3)

    def mean(self) -> dict[str, Tensor]:
        names = self.CASE.adapter.tensors
        return {name: torch.stack([moves[name] for moves in self.CASE.trained.values()]).mean(dim=0) for name in names}

    @pytest.mark.parametrize("name", sorted(ADVERSARIES))
    def test_each_sends_updates_of_the_right_form_and_the_same_again(self, name: str):
        found = self.deltas(name)
        assert list(found) == ["mallory-000", "mallory-001"]
        for delta in found.values():
            assert {key: move.shape for key, move in delta.items()} == {
                key: tensor.shape for key, tensor in self.CASE.adapter.tensors.items()
            }
            assert all(move.dtype == torch.float32 and torch.isfinite(move).all() for move in delta.values())
        for client_id, delta in self.deltas(name).items():
            assert all(torch.equal(found[client_id][key], move) for key, move in delta.items())

    @pytest.mark.parametrize(
        ("name", "factor"), [("sign_flip", -1), ("scaled", 1e6), ("zero", 0), ("inner_product", -0.1)]
    )
    def test_multiples_of_the_honest_mean(self, name: str, factor: float):
        for key, mean in self.mean().items():
            torch.testing.assert_close(self.deltas(name)["mallory-000"][key], factor * mean)

    def test_a_little_is_enough_stays_within_the_honest_spread(self):
        scene = Scene(self.CASE.adapter, honest_of(self.CASE, 8), 3, torch.Generator())
        found = ADVERSARIES["little_is_enough"](scene)
        for key, every in scene.stacked().items():
            z = 0.318639  # the normal quantile of (11 - 3 - s) / (11 - 3) with s = floor(11 / 2 + 1) - 3 = 3: 5 / 8
            expected = every.mean(dim=0) - z * every.std(dim=0, correction=0)
            torch.testing.assert_close(found[key], expected, rtol=1e-4, atol=1e-6)

    def test_noise_is_large_and_differs_between_clients(self):
        one, other = self.deltas("gaussian").values()
        for key, every in Scene(self.CASE.adapter, self.CASE.trained, 2, torch.Generator()).stacked().items():
            size = float(every.square().mean().sqrt())
            assert 50 * size < float(one[key].square().mean().sqrt()) < 200 * size
            assert not torch.equal(one[key], other[key])
