"""The adapted model: a module tree of its own over the base model's tensors.

`attach` never touches the base: it copies the module tree, which is a few hundred objects, and shares every
parameter and buffer with it, but for those that the adapter itself trains, as copies. So many adapted trees (a device's
slots, several clients) and the null model live beside each other, each costing only its adapter.

Trainable tensors are float32 in the tree whatever the spec's dtype: an optimizer's small steps would vanish in
bfloat16. `AdapterModel.read` casts to the spec's dtype, `AdapterModel.masters` does not.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import nn

from federated.adapters.base import BaseModel
from federated.adapters.heads import build_head
from federated.adapters.kinds import FACTORLESS
from federated.adapters.lora import Branch, branch_of, core_of, dropouts_of, factors_of, inject, set_rank, set_residual
from federated.adapters.spec import check_spec, check_task, head_spec, spec_for
from federated.config import AdapterConfig, TaskConfig
from federated.errors import ModelError
from federated.manifest import AdapterSpec
from federated.state import AdapterState, group_of

__all__ = ["AdapterModel", "attach", "null_model", "shell", "share"]

_TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
GROUPS = ("factor_a", "factor_b", "core", "dense")


def share(base: BaseModel) -> nn.Module:
    """A module tree like the base's, over the very same parameters and buffers."""
    tensors = [*base.model.parameters(), *base.model.buffers()]
    return copy.deepcopy(base.model, {id(tensor): tensor for tensor in tensors})


class AdapterModel:
    """A base model with one adapter, ready to train or to answer.

    Attributes:
        model: takes a task's batch; logits for classification, a transformers output for language models.
        spec: the adapter's algebra.
        base: the untouched base model.
    """

    def __init__(
        self, model: nn.Module, spec: AdapterSpec, base: BaseModel, tensors: dict[str, nn.Parameter], *, tree: nn.Module
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.spec = spec
        self.base = base
        self._tensors = {name: tensors[name] for name in sorted(tensors)}
        self._tree = tree  # where the spec's layer names start
        self._residual: AdapterState | None = None
        self._dropouts = dropouts_of(model)
        self._modules = list(model.modules())
        self.set_trainable(spec.groups)

    @property
    def device(self) -> torch.device:
        """Where the adapter's tensors are."""
        return next(iter(self._tensors.values())).device

    def trainable(self, groups: Sequence[str] = GROUPS) -> dict[str, nn.Parameter]:
        """The live parameters of some groups by canonical name, sorted."""
        return {name: tensor for name, tensor in self._tensors.items() if group_of(name) in groups}

    def set_trainable(self, groups: Sequence[str]) -> None:
        """Let gradients reach these groups and nothing else.

        Raises:
            ModelError: if a group is unknown, or no tensor is in any of them.
        """
        unknown = [group for group in groups if group not in GROUPS]
        if unknown or not self.trainable(groups):
            raise ModelError(f"nothing to train in groups {list(groups)}; expected some of {list(GROUPS)}")
        for name, tensor in self._tensors.items():
            tensor.requires_grad_(group_of(name) in groups)

    @property
    def has_dropout(self) -> bool:
        """Whether the adapter has dropout layers of its own."""
        return bool(self._dropouts)

    def set_dropout(self, active: bool) -> None:
        """Switch the adapter's own dropout; everything else, the base's dropout included, stays in eval mode."""
        if active and any(module.training for module in self._modules):  # whatever else somebody switched on
            self.model.eval()
        for layer in self._dropouts:
            layer.train(active)

    def masters(self) -> dict[str, torch.Tensor]:
        """Copies of the adapter's tensors in float32, on the CPU."""
        return {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in self._tensors.items()}

    def read(self) -> AdapterState:
        """A copy of the adapter in the spec's dtype, on the CPU; the residual is shared."""
        return AdapterState(self.spec, self.masters(), residual=self._residual).cast(self.spec.dtype)

    def write(self, state: AdapterState) -> None:
        """Copy an adapter into the model, its residual included; all of it, or nothing when it does not fit.

        Args:
            state: the same spec but for its ranks, which the model takes over, and exactly the names and shapes that
                it says; float32 or the spec's dtype. The residual's tensors are not copied: they are only read.

        Raises:
            ModelError: naming what differs.
        """
        self._check(state)
        if state.spec != self.spec:
            self._take_ranks(state.spec)
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(state.tensors[name])
        if state.residual is not self._residual:
            set_residual(self._tree, [module.name for module in self.spec.modules], state.residual)
            self._residual = state.residual
            self._modules = list(self.model.modules())

    def _take_ranks(self, spec: AdapterSpec) -> None:
        for module in spec.modules:
            set_rank(self._tree, module, spec.scaling(module))
        self.spec = spec
        self._tensors |= _factors(self._tree, spec)

    def _check(self, state: AdapterState) -> None:
        if state.spec != self.spec:
            if state.spec.with_rank(1) != self.spec.with_rank(1):
                odd = _difference(state.spec, self.spec)
                raise ModelError(f"the adapter's spec differs in {odd} from this model's")
            check_spec(self.base, state.spec)
        if state.residual is not None and state.residual is not self._residual:
            _check_residual(self.base, state)
        missing = sorted(self._tensors.keys() - state.tensors.keys())
        extra = sorted(state.tensors.keys() - self._tensors.keys())
        if missing or extra:
            raise ModelError(f"adapter tensors do not fit: missing {missing[:3]}, unexpected {extra[:3]}")
        allowed = (torch.float32, _TORCH[self.spec.dtype])
        shapes = _shapes(state.spec)
        for name, tensor in self._tensors.items():
            given, shape = state.tensors[name], shapes.get(name, tuple(tensor.shape))
            if given.shape != shape or given.dtype not in allowed:
                raise ModelError(
                    f"adapter tensor {name}: found {given.dtype} {tuple(given.shape)}, expected {allowed[-1]} {shape}"
                )

    @cached_property
    def branches(self) -> Mapping[str, Branch]:
        """What the adapter adds to each layer that has factors, by the layer's name; its residual is left out."""
        return {module.name: branch_of(self._tree, module.name) for module in self.spec.modules}

    def replace_layer(self, name: str, layer: nn.Module) -> None:
        """Put another layer in the place of an adapted one, in this tree alone; the adapter is not trained after that.

        Args:
            name: the layer's path in the base model.
            layer: takes and returns what the base's does.
        """
        parent, _, last = name.rpartition(".")
        self._tree.get_submodule(parent)._modules[last] = layer

    def to(self, device: torch.device | str) -> AdapterModel:
        """Move this tree to a device; the base keeps its own tensors where they are.

        Returns:
            This model.
        """
        target = torch.device(device)
        if target.type != self.device.type or target.index not in (None, self.device.index):
            moved = _move(self.model, target)
            self._tensors = {name: moved[id(tensor)] for name, tensor in self._tensors.items()}
        return self


def _factors(tree: nn.Module, spec: AdapterSpec) -> dict[str, nn.Parameter]:
    """The live factors and cores of a tree by canonical name."""
    tensors: dict[str, nn.Parameter] = {}
    for module in spec.modules:
        factor_a, factor_b = factors_of(tree, module.name)
        tensors |= {f"{module.name}.factor_a": factor_a, f"{module.name}.factor_b": factor_b}
        if spec.has_core:
            tensors[f"{module.name}.core"] = core_of(tree, module.name)
    return tensors


def _shapes(spec: AdapterSpec) -> dict[str, tuple[int, int]]:
    """The factors' and cores' shapes by canonical name."""
    shapes = {f"{one.name}.factor_a": (one.rank, one.d_in) for one in spec.modules}
    shapes |= {f"{one.name}.core": (one.rank, one.rank) for one in spec.modules if spec.has_core}
    return shapes | {f"{one.name}.factor_b": (one.d_out, one.rank) for one in spec.modules}


def _check_residual(base: BaseModel, state: AdapterState) -> None:
    """A residual may come from afar, too."""
    residual = state.residual
    if residual is None:
        return
    check_spec(base, residual.spec)
    if residual.spec.peft_type != "lora":
        raise ModelError(f"a residual is a sum of products; found one of kind {residual.spec.peft_type}")
    strange = {module.name for module in residual.spec.modules} - {module.name for module in state.spec.modules}
    if strange:
        raise ModelError(f"the residual adapts {min(strange)}, which the adapter beside it does not")
    shapes = _shapes(residual.spec)
    if {name: tuple(tensor.shape) for name, tensor in residual.tensors.items()} != shapes:
        raise ModelError("the residual's tensors do not have the names and shapes that its spec says")


def _difference(found: AdapterSpec, expected: AdapterSpec) -> str:
    for name in ("peft_type", "alpha", "use_rslora", "dtype", "head", "trained", "virtual_tokens"):
        if getattr(found, name) != getattr(expected, name):
            return f"{name} (found {getattr(found, name)}, expected {getattr(expected, name)})"
    return "its adapted layers"


def _move(model: nn.Module, device: torch.device) -> dict[int, nn.Parameter]:
    """Replace every tensor of a tree by its copy on ``device``: `Module.to` would move shared ones."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                if id(tensor) not in moved:
                    moved[id(tensor)] = nn.Parameter(tensor.detach().to(device), requires_grad=tensor.requires_grad)
                module._parameters[name] = moved[id(tensor)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return moved


def attach(base: BaseModel, adapter: AdapterConfig, task: TaskConfig, *, seed: int) -> AdapterModel:
    """Put a new adapter on a base model; the base is not changed.

    It starts as nothing, so its first answers are the null model's; a soft prompt and a prefix alone start as words in
    front of each text, and answer differently.

    Args:
        base: shared, frozen.
        adapter: kind, rank, scaling, targets.
        task: decides the head.
        seed: seeds the first factors, the words of a prompt or prefix, and the head.

    Raises:
        ModelError: if the adapter does not fit the base (see `spec_for`).
    """
    spec = spec_for(base, adapter, task, seed=seed)
    return shell(base, spec, dropout=adapter.dropout, seed=seed, core_init=adapter.core_init)


def shell(
    base: BaseModel, spec: AdapterSpec, *, dropout: float = 0.0, seed: int = 0, core_init: str = "random"
) -> AdapterModel:
    """An adapted tree for a spec, to be filled with `AdapterModel.write`: a device's slot.

    Raises:
        ModelError: if the spec does not fit the base (see `check_spec`).
    """
    check_spec(base, spec)
    tree = share(base)
    if spec.peft_type in FACTORLESS:
        tensors = FACTORLESS[spec.peft_type].install(base, tree, spec)
    else:
        inject(tree, spec, dropout=dropout, seed=seed, core_init=core_init)
        tensors = _factors(tree, spec)
    model, head = (tree, {}) if spec.head is None else build_head(base, tree, spec.head)
    if spec.virtual_tokens:
        model, around = FACTORLESS[spec.peft_type].surround(base, model, tokens=spec.virtual_tokens, seed=seed)
        tensors |= around
    if spec.head is not None and spec.head.trained:
        _check_apart(base, tensors, head)
        tensors |= head
    return AdapterModel(model, spec, base, tensors, tree=tree)


def _check_apart(base: BaseModel, tensors: dict[str, nn.Parameter], head: dict[str, nn.Parameter]) -> None:
    both = sorted(tensors.keys() & head.keys())
    if both:
        raise ModelError(f"{base.source} has a tensor {both[0]}, and so has the task's head; rename it in the base")


def null_model(base: BaseModel, task: TaskConfig, *, seed: int) -> nn.Module:
    """The model without any adapter: the base, and for classification a head as it starts.

    Its answers are bit-equal to those of a fresh adapter with the same seed. For language models it is the base itself.

    Raises:
        ModelError: if the base does not fit the task.
    """
    check_task(base, task)
    head = head_spec(task, trained=False, seed=seed)
    if head is None:
        return base.model
    model, _ = build_head(base, share(base), head)
    return model.eval().requires_grad_(False)
