"""Draws are reproducible for ever, and look like what they are called."""

import numpy as np

from federated.data.chance import draw_normal, draw_order, draw_uniform


def test_the_order_is_pinned() -> None:
    assert draw_order(8, 0, "clinic-1") == [2, 6, 1, 7, 4, 3, 5, 0]


def test_the_order_is_a_permutation() -> None:
    assert sorted(draw_order(1000, 3, "x")) == list(range(1000))


def test_the_order_depends_on_every_part_of_the_key() -> None:
    orders = [draw_order(50, *key) for key in [(0, "a"), (1, "a"), (0, "b"), (0, "a", "more")]]
    assert len({tuple(order) for order in orders}) == 4


def test_uniform_numbers_fill_the_unit_interval() -> None:
    numbers = draw_uniform(10_000, "u")
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    assert abs(numbers.mean() - 0.5) < 0.02


def test_normal_numbers_have_mean_zero_and_deviation_one() -> None:
    numbers = draw_normal(10_000, "n")
    assert abs(float(np.mean(numbers))) < 0.05
    assert abs(float(np.std(numbers)) - 1.0) < 0.05


def test_no_draws_are_no_draws() -> None:
    assert draw_order(0, "a") == []
