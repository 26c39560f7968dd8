"""The adapter as tensors, as a client or device holds it; the server's is `federated.global_state`.

Pure tensors on the CPU, named canonically: ``<module>.factor_a`` (rank x d_in), ``<module>.factor_b``
(d_out x rank), ``<module>.core`` (rank x rank) where the adapter has one, and every other trainable tensor (head,
norms, biases: "dense") under its path in the base model. Knows no peft, no files and no network:
`federated.adapters` reads and writes models, `federated.wire` bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from federated.errors import AggregationError
from federated.manifest import AdapterSpec, ModuleSpec, RawTensor, TensorEntry, TensorLayout, layout_of

__all__ = [
    "AdapterState",
    "LoraPair",
    "RuleState",
    "Tensors",
    "from_raw",
    "group_of",
    "to_raw",
]

Tensors = Mapping[str, Tensor]

_TORCH: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _TORCH.items()}


def to_raw(tensors: Tensors) -> dict[str, RawTensor]:
    """Copy tensors out as bytes, bit for bit (bfloat16 included).

    Raises:
        AggregationError: for a dtype that cannot travel.
    """
    return {name: _raw(name, tensors[name]) for name in sorted(tensors)}


def _raw(name: str, tensor: Tensor) -> RawTensor:
    if tensor.dtype not in _NAMES:
        raise AggregationError(f"tensor {name} has dtype {tensor.dtype}; expected one of {sorted(_TORCH)}")
    plain = tensor.detach().cpu().contiguous()
    bits = plain.view(torch.int16) if tensor.dtype == torch.bfloat16 else plain
    return RawTensor(_NAMES[tensor.dtype], tuple(tensor.shape), bits.numpy().tobytes())


def from_raw(tensors: Mapping[str, RawTensor]) -> dict[str, Tensor]:
    """Copy bytes back into new tensors, bit for bit."""
    made: dict[str, Tensor] = {}
    for name in sorted(tensors):
        raw = tensors[name]
        bits = np.array(raw.bits, dtype=np.int16 if raw.dtype == "BF16" else None, copy=True)
        tensor = torch.from_numpy(bits)
        made[name] = tensor.view(torch.bfloat16) if raw.dtype == "BF16" else tensor
    return made


class LoraPair(NamedTuple):
    """One adapted layer's factors: ``factor_a`` (rank x d_in), ``factor_b`` (d_out x rank), and their scaling.

    A core is multiplied into ``factor_a``.
    """

    module: ModuleSpec
    factor_a: Tensor
    factor_b: Tensor
    scaling: float


def group_of(name: str) -> str:
    """The group of a tensor: ``"factor_a"``, ``"factor_b"``, ``"core"`` or ``"dense"``.

    >>> group_of("encoder.layer.0.query.factor_a"), group_of("head.weight")
    ('factor_a', 'dense')
    """
    tail = name.rsplit(".", 1)[-1]
    return tail if tail in ("factor_a", "factor_b", "core") else "dense"


@dataclass(frozen=True)
class AdapterState:
    """An adapter's tensors together with the algebra that gives them meaning.

    Args:
        spec: ranks, alpha, scaling, adapted layers.
        tensors: canonical name to CPU tensor.
        residual: a second, frozen adapter whose effective update is added to this one's (FLoRA, FedEx-LoRA), float32;
            it may leave layers out, and has a rank of its own in each; None where unused.
        extra: further tensors that a rule sends along for a client's training; never part of a version.
    """

    spec: AdapterSpec
    tensors: Tensors
    residual: AdapterState | None = None
    extra: Tensors = field(default_factory=dict)

    def pairs(self) -> Iterator[LoraPair]:
        """Each adapted layer's factors with their scaling, in the order of the spec.

        Tensors are not copied, but where there is a core: ``factor_a`` is then ``core @ factor_a``, float64.
        """
        for module in self.spec.modules:
            factor_a, factor_b = self.tensors[f"{module.name}.factor_a"], self.tensors[f"{module.name}.factor_b"]
            core = self.tensors.get(f"{module.name}.core")
            factor_a = factor_a if core is None else core.double() @ factor_a.double()
            yield LoraPair(module, factor_a, factor_b, self.spec.scaling(module))

    def dense(self) -> dict[str, Tensor]:
        """The tensors that are no LoRA factors or cores; not copied."""
        return {name: tensor for name, tensor in self.tensors.items() if group_of(name) == "dense"}

    def layout(self) -> TensorLayout:
        """Names, shapes and dtypes, sorted by name."""
        return layout_of(to_raw(self.tensors))

    def update_layout(self, groups: Sequence[str]) -> TensorLayout:
        """What an update that trains these groups must hold: their tensors in float32, sorted by name."""
        moving = sorted((name, tensor) for name, tensor in self.tensors.items() if group_of(name) in groups)
        return tuple(TensorEntry(name, tuple(tensor.shape), "F32") for name, tensor in moving)

    def cast(self, dtype: str) -> AdapterState:
        """The same adapter with tensors of safetensors dtype ``dtype`` (new tensors where it differs).

        The residual and what is extra stay as they are.
        """
        return replace(self, tensors={name: t.to(_TORCH[dtype]) for name, t in self.tensors.items()})


@dataclass(frozen=True)
class RuleState:
    """What a rule must remember between rounds: plain scalars and tensors, saved with each version."""

    scalars: Mapping[str, Any] = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)
