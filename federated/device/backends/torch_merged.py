"""An adapter added into weights: faster than beside them, and never in the base's own.

Called by `federated.device.backends.torch`.
"""

from __future__ import annotations

import copy

from torch import nn

from federated.adapters import BaseModel, shell
from federated.adapters.targets import stores_transposed
from federated.device.backends.handles import TorchHandle
from federated.errors import DeviceError
from federated.state import LoraPair

__all__ = ["merged_handle"]


def merged_handle(base: BaseModel, handle: TorchHandle) -> TorchHandle:
    """A tree whose adapted layers are ``W + scaling * B @ A``, computed in float64 and cast once to W's dtype.

    The adapted layers alone are copied; all else is shared with the base, and with the head of ``handle``.

    Raises:
        DeviceError: if the adapter has no factors, or the base is quantised.
    """
    adapter = handle.adapter
    if adapter is None or not adapter.spec.modules:
        raise DeviceError(f"an adapter of kind {handle.kind} has no factors to merge; serve it as it is")
    if base.quantization is not None:
        raise DeviceError(f"the base is quantised ({base.quantization}); adapters merge into full weights only")
    state = adapter.read()
    twin = shell(base, state.spec)
    twin.write(state)
    for pair in state.pairs():
        twin.replace_layer(pair.module.name, _merged(base.model.get_submodule(pair.module.name), pair))
    return TorchHandle(twin.model.eval().requires_grad_(False), None, f"merged {handle.kind}")


def _merged(layer: nn.Module, pair: LoraPair) -> nn.Module:
    """A copy of a layer with weights of its own; its bias stays the base's."""
    twin, weight = copy.copy(layer), layer.get_parameter("weight")
    twin._parameters = dict(layer._parameters)
    update = pair.scaling * (pair.factor_b.double() @ pair.factor_a.double())
    whole = weight.detach().double() + (update.T if stores_transposed(layer) else update)
    twin._parameters["weight"] = nn.Parameter(whole.to(weight.dtype), requires_grad=False)
    return twin
