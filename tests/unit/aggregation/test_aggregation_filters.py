"""Filters over inner products and statistics of coordinates, each against its own equation on plain vectors."""

import math

import pytest
import torch
from torch import Tensor

from federated.aggregation import coordinates, filters

N, DIM = 9, 40


def drawn(seed: int = 0, count: int = N, *, far: int = 0) -> Tensor:
    """Vectors around a common one; the last ``far`` of them are a million times farther away."""
    generator = torch.Generator().manual_seed(seed)
    points = 2.0 + torch.randn(count, DIM, generator=generator, dtype=torch.float64)
    if far:
        points[-far:] *= 1e6
    return points


def gram(points: Tensor) -> Tensor:
    return points @ points.T


def test_distances_are_those_of_the_vectors() -> None:
    points = drawn()
    torch.testing.assert_close(filters.distances(gram(points)), torch.cdist(points, points), rtol=1e-10, atol=1e-10)
    same = points[:1].expand(3, -1)
    assert not filters.distances(gram(same)).any()


@pytest.mark.parametrize("byzantine", [0, 1, 2])
def test_mixing_averages_the_nearest(byzantine: int) -> None:
    points = drawn()
    mixed = filters.nearest_mixing(gram(points), byzantine) @ points
    for index, point in enumerate(points):
        order = sorted(range(N), key=lambda other: float((points[other] - point).norm()))
        torch.testing.assert_close(mixed[index], points[order[: N - byzantine]].mean(dim=0))


def test_mixing_keeps_each_update_among_its_nearest_even_when_others_are_equal() -> None:
    points = drawn(count=1).expand(5, -1)
    mixing = filters.nearest_mixing(gram(points), 2)
    assert (mixing.diagonal() == 1 / 3).all()
    torch.testing.assert_close(mixing.sum(dim=1), torch.ones(5, dtype=torch.float64))


def scores_of(points: Tensor, byzantine: int) -> list[float]:
    count = max(1, len(points) - byzantine - 2)
    found = []
    for index, point in enumerate(points):
        others = [float((point - other).square().sum()) for j, other in enumerate(points) if j != index]
        found.append(sum(sorted(others)[:count]))
    return found


@pytest.mark.parametrize("byzantine", [0, 1, 3])
def test_krum_scores_add_up_the_nearest_squares(byzantine: int) -> None:
    points = drawn()
    found = filters.krum_scores(gram(points), byzantine)
    assert found.tolist() == pytest.approx(scores_of(points, byzantine))


def test_the_lowest_scores_share_the_weight_and_ties_go_to_the_first() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0, 9.0], dtype=torch.float64)
    assert filters.chosen(scores, 1).tolist() == [0, 1, 0, 0, 0]
    assert filters.chosen(scores, 2).tolist() == [0, 0.5, 0, 0.5, 0]
    assert filters.chosen(torch.zeros(3, dtype=torch.float64), 1).tolist() == [1, 0, 0]


def test_ties_up_to_rounding_go_to_the_first() -> None:
    scores = torch.tensor([1.0 + 1e-12, 1.0, 5.0, 1.0 - 1e-12, 0.0, 1e-300], dtype=torch.float64)
    assert filters.chosen(scores, 3).nonzero().flatten().tolist() == [0, 4, 5]
    assert filters.chosen(scores[:4], 1).tolist() == [1, 0, 0, 0]


def test_what_rounding_leaves_is_no_distance() -> None:
    """Equal points whose inner products were rounded differently."""
    points = drawn(count=3)
    points[1] = points[0]
    noisy = gram(points) * (1 + 1e-15 * torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double())
    found = filters.distances((noisy + noisy.T) / 2)
    assert found[0, 1] == 0.0
    assert found[0, 2] > 1.0


def test_peeling_is_krum_again_and_again() -> None:
    points, left, expected = drawn(count=11, far=2), list(range(11)), []
    for _ in range(7):
        scores = scores_of(points[left], 2)
        expected.append(left.pop(scores.index(min(scores))))
    assert filters.peeled(gram(points), 2, 7).tolist() == sorted(expected)
    assert not {9, 10} & set(expected)


def test_peeling_everything_takes_everything() -> None:
    assert filters.peeled(gram(drawn(count=3)), 0, 3).tolist() == [0, 1, 2]


def test_norms_are_bounded() -> None:
    points = drawn(far=2)
    norms = points.norm(dim=1)
    for bound in (1.0, 12.0, 1e9):
        expected = sum(point * min(1.0, bound / float(size)) for point, size in zip(points, norms, strict=True)) / N
        torch.testing.assert_close(filters.bounded(gram(points), bound) @ points, expected)
    weights = filters.bounded(gram(points), 0.0)
    median = norms.median()
    assert ((weights[:, None] * points).norm(dim=1) * N <= median * (1 + 1e-12)).all()
    assert int((weights * N == 1.0).sum()) == 5


def test_nothing_changed_is_bounded_to_nothing() -> None:
    zero = torch.zeros(3, 3, dtype=torch.float64)
    assert filters.bounded(zero, 0.0).tolist() == pytest.approx([1 / 3] * 3)
    assert torch.isfinite(filters.centered(zero, 0.0, 5)).all()
    assert filters.geometric_median(zero, 1e-6, 5).tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("radius", [0.5, 5.0, 0.0])
def test_centred_clipping_on_the_vectors_themselves(radius: float) -> None:
    points, center = drawn(far=2), torch.zeros(DIM, dtype=torch.float64)
    for _ in range(6):
        away = points - center
        sizes = away.norm(dim=1)
        limit = radius or float(sizes.median())
        center = center + (away * (limit / sizes).clamp(max=1.0)[:, None]).mean(dim=0)
    torch.testing.assert_close(filters.centered(gram(points), radius, 6) @ points, center, rtol=1e-7, atol=1e-7)


def test_the_geometric_median_has_no_pull_left() -> None:
    """At the minimum of the sum of distances the unit pulls add up to zero."""
    points = drawn()
    weights = filters.geometric_median(gram(points), 1e-9, 10_000)
    away = points - weights @ points
    pull = (away / away.norm(dim=1, keepdim=True)).sum(dim=0)
    assert float(pull.norm()) < 1e-5
    assert float(weights.sum()) == pytest.approx(1.0)


def test_the_geometric_median_of_three_on_a_line_is_the_middle() -> None:
    points = torch.tensor([[0.0], [1.0], [100.0]], dtype=torch.float64)
    weights = filters.geometric_median(gram(points), 1e-9, 10_000)
    assert float(weights @ points[:, 0]) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("size", [1e3, 1e12, 1e30])
def test_a_minority_however_far_moves_the_geometric_median_little(size: float) -> None:
    """Not even by way of the smoothing, which is relative to the distances."""
    points = drawn(count=7)
    honest = points[:4].clone()
    points[4:] *= size
    found = filters.geometric_median(gram(points), 1e-6, 1000) @ points
    radius = (honest - honest.mean(dim=0)).norm(dim=1).max()
    assert float((found - honest.mean(dim=0)).norm()) < 4 * float(radius)


def test_a_majority_in_one_point_is_the_geometric_median() -> None:
    points = drawn(count=5)
    points[:3] = points[0]
    found = filters.geometric_median(gram(points), 1e-6, 1000) @ points
    torch.testing.assert_close(found, points[0], rtol=1e-6, atol=1e-6)


class TestCoordinates:
    @pytest.mark.parametrize("count", [1, 2, 5, 6])
    def test_median(self, count: int):
        points = drawn(count=count).reshape(count, 4, 10)
        expected = torch.quantile(points, 0.5, dim=0)
        torch.testing.assert_close(coordinates.median(points), expected)

    @pytest.mark.parametrize("trim", [0, 1, 4])
    def test_trimmed_mean(self, trim: int):
        points = drawn()
        for column, found in zip(points.T.tolist(), coordinates.trimmed_mean(points, trim).tolist(), strict=True):
            kept = sorted(column)[trim : N - trim]
            assert found == pytest.approx(math.fsum(kept) / len(kept))

    @pytest.mark.parametrize("count", [1, 3, 9])
    def test_around_the_median(self, count: int):
        points = drawn()
        for column, found in zip(points.T.tolist(), coordinates.around_median(points, count).tolist(), strict=True):
            middle = sorted(column)[N // 2]
            kept = sorted(column, key=lambda value: abs(value - middle))[:count]
            assert found == pytest.approx(math.fsum(kept) / count)

    def test_of_two_equally_near_the_smaller(self):
        points = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
        assert coordinates.around_median(points, 2).tolist() == [0.5]

    def test_a_minority_cannot_leave_the_honest_range(self):
        points = drawn(far=4)
        honest = points[:5]
        for found in (coordinates.median(points), coordinates.trimmed_mean(points, 4)):
            assert (found >= honest.min(dim=0).values).all()
            assert (found <= honest.max(dim=0).values).all()
