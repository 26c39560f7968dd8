"""Chance without a random number library: the same draws on every platform and with every numpy version.

A split must outlive library upgrades, so orders and draws come from SHAKE-256 of their key. For simulation and data
splits only; nothing here is secret.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

__all__ = ["draw_normal", "draw_order", "draw_uniform"]


def _bits(count: int, key: tuple[object, ...]) -> npt.NDArray[np.uint64]:
    text = "\0".join(str(part) for part in key)
    return np.frombuffer(hashlib.shake_256(text.encode()).digest(8 * count), dtype="<u8").astype(np.uint64)


def draw_order(count: int, *key: object) -> list[int]:
    """A permutation of ``range(count)`` that depends on ``count`` and ``key`` only.

    >>> sorted(draw_order(4, 0, "client"))
    [0, 1, 2, 3]
    """
    return [int(index) for index in np.argsort(_bits(count, key), kind="stable")]


def draw_uniform(count: int, *key: object) -> npt.NDArray[np.float64]:
    """``count`` numbers in [0, 1) with 53 random bits each."""
    return (_bits(count, key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw_normal(count: int, *key: object) -> npt.NDArray[np.float64]:
    """``count`` standard normal numbers (Box-Muller)."""
    first, second = draw_uniform(count, "radius", *key), draw_uniform(count, "angle", *key)
    return np.sqrt(-2.0 * np.log1p(-first)) * np.cos(2.0 * math.pi * second)
