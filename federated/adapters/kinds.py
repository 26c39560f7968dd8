"""The kinds of adapter: what each one trains on a base, what its spec may say, and how it is put on a tree.

A kind without factors trains tensors of the "dense" group only, which average as they are. This is the one place
that tells kinds apart; `federated.adapters.spec` asks it for specs, `federated.adapters.model` for live tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from federated.adapters.base import BaseModel
from federated.adapters.copies import all_tensors, check_copies, norm_tensors, own_copies
from federated.adapters.heads import backbone_path
from federated.adapters.ia3 import check_ia3, ia3_tensors, inject_ia3
from federated.adapters.prefix import check_prefix, with_prefix
from federated.adapters.prompt import check_prompt, most_positions, with_prompt
from federated.config import AdapterConfig, TaskConfig
from federated.errors import ModelError
from federated.manifest import AdapterSpec

__all__ = ["FACTORLESS", "Factorless"]

Live = dict[str, nn.Parameter]
"""Tensors that are trained, by canonical name."""


def _no_tensors(base: BaseModel, tree: nn.Module, spec: AdapterSpec) -> Live:  # noqa: ARG001
    """A head, a prompt or a prefix goes around the tree, not into it."""
    return {}


def _nothing_around(base: BaseModel, model: nn.Module, *, tokens: int, seed: int) -> tuple[nn.Module, Live]:  # noqa: ARG001
    return model, {}


@dataclass(frozen=True)
class Factorless:
    """One kind of adapter without factors.

    Args:
        describe: the fields of its spec that a configuration decides.
        check: refuses a spec that is not true of the base.
        install: puts it on a shared tree, and returns the live tensors by name.
        fields: of a spec, those that it uses besides head and dtype.
        surround: puts it around the whole model, head included (``tokens`` long, first values by ``seed``), and returns
            the model to use from now on with the live tensors by name.
    """

    describe: Callable[[BaseModel, AdapterConfig, TaskConfig], Mapping[str, Any]]
    check: Callable[[BaseModel, AdapterSpec], None]
    install: Callable[[BaseModel, nn.Module, AdapterSpec], Live]
    fields: tuple[str, ...] = ()
    surround: Callable[..., tuple[nn.Module, Live]] = _nothing_around


def _headed(task: TaskConfig) -> bool:
    return task.name != "causal_lm"


def _ia3(base: BaseModel, adapter: AdapterConfig, task: TaskConfig) -> Mapping[str, Any]:
    path = backbone_path(base) if _headed(task) else ""
    names = ia3_tensors(base.model.get_submodule(path), adapter.target_modules)
    return {"trained": tuple(f"{path}.{name}" if path else name for name in names)}


def _norms(base: BaseModel, adapter: AdapterConfig, task: TaskConfig) -> Mapping[str, Any]:  # noqa: ARG001
    return {"trained": norm_tensors(base, headed=_headed(task))}


def _check_norms(base: BaseModel, spec: AdapterSpec) -> None:
    known = norm_tensors(base, headed=spec.head is not None)
    strange = [name for name in spec.trained if name not in known]
    if strange or not spec.trained or len(set(spec.trained)) < len(spec.trained):
        found = strange[0] if strange else f"{len(spec.trained)} names"
        raise ModelError(f"the adapter trains {found}; expected weights and biases of norms, such as {known[0]}")
    check_copies(base, spec, spec.trained)


def _head(base: BaseModel, adapter: AdapterConfig, task: TaskConfig) -> Mapping[str, Any]:  # noqa: ARG001
    return {}


def _check_head(base: BaseModel, spec: AdapterSpec) -> None:  # noqa: ARG001
    if spec.head is None or not spec.head.trained:
        found = "has no head: it is for causal_lm" if spec.head is None else "has a frozen head"
        raise ModelError(
            f"an adapter of kind head trains the task's head alone, and this one {found}; choose another adapter, or a "
            "task with labels and adapter.train_head=true"
        )


def _full(base: BaseModel, adapter: AdapterConfig, task: TaskConfig) -> Mapping[str, Any]:
    names = all_tensors(base, headed=_headed(task))
    count = sum(base.model.get_parameter(name).numel() for name in names)
    if count > adapter.max_params:
        raise ModelError(
            f"adapter.kind = full would train and send all {count:,} parameters of {base.source}, more than "
            f"adapter.max_params = {adapter.max_params:,}; train an adapter, such as adapter=lora, or allow it with "
            f"adapter.max_params={count}"
        )
    return {}


def _check_full(base: BaseModel, spec: AdapterSpec) -> None:
    check_copies(base, spec, all_tensors(base, headed=spec.head is not None))


def _virtual(base: BaseModel, adapter: AdapterConfig, task: TaskConfig) -> Mapping[str, Any]:
    most = most_positions(base)
    if adapter.virtual_tokens + task.max_length > most:
        raise ModelError(
            f"adapter.virtual_tokens = {adapter.virtual_tokens} and task.max_length = {task.max_length} pass the "
            f"{most} positions of {base.source}; set task.max_length to at most {most - adapter.virtual_tokens}"
        )
    return {"virtual_tokens": adapter.virtual_tokens}


FACTORLESS: Mapping[str, Factorless] = {
    "full": Factorless(
        _full,
        _check_full,
        lambda base, tree, spec: own_copies(tree, all_tensors(base, headed=spec.head is not None)),
    ),
    "head": Factorless(_head, _check_head, _no_tensors),
    "ia3": Factorless(
        _ia3,
        lambda base, spec: check_ia3(base.model, spec.trained),
        lambda base, tree, spec: inject_ia3(tree, spec),  # noqa: ARG005
        fields=("trained",),
    ),
    "layernorm": Factorless(
        _norms,
        _check_norms,
        lambda base, tree, spec: own_copies(tree, spec.trained),  # noqa: ARG005
        fields=("trained",),
    ),
    "prefix": Factorless(_virtual, check_prefix, _no_tensors, ("virtual_tokens",), with_prefix),
    "prompt": Factorless(_virtual, check_prompt, _no_tensors, ("virtual_tokens",), with_prompt),
}
"""By `AdapterSpec.peft_type`; the one kind with factors, ``lora``, is `federated.adapters.lora`."""
