"""One adapter on top of another, as one plain adapter that any backend can build. Arithmetic only, no torch.

    W + s_1 B_1 A_1 + s_2 B_2 A_2  =  W + [s_1 B_1, s_2 B_2] [A_1; A_2]

Factors are put side by side; where their ranks together pass the layer's smaller side, the product itself stands beside
an identity. Other tensors (a head's, vectors of IA3, norms) are added: the upper adapter holds differences there. All
is computed in float64 and cast once to float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from federated.errors import DeviceError
from federated.manifest import AdapterSpec, ModuleSpec, RawTensor, digest_of

__all__ = ["personal_spec", "stack", "stack_digest"]

Tensors = Mapping[str, RawTensor]
_Array = npt.NDArray[np.float64]


def personal_spec(spec: AdapterSpec, *, rank: int, alpha: float) -> AdapterSpec:
    """What is trained on top of an adapter: plain LoRA on the same layers, or the same tensors where there are none.

    Args:
        spec: of the adapter below.
        rank: of the factors, bounded by each layer's smaller side.
        alpha: of all layers.
    """
    if not spec.modules:
        return replace(spec, dtype="F32")
    modules = tuple(
        ModuleSpec(one.name, one.d_in, one.d_out, min(rank, one.d_in, one.d_out), alpha, one.fan_in_fan_out)
        for one in spec.modules
    )
    return AdapterSpec("lora", rank, alpha, use_rslora=False, modules=modules, head=spec.head)


def stack_digest(below: str, above: str) -> str:
    """Name of the slot of one adapter on another, by the digests of their weights."""
    return digest_of(["stack", below, above])


def stack(
    below: tuple[AdapterSpec, Tensors], above: tuple[AdapterSpec, Tensors]
) -> tuple[AdapterSpec, dict[str, RawTensor]]:
    """The plain adapter whose effective update is the sum of both.

    Args:
        below: spec and tensors of the global adapter.
        above: spec and tensors of the personal one, from `personal_spec`.

    Returns:
        Spec and float32 tensors; factors have scaling 1.

    Raises:
        DeviceError: if the two are not for the same layers' sizes, head and other tensors.
    """
    spec = _joint_spec(below[0], above[0])
    tensors = _sums(_dense(below), _dense(above))
    modules = []
    for name in sorted({one.name for one in (*below[0].modules, *above[0].modules)}):
        parts = [part for part in (_part(one, name) for one in (below, above)) if part is not None]
        module, factor_a, factor_b = _side_by_side(parts)
        modules.append(module)
        tensors |= {f"{name}.factor_a": _raw(factor_a), f"{name}.factor_b": _raw(factor_b)}
    if modules:
        rank = max(one.rank for one in modules)
        spec = replace(spec, rank=rank, alpha=float(rank), modules=tuple(modules))
    return spec, tensors


def _joint_spec(below: AdapterSpec, above: AdapterSpec) -> AdapterSpec:
    whole = replace(above, dtype="F32", use_rslora=False)
    kinds = ("lora", "lora_xs") if above.modules else (above.peft_type,)
    same = ("head", "trained", "virtual_tokens")
    odd = [name for name in same if getattr(below, name) != getattr(above, name)]
    if below.peft_type not in kinds or odd:
        raise DeviceError(
            f"a personal adapter of kind {above.peft_type} cannot stand on one of kind {below.peft_type} that differs "
            f"in {odd or ['kind']}; train it anew on that version"
        )
    return whole


def _dense(adapter: tuple[AdapterSpec, Tensors]) -> dict[str, _Array]:
    factors = {f"{one.name}.{part}" for one in adapter[0].modules for part in ("factor_a", "factor_b", "core")}
    return {name: raw.array.astype(np.float64) for name, raw in adapter[1].items() if name not in factors}


def _sums(below: Mapping[str, _Array], above: Mapping[str, _Array]) -> dict[str, RawTensor]:
    shapes = [{name: array.shape for name, array in one.items()} for one in (below, above)]
    if shapes[0] != shapes[1]:
        odd = min(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        raise DeviceError(f"the personal adapter's tensor {odd} does not fit the version below; train it anew there")
    return {name: _raw(below[name] + above[name]) for name in below}


def _part(adapter: tuple[AdapterSpec, Tensors], name: str) -> tuple[ModuleSpec, _Array, _Array] | None:
    """A layer's factors in float64, the core folded into A, the scaling into B."""
    spec, tensors = adapter
    module = next((one for one in spec.modules if one.name == name), None)
    if module is None:
        return None
    factor_a, factor_b = (tensors[f"{name}.{part}"].array.astype(np.float64) for part in ("factor_a", "factor_b"))
    if spec.has_core:
        factor_a = tensors[f"{name}.core"].array.astype(np.float64) @ factor_a
    return module, factor_a, spec.scaling(module) * factor_b


def _side_by_side(parts: list[tuple[ModuleSpec, _Array, _Array]]) -> tuple[ModuleSpec, _Array, _Array]:
    modules = [module for module, _, _ in parts]
    sizes = {(one.d_in, one.d_out, one.fan_in_fan_out) for one in modules}
    if len(sizes) > 1:
        raise DeviceError(f"layer {modules[0].name} has other sizes in the personal adapter; train it anew")
    factor_a = np.concatenate([one for _, one, _ in parts])
    factor_b = np.concatenate([one for _, _, one in parts], axis=1)
    smallest = min(modules[0].d_in, modules[0].d_out)
    if len(factor_a) > smallest:
        product = factor_b @ factor_a
        wide = product.shape[0] == smallest
        factor_a, factor_b = (product, np.eye(smallest)) if wide else (np.eye(smallest), product)
    rank = len(factor_a)
    return replace(modules[0], rank=rank, alpha=float(rank)), factor_a, factor_b


def _raw(array: npt.NDArray[Any]) -> RawTensor:
    return RawTensor.from_array(np.ascontiguousarray(array, dtype=np.float32))
