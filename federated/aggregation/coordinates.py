"""Statistics of each coordinate over clients: the middle, the mean without the extremes, the mean around the middle.

Each takes float64 [n, ...] with one row per client and makes a new float64 [...]; every value of the result lies
between the smallest and the largest of its column. They know no client and no layer. The rules of
`federated.aggregation` that work coordinate by coordinate call them.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["around_median", "median", "trimmed_mean"]


def median(every: Tensor) -> Tensor:
    """The middle value, or the mean of the two middle ones."""
    return trimmed_mean(every, (len(every) - 1) // 2)


def trimmed_mean(every: Tensor, trim: int) -> Tensor:
    """The mean without the ``trim`` smallest and the ``trim`` largest values."""
    return every.sort(dim=0).values[trim : len(every) - trim].mean(dim=0)


def around_median(every: Tensor, count: int) -> Tensor:
    """The mean of the ``count`` values nearest to the median; of two that are equally near, the smaller."""
    rising = every.sort(dim=0).values
    nearest = (rising - median(every)).abs().argsort(dim=0, stable=True)[:count]
    return rising.gather(0, nearest).mean(dim=0)
