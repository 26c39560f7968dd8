"""The canonical gauge: one basis for one product, near the received one, and zeros where there is nothing."""

import pytest
import torch

from federated.aggregation.gauge import frame_of
from federated.lowrank import LowRank, effective
from federated.manifest import ModuleSpec
from federated.state import LoraPair
from federated.testing import GAUGES

RANK = 3
every_gauge = pytest.mark.parametrize("gauge", sorted(GAUGES))
every_shape = pytest.mark.parametrize(("d_out", "d_in"), [(7, 6), (4, 11), (11, 4), (3, 9), (2, 5)])


def pair_of(seed: int, d_out: int = 7, d_in: int = 6, *, scaling: float = 2.5, used: int = RANK) -> LoraPair:
    """A layer whose product has ``used`` directions."""
    generator = torch.Generator().manual_seed(seed)
    module = ModuleSpec("q", d_in, d_out, RANK, scaling * RANK)
    factor_a = torch.randn(RANK, d_in, generator=generator)
    factor_b = torch.randn(d_out, RANK, generator=generator)
    factor_b[:, used:] = 0.0
    return LoraPair(module, factor_a, factor_b, scaling)


def turned(pair: LoraPair, gauge: str) -> LowRank:
    matrix = GAUGES[gauge](RANK)
    product = effective(pair)
    return LowRank(product.left @ torch.linalg.inv(matrix), matrix @ product.right)


@every_shape
def test_the_canonical_pair_is_balanced_and_has_the_same_product(d_out: int, d_in: int) -> None:
    frame = frame_of(pair_of(0, d_out, d_in))
    product = effective(pair_of(1, d_out, d_in))
    factor_a, factor_b = frame.canonical(product)
    torch.testing.assert_close(factor_b @ factor_a, product.dense())
    torch.testing.assert_close(factor_a @ factor_a.T, factor_b.T @ factor_b)


@every_gauge
@every_shape
def test_another_basis_has_the_same_canonical_pair(d_out: int, d_in: int, gauge: str) -> None:
    frame, pair = frame_of(pair_of(0, d_out, d_in)), pair_of(1, d_out, d_in)
    for found, expected in zip(frame.canonical(turned(pair, gauge)), frame.canonical(effective(pair)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@every_gauge
@pytest.mark.parametrize("used", [0, 1, 2])
def test_layers_of_fewer_directions_too(gauge: str, used: int) -> None:
    """A received product with fewer directions than the rank: a fresh adapter has none."""
    frame, pair = frame_of(pair_of(0, used=used)), pair_of(1)
    for found, expected in zip(frame.canonical(turned(pair, gauge)), frame.canonical(effective(pair)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("used", [0, 1, 2, 3])
def test_who_learnt_nothing_has_the_received_pair(used: int) -> None:
    pair = pair_of(0, used=used)
    frame = frame_of(pair)
    factor_a, factor_b = frame.canonical(effective(pair))
    torch.testing.assert_close(factor_a, frame.factor_a, rtol=0, atol=1e-12)
    torch.testing.assert_close(factor_b, frame.factor_b, rtol=0, atol=1e-12)
    assert not frame.factor_a[used:].any()
    assert not frame.factor_b[:, used:].any()


@pytest.mark.parametrize("used", [1, 3])
def test_small_changes_stay_small(used: int) -> None:
    """The turn goes towards the received pair, not towards wherever a decomposition happens to point."""
    pair = pair_of(0, used=used)
    frame = frame_of(pair)
    moved = pair._replace(factor_a=pair.factor_a + 1e-4 * pair_of(5).factor_a)
    moved = moved._replace(factor_b=torch.where(pair.factor_b != 0, pair.factor_b + 1e-4 * pair_of(5).factor_b, 0.0))
    factor_a, factor_b = frame.canonical(effective(moved))
    assert float((factor_a - frame.factor_a).norm() + (factor_b - frame.factor_b).norm()) < 1e-2


def test_clients_of_a_fresh_adapter_agree_in_the_rows_that_they_share() -> None:
    """Honest clients that moved B alone, by like amounts, have like pairs."""
    fresh = pair_of(0, used=0)
    frame, common = frame_of(fresh), pair_of(1).factor_b
    pairs = []
    for seed in (2, 3):
        factor_b = common + 1e-3 * pair_of(seed).factor_b
        pairs.append(frame.canonical(effective(fresh._replace(factor_b=factor_b))))
    for one, other in zip(*pairs, strict=True):
        assert float((one - other).norm() / one.norm()) < 1e-2


def test_equal_singular_values_are_no_trouble() -> None:
    """A decomposition of them is not unique, the canonical pair is."""
    received = pair_of(0)
    frame = frame_of(received)
    basis = torch.linalg.qr(pair_of(2).factor_b.double()).Q
    rows = torch.linalg.qr(pair_of(3).factor_a.double().T).Q.T
    one = frame.canonical(LowRank(basis, rows))
    other = frame.canonical(LowRank(basis @ GAUGES["turn"](RANK).T, GAUGES["turn"](RANK) @ rows))
    for found, expected in zip(one, other, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_the_scaling_is_in_the_pair() -> None:
    """Layers of different scalings are measured in units of their effect."""
    received, pair = pair_of(0), pair_of(1)
    frame = frame_of(received)
    folded = pair._replace(factor_b=pair.factor_b * pair.scaling, scaling=1.0)
    unscaled = frame_of(received._replace(factor_b=received.factor_b * received.scaling, scaling=1.0))
    for found, expected in zip(frame.canonical(effective(pair)), unscaled.canonical(effective(folded)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
