"""The adapter as it travels to a client: one packet, which `federated.flower.records` puts into a message.

Beside the adapter's own tensors it holds those of a frozen residual and of a rule's extras, under prefixes.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from torch import Tensor

from federated.errors import WireError
from federated.manifest import AdapterSpec
from federated.sparse import factor_shapes, fill, split, thin
from federated.state import AdapterState, Tensors, from_raw, to_raw
from federated.wire import DEFAULT_LIMITS, decode_packet, encode_packet

__all__ = ["adapter_packet", "parse_adapter_packet"]

_RESIDUAL, _EXTRA = "residual:", "extra:"
"""Prefixes of the tensors beside the adapter's own."""


def adapter_packet(state: AdapterState, *, sparse: bool = False) -> bytes:
    """Pack an adapter for the way down; ``sparse`` leaves out the zeros of its factors."""
    residual, tensors = state.residual, state.tensors
    header: dict[str, Any] = {"kind": "adapter", "spec": state.spec.plain}
    header |= {"residual": residual.spec.plain} if residual else {}
    if sparse:
        factors, dense = split(tensors)
        header, tensors = header | {"sparse": True}, dense | thin(factors)
    groups: dict[str, Tensors] = {"": tensors, _RESIDUAL: residual.tensors if residual else {}, _EXTRA: state.extra}
    return encode_packet(
        header, to_raw({prefix + name: tensor for prefix, named in groups.items() for name, tensor in named.items()})
    )


def parse_adapter_packet(data: bytes) -> AdapterState:
    """Unpack an adapter.

    Raises:
        WireError: if it is not one.
    """
    return _adapter(data)


@lru_cache(maxsize=1)
def _adapter(data: bytes) -> AdapterState:
    """All clients of a round are mostly sent the same bytes; tensors of a state are never changed in place."""
    header, raw, _ = decode_packet(data)
    try:
        spec = AdapterSpec.from_dict(header["spec"])
        residual = AdapterSpec.from_dict(header["residual"]) if "residual" in header else None
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"the packet holds no adapter: {type(error).__name__}") from None
    groups: dict[str, dict[str, Tensor]] = {"": {}, _RESIDUAL: {}, _EXTRA: {}}
    for name, tensor in from_raw(raw).items():
        prefix = next((one for one in (_RESIDUAL, _EXTRA) if name.startswith(one)), "")
        groups[prefix][name.removeprefix(prefix)] = tensor
    if header.get("sparse"):
        groups[""] = _filled(groups[""], spec)
    frozen = _residual(residual, groups[_RESIDUAL])
    return AdapterState(spec, groups[""], residual=frozen, extra=groups[_EXTRA])


def _residual(spec: AdapterSpec | None, tensors: dict[str, Tensor]) -> AdapterState | None:
    """Spec and tensors come together; whether they fit each other and the base, `AdapterModel.write` checks."""
    if spec is None:
        if tensors:
            raise WireError("the packet holds tensors of a residual, and no spec of one")
        return None
    factors = {f"{module.name}.{factor}" for module in spec.modules for factor in ("factor_a", "factor_b")}
    if factors - tensors.keys():
        missing = sorted(factors - tensors.keys())[:3]
        raise WireError(f"the packet holds a residual's spec, and not its tensors: missing {missing}")
    return AdapterState(spec, tensors)


def _filled(tensors: Tensors, spec: AdapterSpec) -> dict[str, Tensor]:
    """The factors with their zeros, unless they would be larger than any packet may be."""
    shapes = factor_shapes(spec)
    sizes = [size for shape in shapes.values() for size in shape]
    entries = sum(math.prod(shape) for shape in shapes.values()) if all(type(size) is int for size in sizes) else 0
    if not 0 < 4 * entries <= DEFAULT_LIMITS.max_bytes or min(sizes) < 1:
        raise WireError("the packet's sparse adapter has sizes that no adapter of this protocol has")
    return fill(tensors, shapes)
