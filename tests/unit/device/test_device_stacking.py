"""One adapter on another: the sum of both, against the dense definition in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from federated.device.stacking import personal_spec, stack, stack_digest
from federated.errors import DeviceError
from federated.manifest import AdapterSpec, HeadSpec, ModuleSpec, RawTensor

HEAD = HeadSpec("mean_pool", 3, trained=True, seed=1)


def spec_of(kind: str = "lora", *, rank: int = 2, alpha: float = 3.0, names: str = "ab", **changes: Any) -> AdapterSpec:
    modules = tuple(ModuleSpec(name, 7, 5, rank, alpha, name == "b") for name in names)
    return replace(AdapterSpec(kind, rank, alpha, False, modules, HEAD), **changes)


def random_tensors(spec: AdapterSpec, seed: int) -> dict[str, RawTensor]:
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"classifier.bias": (3,), "classifier.weight": (3, 7)}
    for one in spec.modules:
        shapes |= {f"{one.name}.factor_a": (one.rank, one.d_in), f"{one.name}.factor_b": (one.d_out, one.rank)}
        if spec.has_core:
            shapes[f"{one.name}.core"] = (one.rank, one.rank)
    return {name: RawTensor.from_array(rng.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()}


def dense(spec: AdapterSpec, tensors: Mapping[str, RawTensor], name: str) -> Any:
    """``scaling * B @ (core @) A`` of a layer in float64; 0 where it has none."""
    module = next((one for one in spec.modules if one.name == name), None)
    if module is None:
        return np.zeros((5, 7))
    factor_a, factor_b = (tensors[f"{name}.{part}"].array.astype(np.float64) for part in ("factor_a", "factor_b"))
    core = tensors[f"{name}.core"].array.astype(np.float64) if spec.has_core else np.eye(module.rank)
    return spec.scaling(module) * factor_b @ core @ factor_a


BELOW = {
    "lora": spec_of(),
    "rslora": spec_of(use_rslora=True, rank=3),
    "core": spec_of("lora_xs", rank=2),
    "bfloat16 spec": spec_of(dtype="BF16"),
    "fewer layers": spec_of(names="a"),
    "too wide together": spec_of(rank=4),
}


@pytest.mark.parametrize("below", BELOW.values(), ids=BELOW.keys())
def test_the_effective_update_is_the_sum_of_both(below: AdapterSpec) -> None:
    above = personal_spec(spec_of(), rank=3, alpha=5.0)
    lower, upper = random_tensors(below, 1), random_tensors(above, 2)
    spec, tensors = stack((below, lower), (above, upper))
    assert (spec.peft_type, spec.head, spec.dtype, [one.name for one in spec.modules]) == (
        "lora",
        HEAD,
        "F32",
        ["a", "b"],
    )
    for module in spec.modules:
        assert module.rank <= 5
        assert tensors[f"{module.name}.factor_a"].shape == (module.rank, 7)
        truth = dense(below, lower, module.name) + dense(above, upper, module.name)
        found = dense(spec, tensors, module.name)
        assert np.linalg.norm(found - truth) <= 1e-6 * np.linalg.norm(truth)
    for name in ("classifier.bias", "classifier.weight"):
        assert np.allclose(tensors[name].array, lower[name].array + upper[name].array, rtol=1e-6)


def test_layers_of_different_ranks_keep_theirs() -> None:
    below = replace(spec_of(), modules=(ModuleSpec("a", 7, 5, 1, 3.0), ModuleSpec("b", 7, 5, 2, 3.0, True)))
    above = personal_spec(below, rank=2, alpha=5.0)
    spec, _ = stack((below, random_tensors(below, 1)), (above, random_tensors(above, 2)))
    assert [one.rank for one in spec.modules] == [3, 4]
    assert (spec.rank, spec.alpha, {spec.scaling(one) for one in spec.modules}) == (4, 4.0, {1.0})


def test_adapters_without_factors_are_added() -> None:
    below = AdapterSpec("ia3", 0, 0.0, False, (), HEAD, dtype="BF16", trained=("v",))
    above = personal_spec(below, rank=4, alpha=8.0)
    assert above == replace(below, dtype="F32")
    lower, upper = ({"v": RawTensor.from_array(np.full(3, x, np.float32))} for x in (1.5, -0.25))
    spec, tensors = stack((below, lower), (above, upper))
    assert spec == above
    assert tensors["v"].array.tolist() == [1.25] * 3


def test_ranks_are_bounded_by_the_layer() -> None:
    spec = personal_spec(spec_of(), rank=64, alpha=1.0)
    assert [(one.rank, one.alpha) for one in spec.modules] == [(5, 1.0), (5, 1.0)]


@pytest.mark.parametrize(
    ("below", "message"),
    [
        (AdapterSpec("ia3", 0, 0.0, False, (), HEAD, trained=("v",)), "cannot stand on one of kind ia3"),
        (spec_of(head=replace(HEAD, num_labels=4)), r"differs in \['head'\]"),
        (spec_of(head=None), r"differs in \['head'\]"),
    ],
)
def test_what_does_not_fit_is_refused(below: AdapterSpec, message: str) -> None:
    above = personal_spec(spec_of(), rank=2, alpha=1.0)
    with pytest.raises(DeviceError, match=message):
        stack((below, random_tensors(below, 1)), (above, random_tensors(above, 2)))


def test_layers_of_other_sizes_are_refused() -> None:
    below = replace(spec_of(names="a"), modules=(ModuleSpec("a", 7, 6, 2, 3.0),))
    above = personal_spec(spec_of(names="a"), rank=2, alpha=1.0)
    with pytest.raises(DeviceError, match="layer a has other sizes"):
        stack((below, random_tensors(below, 1)), (above, random_tensors(above, 2)))


def test_other_tensors_of_another_shape_are_refused() -> None:
    spec = personal_spec(spec_of(), rank=2, alpha=1.0)
    lower, upper = random_tensors(spec, 1), random_tensors(spec, 2)
    upper["classifier.bias"] = RawTensor.from_array(np.zeros(4, np.float32))
    with pytest.raises(DeviceError, match=r"tensor classifier\.bias does not fit"):
        stack((spec, lower), (spec, upper))
    del upper["classifier.bias"]
    with pytest.raises(DeviceError, match=r"tensor classifier\.bias does not fit"):
        stack((spec, lower), (spec, upper))


def test_a_stacks_name_says_what_is_below_and_what_above() -> None:
    assert len({stack_digest("a", "b"), stack_digest("b", "a"), stack_digest("ab", ""), "a", "b"}) == 5
