"""The adapter's spec: made from a configuration, checked against a base model before anything is allocated.

A spec may come from afar (a version's manifest); whatever it says has to be true of this base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from federated.adapters.base import BaseModel
from federated.adapters.heads import backbone_path
from federated.adapters.kinds import FACTORLESS
from federated.adapters.targets import adaptable, layer_sizes, resolve_targets, stores_transposed
from federated.config import AdapterConfig, TaskConfig
from federated.errors import ModelError
from federated.manifest import AdapterSpec, HeadSpec, ModuleSpec

__all__ = ["check_spec", "check_task", "head_spec", "spec_for"]

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_KINDS = {
    "sequence_classification": ("encoder", "decoder"),
    "causal_lm": ("decoder",),
    "sensor": ("module",),
}
_TYPES = ("lora", "lora_xs")
_MOST_LABELS = 65_536
_FULL_WEIGHTS = ("full", "lora_xs")


def spec_for(base: BaseModel, adapter: AdapterConfig, task: TaskConfig, *, seed: int) -> AdapterSpec:
    """The adapter that a configuration asks for on this base.

    Raises:
        ModelError: if a target matches nothing, a rank is larger than its layer, or the base does not fit the task or
            the kind of adapter.
    """
    check_task(base, task)
    spec = _without_factors(base, adapter, task) if adapter.kind in FACTORLESS else _with_factors(base, adapter, task)
    spec = replace(spec, head=head_spec(task, trained=adapter.train_head, seed=seed), dtype=_DTYPES[adapter.dtype])
    check_spec(base, spec)
    return spec


def _without_factors(base: BaseModel, adapter: AdapterConfig, task: TaskConfig) -> AdapterSpec:
    fields = FACTORLESS[adapter.kind].describe(base, adapter, task)
    return AdapterSpec(adapter.kind, rank=0, alpha=0.0, use_rslora=False, modules=(), **fields)


def _with_factors(base: BaseModel, adapter: AdapterConfig, task: TaskConfig) -> AdapterSpec:
    path = "" if task.name == "causal_lm" else backbone_path(base)
    root = base.model.get_submodule(path)
    layers = adaptable(root)
    modules = [
        ModuleSpec(name, *layer_sizes(layers[name]), adapter.rank, adapter.alpha, stores_transposed(layers[name]))
        for name in resolve_targets(root, adapter.target_modules)
    ]
    return AdapterSpec(
        peft_type=adapter.kind,
        rank=adapter.rank,
        alpha=adapter.alpha,
        use_rslora=adapter.use_rslora,
        modules=tuple(replace(module, name=f"{path}.{module.name}" if path else module.name) for module in modules),
    )


def check_task(base: BaseModel, task: TaskConfig) -> None:
    """Refuse a base that cannot do a task.

    Raises:
        ModelError: naming both.
    """
    if base.kind not in _KINDS[task.name]:
        raise ModelError(
            f"task {task.name} needs a base model of kind {' or '.join(_KINDS[task.name])}; "
            f"{base.source} ({type(base.model).__name__}) is of kind {base.kind}"
        )


def head_spec(task: TaskConfig, *, trained: bool, seed: int) -> HeadSpec | None:
    """The head that a task needs; None for language models, which bring their own."""
    if task.name == "causal_lm":
        return None
    return HeadSpec(kind=task.head, num_labels=len(task.labels), trained=trained, seed=seed)


def check_spec(base: BaseModel, spec: AdapterSpec) -> None:
    """Check a spec and all that it names against the base: known kinds, the layers' sizes, ranks that they can have.

    Raises:
        ModelError: naming the first thing that does not fit.
    """
    if spec.peft_type not in _TYPES and spec.peft_type not in FACTORLESS:
        known = ", ".join(sorted([*_TYPES, *FACTORLESS]))
        raise ModelError(f"adapter type {spec.peft_type!r} is unknown; expected one of {known}")
    if spec.dtype not in _DTYPES.values():
        raise ModelError(f"adapter dtype {spec.dtype!r} is unknown; expected one of {sorted(_DTYPES.values())}")
    if spec.head is not None and not 1 <= spec.head.num_labels <= _MOST_LABELS:
        raise ModelError(f"head.num_labels is {spec.head.num_labels}; expected 1 to {_MOST_LABELS}")
    _check_fields(spec)
    if base.quantization is not None and spec.peft_type in _FULL_WEIGHTS:
        raise ModelError(
            f"an adapter of kind {spec.peft_type} reads the base's full weights, and {base.source} is quantised "
            f"({base.quantization}); use adapter=lora, or set model.quantization=none"
        )
    if spec.peft_type in FACTORLESS:
        FACTORLESS[spec.peft_type].check(base, spec)
        return
    _check_names(spec.modules)
    layers = adaptable(base.model)
    for module in spec.modules:
        _check_module(layers.get(module.name), module)


def _check_fields(spec: AdapterSpec) -> None:
    """A kind's spec says nothing about what only other kinds have: one adapter has one spec."""
    kind = FACTORLESS.get(spec.peft_type)
    unused = ["trained", "virtual_tokens"] + (["rank", "alpha", "use_rslora", "modules"] if kind else [])
    for name in unused:
        if getattr(spec, name) and name not in (kind.fields if kind else ()):
            raise ModelError(f"an adapter of kind {spec.peft_type} has no {name}; found some in its spec")


def _check_names(modules: Sequence[ModuleSpec]) -> None:
    names = [module.name for module in modules]
    if not names:
        raise ModelError("the adapter adapts no layer; expected at least one module in its spec")
    if len(set(names)) < len(names):
        raise ModelError("the adapter's spec names a layer twice; expected each layer once")


def _check_module(layer: nn.Module | None, module: ModuleSpec) -> None:
    if layer is None:
        raise ModelError(f"the adapter is for a layer {module.name}, which this base model does not have")
    found = (*layer_sizes(layer), stores_transposed(layer))
    if found != (module.d_in, module.d_out, module.fan_in_fan_out):
        raise ModelError(
            f"layer {module.name}: the adapter expects {module.d_in} -> {module.d_out} (transposed: "
            f"{module.fan_in_fan_out}), the base model has {found[0]} -> {found[1]} (transposed: {found[2]})"
        )
    smallest = min(module.d_in, module.d_out)
    if not 1 <= module.rank <= smallest:
        raise ModelError(
            f"rank {module.rank} is larger than layer {module.name} ({module.d_in} -> {module.d_out}) allows; "
            f"set adapter.rank to between 1 and {smallest}"
        )
    if not (math.isfinite(module.alpha) and module.alpha > 0):
        raise ModelError(f"layer {module.name}: alpha is {module.alpha}; expected a positive number")
