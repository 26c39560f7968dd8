"""Hostile clients for tests: what they send, knowing everything that the honest ones send.

    attack = hostile("little_is_enough", received, honest, count=2)
    for client_id, delta in attack.items():
        accumulator.add(Update(client_id, delta, num_examples=1), 1.0)

Each adversary is the strongest of its kind that a rule may face: it sees all honest deltas of the round, and the
hostile clients agree with each other. Nothing in the library calls it; chance is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from federated.errors import AggregationError
from federated.state import AdapterState, Tensors

__all__ = ["ADVERSARIES", "GAUGES", "Scene", "hostile", "in_another_basis"]

Deltas = dict[str, Tensor]


@dataclass(frozen=True)
class Scene:
    """What a hostile client knows.

    Args:
        received: the adapter that all clients were sent.
        honest: the honest clients' deltas, by client id.
        count: hostile clients.
        generator: their chance.
    """

    received: AdapterState
    honest: Mapping[str, Tensors]
    count: int
    generator: torch.Generator

    def mean(self) -> Deltas:
        """Of the honest deltas."""
        return {name: every.mean(dim=0) for name, every in self.stacked().items()}

    def stacked(self) -> Deltas:
        """Each tensor of all honest clients, [n, ...]."""
        names = next(iter(self.honest.values()))
        return {name: torch.stack([delta[name].float() for delta in self.honest.values()]) for name in names}


def sign_flip(scene: Scene) -> Deltas:
    """The honest mean, backwards."""
    return _times(scene.mean(), -1.0)


def scaled(scene: Scene) -> Deltas:
    """The honest mean, a million times."""
    return _times(scene.mean(), 1e6)


def zero(scene: Scene) -> Deltas:
    """Nothing: slows the others down."""
    return _times(scene.mean(), 0.0)


def gaussian(scene: Scene) -> Deltas:
    """Noise, a hundred times larger than the honest values (Blanchard et al. 2017, section 5)."""
    return {
        name: torch.randn(every.shape[1:], generator=scene.generator) * 100 * float(every.square().mean().sqrt())
        for name, every in scene.stacked().items()
    }


def inner_product(scene: Scene) -> Deltas:
    """A little backwards, close to the honest ones: ``-0.1 mean`` (Xie, Koyejo and Gupta, "Fall of Empires", 2019)."""
    return _times(scene.mean(), -0.1)


def little_is_enough(scene: Scene) -> Deltas:
    """``mean - z std``, the farthest that still has honest supporters (Baruch et al., "A Little Is Enough", 2019).

    z is the normal quantile of ``(n - f - s) / (n - f)`` with ``s = floor(n / 2 + 1) - f`` of n clients, f of them
    hostile; never below 0.
    """
    honest = len(scene.honest)
    supporters = math.floor((honest + scene.count) / 2 + 1) - scene.count
    share = min(max((honest - supporters) / honest, 0.5), 1 - 1e-6)
    far = NormalDist().inv_cdf(share)
    spread = {name: every.std(dim=0, correction=0) for name, every in scene.stacked().items()}
    return {name: tensor - far * spread[name] for name, tensor in scene.mean().items()}


def gauge_flip(scene: Scene) -> Deltas:
    """An honest client's result as ``(-B, -A)``."""
    return in_another_basis(scene.received, _first(scene), GAUGES["flip"])


def gauge_turn(scene: Scene) -> Deltas:
    """An honest client's result as ``(B Q^T, Q A)``."""
    return in_another_basis(scene.received, _first(scene), GAUGES["turn"])


def gauge_scale(scene: Scene) -> Deltas:
    """An honest client's result as ``(1000 B, A / 1000)``."""
    return in_another_basis(scene.received, _first(scene), GAUGES["scale"])


def _times(delta: Tensors, factor: float) -> Deltas:
    return {name: tensor * factor for name, tensor in delta.items()}


def _first(scene: Scene) -> Tensors:
    return scene.honest[min(scene.honest)]


def _turned(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    turn: Tensor = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64)).Q
    return turn


GAUGES: Mapping[str, Callable[[int], Tensor]] = {
    "flip": lambda rank: -torch.eye(rank, dtype=torch.float64),
    "turn": _turned,
    "scale": lambda rank: torch.eye(rank, dtype=torch.float64) / 1000.0,
}
"""Matrices G of the rank that make ``(B G^-1, G A)``, the same effective update in another basis."""


def in_another_basis(received: AdapterState, delta: Tensors, gauge: Callable[[int], Tensor]) -> Deltas:
    """A delta whose client ends with ``(B G^-1, G A)`` in place of ``(B, A)``, in every layer.

    Args:
        received: what the client was sent.
        delta: what it changed, of all groups.
        gauge: makes G for a rank.

    Raises:
        AggregationError: if one of a layer's factors is not in the delta: it is frozen, and its basis fixed.
    """
    moved = dict(delta)
    for pair in received.pairs():
        name_a, name_b = f"{pair.module.name}.factor_a", f"{pair.module.name}.factor_b"
        if name_a not in delta or name_b not in delta:
            raise AggregationError(f"layer {pair.module.name}: another basis needs both factors in the update")
        matrix = gauge(pair.factor_a.shape[0])
        after_a = matrix @ (pair.factor_a.double() + delta[name_a].double())
        after_b = (pair.factor_b.double() + delta[name_b].double()) @ torch.linalg.inv(matrix)
        moved[name_a] = (after_a - pair.factor_a.double()).float()
        moved[name_b] = (after_b - pair.factor_b.double()).float()
    return moved


ADVERSARIES: Mapping[str, Callable[[Scene], Deltas]] = {
    "gauge_flip": gauge_flip,
    "gauge_scale": gauge_scale,
    "gauge_turn": gauge_turn,
    "gaussian": gaussian,
    "inner_product": inner_product,
    "little_is_enough": little_is_enough,
    "scaled": scaled,
    "sign_flip": sign_flip,
    "zero": zero,
}
"""Every adversary by name."""


def hostile(
    name: str, received: AdapterState, honest: Mapping[str, Tensors], *, count: int, seed: int = 0
) -> dict[str, Deltas]:
    """The deltas of ``count`` hostile clients, by client id (``mallory-000`` ...).

    Args:
        name: one of `ADVERSARIES`.
        received: the adapter that all clients were sent.
        honest: the honest clients' deltas, at least one.
        count: how many hostile clients there are.
        seed: of their chance.
    """
    scene = Scene(received, honest, count, torch.Generator().manual_seed(seed))
    return {f"mallory-{number:03d}": ADVERSARIES[name](scene) for number in range(count)}
