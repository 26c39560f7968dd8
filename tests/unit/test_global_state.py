"""The server's adapter: what a client is given at its rank, what a device is given, and the residual in both."""

from dataclasses import replace

import pytest
import torch

from federated.errors import AggregationError
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, HeadSpec, ModuleSpec
from federated.state import AdapterState, RuleState, to_raw
from federated.testing import effective_of

MODULES = (ModuleSpec("layer.k", 3, 2, 2, 8.0), ModuleSpec("layer.q", 4, 5, 2, 8.0, fan_in_fan_out=True))
SPEC = AdapterSpec("lora", 2, 8.0, use_rslora=False, modules=MODULES, head=HeadSpec("mean_pool", 2, True, 0))


def drawn(modules, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"{one.name}.factor_a": torch.randn(one.rank, one.d_in, generator=generator) for one in modules}
    return tensors | {f"{one.name}.factor_b": torch.randn(one.d_out, one.rank, generator=generator) for one in modules}


def adapter(spec: AdapterSpec = SPEC) -> AdapterState:
    return AdapterState(spec, {**drawn(spec.modules, 1), "head.weight": torch.full((2, 5), 1 / 3)})


def residual() -> AdapterState:
    """Of one layer, at another rank."""
    modules = (replace(MODULES[1], rank=3, alpha=3.0),)
    return AdapterState(AdapterSpec("lora", 3, 3.0, use_rslora=False, modules=modules), drawn(modules, 2))


def close(found: AdapterState, expected: AdapterState, tolerance: float) -> None:
    for name, matrix in effective_of(expected).items():
        assert float((effective_of(found)[name] - matrix).norm()) <= tolerance * float(matrix.norm())


class TestMaterialise:
    @pytest.mark.parametrize("rank", [None, 2])
    def test_a_client_gets_the_spec_s_dtype_and_the_residual_as_it_is(self, rank: int | None):
        spec, beside = replace(SPEC, dtype="F16"), residual()
        given = GlobalState(adapter(spec), beside).materialise(rank)
        assert {tensor.dtype for tensor in given.tensors.values()} == {torch.float16}
        assert given.spec == spec
        assert given.residual is beside
        assert {tensor.dtype for tensor in given.residual.tensors.values()} == {torch.float32}

    def test_at_a_smaller_rank_it_is_the_closest_adapter(self):
        given = GlobalState(adapter(), residual()).materialise(1)
        assert given.spec == SPEC.with_rank(1)
        for name, matrix in effective_of(adapter()).items():
            alone = effective_of(replace(given, residual=None))[name]
            missed = float(torch.linalg.svdvals(matrix)[1])
            assert float((alone - matrix).norm()) == pytest.approx(missed, rel=1e-5)

    @pytest.mark.parametrize("rank", [0, -2, 3])
    def test_another_rank_is_refused(self, rank: int):
        with pytest.raises(AggregationError, match=f"rank {rank} was asked of an adapter of rank 2"):
            GlobalState(adapter()).materialise(rank)

    def test_the_server_s_own_copy_stays_float32(self):
        world = GlobalState(adapter(replace(SPEC, dtype="BF16")))
        world.materialise(1)
        assert {tensor.dtype for tensor in world.adapter.tensors.values()} == {torch.float32}


class TestExport:
    def test_without_a_residual_a_device_gets_what_a_client_gets(self):
        world = GlobalState(adapter(replace(SPEC, dtype="BF16")))
        assert to_raw(world.export().tensors) == to_raw(world.materialise().tensors)
        assert world.export().spec == world.adapter.spec

    @pytest.mark.parametrize(("dtype", "tolerance"), [("F32", 1e-6), ("F16", 2.0**-9), ("BF16", 2.0**-6)])
    def test_with_one_it_is_a_plain_adapter_of_the_same_weights(self, dtype: str, tolerance: float):
        world = GlobalState(adapter(replace(SPEC, dtype=dtype)), residual())
        made = world.export()
        assert made.residual is None
        assert [one.rank for one in made.spec.modules] == [2, 4]
        assert made.spec.dtype == dtype
        close(made, world.materialise(), tolerance)
        assert torch.equal(made.tensors["head.weight"], world.materialise().tensors["head.weight"])
        assert {tensor.dtype for tensor in made.tensors.values()} == {
            tensor.dtype for tensor in world.materialise().tensors.values()
        }

    def test_nothing_extra_leaves(self):
        world = GlobalState(replace(adapter(), extra={"control": torch.ones(1)}))
        assert world.materialise().extra
        assert not world.export().extra


def test_a_rule_s_memory_starts_empty() -> None:
    assert GlobalState(adapter()).rule_state == RuleState({}, {})
    assert GlobalState(adapter()).residual is None
