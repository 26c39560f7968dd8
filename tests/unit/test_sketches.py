"""Sketches and projections against the dense products, their sums, and what is refused."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from federated.errors import AggregationError
from federated.lowrank import truncate
from federated.manifest import AdapterSpec, ModuleSpec
from federated.sketches import (
    columns_of,
    omega,
    projected,
    projection_layout,
    rebuilt,
    sketch_layout,
    sketched,
)
from federated.state import AdapterState

SHAPES = [(30, 20), (20, 30), (24, 24), (5, 40), (40, 3)]
shapes = pytest.mark.parametrize(("d_out", "d_in"), SHAPES)


def adapter(d_out: int, d_in: int, rank: int, *, seed: int = 0, rslora: bool = False) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    modules = tuple(ModuleSpec(name, d_in, d_out, rank, 6.0) for name in ("k", "q"))
    tensors = {f"{one.name}.factor_a": torch.randn(rank, d_in, generator=generator) for one in modules}
    tensors |= {f"{one.name}.factor_b": torch.randn(d_out, rank, generator=generator) for one in modules}
    return AdapterState(AdapterSpec("lora", rank, 6.0, rslora, modules), tensors)


def dense(state: AdapterState, layer: str) -> torch.Tensor:
    (pair,) = (one for one in state.pairs() if one.module.name == layer)
    return pair.scaling * pair.factor_b.double() @ pair.factor_a.double()


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@shapes
@pytest.mark.parametrize("rslora", [False, True])
def test_a_sketch_and_a_projection_are_products_with_the_dense_matrix(d_out: int, d_in: int, rslora: bool) -> None:
    state = adapter(d_out, d_in, 3, rslora=rslora)
    sketches = sketched(state, columns=6, seed=4)
    bases = {f"{layer}.basis": torch.linalg.qr(sketches[f"{layer}.sketch"]).Q for layer in "kq"}
    projections = projected(state, bases)
    for module in state.spec.modules:
        layer, matrix = module.name, dense(state, module.name)
        near(sketches[f"{layer}.sketch"], matrix @ omega(4, module, 6))
        near(projections[f"{layer}.projection"], matrix.T @ bases[f"{layer}.basis"].double())
        found = rebuilt(bases[f"{layer}.basis"], projections[f"{layer}.projection"].double())
        near(found.dense(), matrix)


@shapes
def test_layouts_are_what_is_made(d_out: int, d_in: int) -> None:
    state = adapter(d_out, d_in, 2)
    sketches = sketched(state, columns=7, seed=0)
    assert {one.name: one.shape for one in sketch_layout(state.spec, 7)} == {n: t.shape for n, t in sketches.items()}
    bases = {n.replace("sketch", "basis"): t for n, t in sketches.items()}
    entries = projection_layout(state.spec, bases)
    assert {one.name: one.shape for one in entries} == {n: t.shape for n, t in projected(state, bases).items()}
    assert {one.dtype for one in entries} == {"F32"}


@shapes
def test_the_sum_of_sketches_of_any_ranks_is_the_sketch_of_the_sum(d_out: int, d_in: int) -> None:
    states = [adapter(d_out, d_in, rank, seed=rank) for rank in (1, 2, 3)]
    weights = (0.5, 0.3, 0.2)
    total = sum(
        weight * sketched(state, columns=8, seed=1)["q.sketch"].double()
        for weight, state in zip(weights, states, strict=True)
    )
    matrix = sum(weight * dense(state, "q") for weight, state in zip(weights, states, strict=True))
    near(total, matrix @ omega(1, states[0].spec.modules[1], 8))


@shapes
@pytest.mark.parametrize("columns", [1, 4, 100])
def test_omega_has_orthonormal_columns_and_no_more_than_the_layer_can_use(d_out: int, d_in: int, columns: int) -> None:
    module = ModuleSpec("q", d_in, d_out, 2, 1.0)
    found = omega(3, module, columns)
    count = min(columns, d_out, d_in)
    assert (found.shape, columns_of(module, columns)) == ((d_in, count), count)
    torch.testing.assert_close(found.T @ found, torch.eye(count, dtype=torch.float64))


def test_omega_is_of_its_seed_and_layer() -> None:
    module = ModuleSpec("q", 20, 30, 2, 1.0)
    assert torch.equal(omega(3, module, 5), omega(3, module, 5))
    others = [omega(4, module, 5), omega(3, replace(module, name="k"), 5)]
    assert all(not torch.equal(omega(3, module, 5), other) for other in others)


def test_omega_is_the_same_in_another_process_and_leaves_global_chance_alone() -> None:
    module = ModuleSpec("q", 20, 30, 2, 1.0)
    before = torch.get_rng_state()
    found = omega(3, module, 5)
    assert torch.equal(torch.get_rng_state(), before)
    code = (
        "from federated.manifest import ModuleSpec; from federated.sketches import omega;"
        "print(omega(3, ModuleSpec('q', 20, 30, 2, 1.0), 5).flatten().tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    other = torch.tensor([float(word) for word in done.stdout.strip()[1:-1].split(",")], dtype=torch.float64)
    torch.testing.assert_close(found.flatten(), other, rtol=0, atol=1e-14)


def test_omega_s_span_is_a_fixed_stream_s() -> None:
    """Clients of other versions must draw the same: these numbers may not change."""
    found = omega(0, ModuleSpec("q", 6, 8, 2, 1.0), 1).flatten()
    expected = [
        -0.5017956819315073,
        0.07272990198375423,
        0.7787889740510644,
        0.3168966430057522,
        0.043086384335337936,
        -0.1847140221678103,
    ]
    torch.testing.assert_close(found.abs(), torch.tensor(expected, dtype=torch.float64).abs(), rtol=0, atol=1e-12)


def test_a_basis_rounded_to_float32_or_less_is_made_good() -> None:
    state = adapter(30, 20, 3)
    basis = torch.linalg.qr(sketched(state, columns=5, seed=0)["q.sketch"].double()).Q
    rough = basis.bfloat16().float()
    module = state.spec.modules[1]
    projection = projected(state, {f"{one.name}.basis": rough for one in state.spec.modules})[
        f"{module.name}.projection"
    ]
    found = rebuilt(rough, projection.double()).dense()
    left = torch.linalg.qr(rough.double()).Q
    near(found, left @ left.T @ dense(state, "q"))


def test_a_basis_of_fewer_columns_gives_the_part_over_it() -> None:
    state = adapter(30, 20, 4)
    best = truncate(rebuilt(torch.eye(30), dense(state, "q").T), 2)
    basis = torch.linalg.qr(best.left).Q
    found = rebuilt(basis, dense(state, "q").T @ basis)
    torch.testing.assert_close(found.dense(), best.dense())


@pytest.mark.parametrize(
    ("bases", "found"),
    [
        ({}, "none"),
        ({"k.basis": torch.zeros(4, 2)}, r"shape \(4, 2\)"),
        ({"k.basis": torch.zeros(30)}, r"shape \(30,\)"),
    ],
)
def test_a_basis_that_does_not_fit_is_refused(bases: dict[str, torch.Tensor], found: str) -> None:
    state = adapter(30, 20, 3)
    for call in (lambda: projected(state, bases), lambda: projection_layout(state.spec, bases)):
        with pytest.raises(AggregationError, match=rf"basis of layer k: found {found}, expected 30 rows"):
            call()
