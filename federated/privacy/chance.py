"""Chance that nobody else can know: normal noise and Poisson batches straight from the operating system's generator.

A seed that a server knows makes noise that it can subtract and batches that it can recompute, so no seed of a
configuration reaches this module; the one exception is ``privacy.test_seed``, with which a run is not private and says
so. Random number generators are not in between either: torch's on the CPU keeps 32 bits of any seed, and is no cipher.
While LoRA's B is zero, the gradient of A is zero too, and what is sent for A is pure noise: with such a generator all
the rest of the noise follows from it.

The noise is Gaussian in float32, rounded as floats are; the attack of Mironov (2012) on rounding is not defended
against. Global random states are neither read nor moved.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["NoiseSource", "noise_source", "poisson_batches"]


class NoiseSource:
    """Random numbers from random bytes.

    Args:
        read: gives that many random bytes, new ones on each call.
        private: whether nobody else can know them.
    """

    def __init__(self, read: Callable[[int], bytes], *, private: bool) -> None:
        self._read = read
        self.private = private

    def uniform(self, count: int) -> Tensor:
        """Numbers in [0, 1) with 53 random bits each, float64 [count]."""
        return (self._words(count, torch.int64) >> 11 & (1 << 53) - 1).to(torch.float64).mul_(2.0**-53)

    def normal(self, count: int) -> Tensor:
        """Standard normal numbers, float32 [count] on the CPU.

        Box and Muller (1958), from 63 random bits for the radius and 32 for the angle of two: none is beyond 9.4, which
        a normal number is once in 10^20. From fewer bits it would be so often that a small target_delta does not
        cover it: what no noise can reach gives away what did.
        """
        half = (count + 1) // 2
        uniform = (self._words(half, torch.int64) & (1 << 63) - 1).to(torch.float64).add_(0.5).mul_(2.0**-63)
        radius = uniform.log_().mul_(-2.0).clamp_(min=0.0).sqrt_().float()
        turn = self._words(half, torch.int32).to(torch.float64).add_(2.0**31 + 0.5).mul_(2.0**-32)
        angle = turn.mul_(2.0 * math.pi).float()
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]

    def _words(self, count: int, dtype: torch.dtype) -> Tensor:
        if not count:
            return torch.zeros(0, dtype=dtype)
        return torch.frombuffer(bytearray(self._read(count * dtype.itemsize)), dtype=dtype)


def noise_source(test_seed: int = -1) -> NoiseSource:
    """The operating system's generator, or with a ``test_seed`` of 0 or more the same numbers each time.

    Privacy: with a test seed there is none.
    """
    if test_seed < 0:
        return NoiseSource(os.urandom, private=True)
    calls = 0

    def repeatable(count: int) -> bytes:
        nonlocal calls
        calls += 1
        return hashlib.shake_256(f"federated test noise/{test_seed}/{calls}".encode()).digest(count)

    return NoiseSource(repeatable, private=False)


def poisson_batches(count: int, sampling: float, *, steps: int, source: NoiseSource) -> Iterator[list[int]]:
    """The batches of a run: each example is in each one with probability ``sampling``, independently of all else.

    What is given is what is accounted: an empty batch is a step as well.

    Args:
        count: examples.
        sampling: in (0, 1].
        steps: batches to give.
        source: of the draws.
    """
    for _ in range(steps):
        yield (source.uniform(count) < sampling).nonzero().flatten().tolist()
