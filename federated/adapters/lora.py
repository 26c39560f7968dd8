"""LoRA through peft, which is imported here and in `federated.adapters.ia3` alone.

peft only swaps the layers in. What is adapted, at which rank and with which scaling comes from a checked
`AdapterSpec`, never from an ``adapter_config.json``; factors are read and written by exact name here, never through
``set_peft_model_state_dict``, which overwrites base weights when a file carries foreign keys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from federated.adapters.core import CoredLinear, start_factors
from federated.adapters.heads import generator_for
from federated.adapters.quiet import quiet_peft
from federated.errors import ModelError
from federated.manifest import AdapterSpec, ModuleSpec
from federated.state import AdapterState, LoraPair

__all__ = ["Branch", "branch_of", "core_of", "dropouts_of", "factors_of", "inject", "set_rank", "set_residual"]

_ADAPTER, _RESIDUAL = "default", "residual"


def inject(root: nn.Module, spec: AdapterSpec, *, dropout: float, seed: int, core_init: str = "random") -> None:
    """Swap the layers of ``root`` that a spec names for LoRA layers around them, in place.

    ``factor_a`` starts Kaiming-uniform from ``seed`` (as in peft), ``factor_b`` at zero: the adapter starts as nothing.
    With a core, the core starts at zero, and the factors as `federated.adapters.core` says.

    Args:
        root: a shared tree, not the base itself.
        spec: layers, ranks and scaling, checked against the base.
        dropout: on the input of ``factor_a``, in training only.
        seed: seeds the first factors; the global random state is left alone.
        core_init: where the factors around a core come from.

    Raises:
        ModelError: if peft adapted other layers than these, or trains anything but their factors.
    """
    from peft import inject_adapter_in_model

    with quiet_peft(), torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(_peft_config(spec, dropout), root, adapter_name=_ADAPTER)
        _check_injected(root, {module.name for module in spec.modules})
        for module in spec.modules if spec.has_core else ():
            _insert_core(root, module)
    generator = generator_for(seed, "factors")
    for module in sorted(spec.modules, key=lambda one: one.name):
        factor_a, factor_b = factors_of(root, module.name)
        with torch.no_grad():
            if spec.has_core:
                frozen = _weight_of(root, module)
                first = start_factors(frozen, module.rank, init=core_init, generator=generator)
                factor_a.data, factor_b.data = first
            else:
                factor_a.data = _kaiming_uniform(factor_a.shape, generator)
                factor_b.data = torch.zeros(factor_b.shape)


def _insert_core(root: nn.Module, module: ModuleSpec) -> None:
    layer: Any = root.get_submodule(module.name)
    layer.lora_A[_ADAPTER] = CoredLinear(layer.lora_A[_ADAPTER].weight)


def _weight_of(root: nn.Module, module: ModuleSpec) -> torch.Tensor:
    """The frozen layer's weight as d_out x d_in."""
    layer: Any = root.get_submodule(module.name)
    weight: torch.Tensor = layer.get_base_layer().weight
    return weight.T if module.fan_in_fan_out else weight


def _peft_config(spec: AdapterSpec, dropout: float) -> Any:
    from peft import LoraConfig

    def varied(name: str) -> dict[str, Any]:
        common = getattr(spec, name)
        return {f"^{re.escape(m.name)}$": getattr(m, name) for m in spec.modules if getattr(m, name) != common}

    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        use_rslora=spec.use_rslora,
        lora_dropout=dropout,
        target_modules=[module.name for module in spec.modules],
        rank_pattern=varied("rank"),
        alpha_pattern=varied("alpha"),
        fan_in_fan_out=any(module.fan_in_fan_out for module in spec.modules),
        bias="none",
    )


def _check_injected(root: nn.Module, expected: set[str]) -> None:
    found = {name for name, module in root.named_modules() if hasattr(module, "lora_A")}
    if found != expected:
        raise ModelError(
            f"peft adapted {sorted(found - expected)[:3]} besides and left out {sorted(expected - found)[:3]}; "
            "give adapter.target_modules as whole paths"
        )
    stray = [name for name, tensor in root.named_parameters() if tensor.requires_grad and ".lora_" not in name]
    if stray:
        raise ModelError(f"peft left {stray[0]} of the base model trainable; expected LoRA factors only")


def _kaiming_uniform(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)


def factors_of(root: nn.Module, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """``factor_a`` (rank x d_in) and ``factor_b`` (d_out x rank) of an injected layer: the live parameters."""
    layer: Any = root.get_submodule(name)
    return layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight


@dataclass(frozen=True, eq=False)
class Branch:
    """What an adapter adds to one layer: the live modules, for reading.

    Args:
        down: x to ``A x`` (to ``core A x`` where there is a core).
        up: that to ``B A x``.
        scaling: alpha / rank, or what the spec says.
    """

    down: nn.Module
    up: nn.Module
    scaling: float

    def update(self, inputs: torch.Tensor) -> torch.Tensor:
        """``scaling * B A x`` in float32, computed in the same steps as in the layer itself."""
        made: torch.Tensor = self.up(self.down(inputs.float())) * self.scaling
        return made


def branch_of(root: nn.Module, name: str) -> Branch:
    """The branch of an injected layer; a residual is not part of it."""
    layer: Any = root.get_submodule(name)
    return Branch(layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER], layer.scaling[_ADAPTER])


def core_of(root: nn.Module, name: str) -> nn.Parameter:
    """``core`` (rank x rank) of an injected layer that has one: the live parameter."""
    layer: Any = root.get_submodule(name)
    core: nn.Parameter = layer.lora_A[_ADAPTER].core.weight
    return core


def set_rank(root: nn.Module, module: ModuleSpec, scaling: float) -> None:
    """Give an injected layer factors of another rank; their values are not set."""
    layer: Any = root.get_submodule(module.name)
    factor_a, factor_b = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
    factor_a.weight = _zeros_like(factor_a.weight, module.rank, module.d_in)
    factor_b.weight = _zeros_like(factor_b.weight, module.d_out, module.rank)
    if isinstance(factor_a, CoredLinear):
        factor_a.set_core_rank(module.rank)
    factor_a.out_features = factor_b.in_features = layer.r[_ADAPTER] = module.rank
    layer.lora_alpha[_ADAPTER], layer.scaling[_ADAPTER] = module.alpha, scaling


def _zeros_like(weight: nn.Parameter, rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(weight.new_zeros(rows, columns), requires_grad=weight.requires_grad)


def set_residual(root: nn.Module, names: Iterable[str], residual: AdapterState | None) -> None:
    """Add a frozen second adapter to some of the injected layers, in place of the one that was there.

    Args:
        root: an injected tree.
        names: all its adapted layers.
        residual: what is added to their effective updates; layers that it does not have get none.
    """
    pairs = {pair.module.name: pair for pair in residual.pairs()} if residual else {}
    for name in names:
        layer: Any = root.get_submodule(name)
        for part in (layer.lora_A, layer.lora_B, layer.lora_dropout):
            if _RESIDUAL in part:
                del part[_RESIDUAL]
        layer.scaling.pop(_RESIDUAL, None)
        layer._active_adapter = [_ADAPTER]
        if name in pairs:
            _add_residual(layer, pairs[name])


def _add_residual(layer: Any, pair: LoraPair) -> None:
    device = layer.lora_A[_ADAPTER].weight.device
    layer.lora_A[_RESIDUAL] = _frozen(pair.factor_a, device)
    layer.lora_B[_RESIDUAL] = _frozen(pair.factor_b, device)
    layer.lora_dropout[_RESIDUAL] = nn.Identity()
    layer.scaling[_RESIDUAL] = pair.scaling
    layer._active_adapter = [_ADAPTER, _RESIDUAL]


def _frozen(weight: torch.Tensor, device: torch.device) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(device, torch.float32), requires_grad=False)
    return linear.eval()


def dropouts_of(model: nn.Module) -> list[nn.Module]:
    """The adapter's own dropout layers; none where dropout is 0."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Dropout) and "lora_dropout" in name.split(".")
    ]
