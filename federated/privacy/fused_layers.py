"""The layers that `federated.privacy.fused` knows, and their forward passes that keep gradients of single examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from federated.errors import PrivacyError

__all__ = ["Kept", "Layer", "find_layers"]


class Kept:
    """The gradients of the examples of one batch, by name, as they come in during a backward pass.

    Attributes:
        expected: how many examples there are.
    """

    def __init__(self) -> None:
        self.expected = 0
        self._gradients: dict[str, Tensor] = {}

    def start(self, expected: int) -> None:
        """Forget everything, and expect that many examples."""
        self.expected = expected
        self._gradients.clear()

    def add(self, name: str, gradient: Tensor) -> None:
        """Add [n, *shape] to what there is: a layer may run several times.

        Raises:
            PrivacyError: if n is not the number of examples.
        """
        if len(gradient) != self.expected:
            raise PrivacyError(
                f"the layer of {name} sees {len(gradient)} rows where the batch has {self.expected} examples: whose "
                "gradient is whose cannot be told; set privacy.example.per_sample=vmap"
            )
        if name in self._gradients:
            self._gradients[name] += gradient
        else:
            self._gradients[name] = gradient

    def taken(self, name: str, parameter: nn.Parameter) -> Tensor:
        """What came in for one tensor; zeros where it had no effect."""
        found = self._gradients.pop(name, None)
        if found is None:
            found = parameter.new_zeros((self.expected, *parameter.shape), dtype=_wide(parameter.dtype))
        return found


@dataclass(frozen=True)
class Layer:
    """One layer that owns trained tensors.

    Args:
        module: whose forward is replaced.
        forward: takes `Kept` and what the module's own forward takes.
        names: of the trained tensors.
        owners: the modules that hold them: itself, or its containers.
    """

    module: nn.Module
    forward: Callable[..., Any]
    names: tuple[str, ...]
    owners: tuple[nn.Module, ...]


def find_layers(model: nn.Module, names: Mapping[int, str]) -> list[Layer]:
    """Every layer of a known kind that owns some of the tensors.

    Args:
        model: is searched.
        names: of the trained tensors by the parameter's id.
    """
    found: list[Layer] = []
    for module in model.modules():
        owned = {slot: names[id(one)] for slot, one in module._parameters.items() if id(one) in names}
        known = _known(module, owned, names) if "forward" not in module.__dict__ else None
        if known is not None:
            found.append(known)
    return found


def _known(module: Any, owned: Mapping[str, str], names: Mapping[int, str]) -> Layer | None:
    if hasattr(module, "ia3_l"):
        return _scaled_layer(module, names)
    if not owned:
        return None
    forward: Callable[..., Any] | None = None
    kind = type(module)
    if kind is nn.Linear or kind.__name__ == "Conv1D":
        forward = _Projection(module, owned, transposed=kind is not nn.Linear)
    elif kind is nn.LayerNorm:
        forward = _Norm(module, owned)
    elif kind is nn.Embedding and not (module.sparse or module.scale_grad_by_freq or module.max_norm):
        forward = _Lookup(module, owned["weight"])
    elif kind.__name__.endswith("RMSNorm") and set(module._parameters) == {"weight"}:
        forward = _Copied(module, owned, _root_mean_square if kind is nn.RMSNorm else None)
    elif set(owned) <= set(getattr(module, "per_sample_parameters", ())):
        forward = _Copied(module, owned, None)
    return None if forward is None else Layer(module, forward, tuple(owned.values()), (module,))


def _scaled_layer(module: Any, names: Mapping[int, str]) -> Layer | None:
    """Peft's IA3 layer around a linear one, with one factor at work."""
    active = [name for name in module.active_adapters if name in module.ia3_l]
    if len(active) != 1 or module.disable_adapters or module.merged or id(module.ia3_l[active[0]]) not in names:
        return None
    factor = module.ia3_l[active[0]]
    name = names[id(factor)]
    return Layer(module, _Scaled(module, factor, name), (name,), (module.ia3_l,))


class _Projection:
    """A linear layer's forward.

    Args:
        transposed: the weight is d_in x d_out.
    """

    def __init__(self, module: nn.Module, owned: Mapping[str, str], *, transposed: bool) -> None:
        self._module = module
        self._owned = owned
        self._transposed = transposed

    def __call__(self, kept: Kept, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """``x W^T + b``."""
        module: Any = self._module
        wanted = (kept, self._owned.get("weight"), self._owned.get("bias"), self._transposed)
        made: Tensor = _ProjectionPass.apply(_autocast(input), module.weight, module.bias, wanted)  # type: ignore[no-untyped-call]
        return made


class _ProjectionPass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.wanted = wanted
        matrix = weight.to(x.dtype)
        return nn.functional.linear(x, matrix.T if wanted[3] else matrix, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad,) = outer
        x, weight = ctx.saved_tensors
        kept, weight_name, bias_name, transposed = ctx.wanted
        rows, wide = len(grad), _wide(weight.dtype)
        out = grad.reshape(rows, -1, grad.shape[-1]).to(wide)
        if weight_name is not None:
            inner = x.reshape(rows, -1, x.shape[-1]).to(wide)
            left, right = (inner, out) if transposed else (out, inner)
            kept.add(weight_name, torch.bmm(left.transpose(1, 2), right))
        if bias_name is not None:
            kept.add(bias_name, out.sum(1))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        matrix = weight.to(grad.dtype)
        return (grad @ (matrix.T if transposed else matrix)).to(x.dtype), None, None, None


class _Norm:
    """A layer norm's forward."""

    def __init__(self, module: nn.Module, owned: Mapping[str, str]) -> None:
        self._module = module
        self._owned = owned

    def __call__(self, kept: Kept, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """``(x - mean) / deviation * w + b``."""
        module: Any = self._module
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        wanted = (kept, self._owned.get("weight"), self._owned.get("bias"), module.normalized_shape, module.eps)
        made: Tensor = _NormPass.apply(x, module.weight, module.bias, wanted)  # type: ignore[no-untyped-call]
        return made if torch.is_autocast_enabled(x.device.type) else made.to(input.dtype)


class _NormPass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[Any, ...]) -> Tensor:
        shape, eps = wanted[3:]
        made, mean, scale = torch.native_layer_norm(x, shape, weight.to(x.dtype), _cast(bias, x.dtype), eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.wanted = wanted
        return made

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad,) = outer
        x, weight, mean, scale = ctx.saved_tensors
        kept, weight_name, bias_name, shape, _ = ctx.wanted
        rows = len(grad)
        if weight_name is not None:
            kept.add(weight_name, (grad * ((x - mean) * scale)).reshape(rows, -1, *shape).sum(1))
        if bias_name is not None:
            kept.add(bias_name, grad.reshape(rows, -1, *shape).sum(1))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        back = torch.ops.aten.native_layer_norm_backward
        asked = (True, False, False)
        return back(grad.contiguous(), x, shape, mean, scale, weight.to(x.dtype), None, asked)[0], None, None, None


class _Lookup:
    """An embedding's forward; ids that all examples share (positions) are a copy for each."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module = module
        self._name = name

    def __call__(self, kept: Kept, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """``w[ids]``."""
        module: Any = self._module
        ids = input.expand(kept.expected, *input.shape[1:]) if len(input) == 1 else input
        made: Tensor = _LookupPass.apply(module.weight, ids, (kept, self._name, module.padding_idx))  # type: ignore[no-untyped-call]
        return made


class _LookupPass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, wanted: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype, ctx.wanted = weight.shape, _wide(weight.dtype), wanted
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[None, None, None]:
        (grad,) = outer
        (ids,) = ctx.saved_tensors
        kept, name, padding = ctx.wanted
        rows, (words, size) = len(grad), ctx.shape
        places = (ids.reshape(rows, -1) + torch.arange(rows, device=ids.device)[:, None] * words).flatten()
        made = torch.zeros(rows * words, size, dtype=ctx.dtype, device=grad.device)
        made = made.index_add_(0, places, grad.reshape(-1, size).to(ctx.dtype)).view(rows, words, size)
        if padding is not None:
            made[:, padding] = 0.0
        kept.add(name, made)
        return None, None, None


class _Copied:
    """A module's own forward, while each trained tensor is a copy for each example, broadcast like the original.

    Args:
        instead: what to call in place of the module's own forward.
    """

    def __init__(self, module: nn.Module, owned: Mapping[str, str], instead: Callable[..., Any] | None) -> None:
        self._module = module
        self._owned = owned
        self._instead = instead

    def __call__(self, kept: Kept, *inputs: Any, **named: Any) -> Any:
        """What the module gives."""
        module, slots = self._module, self._module._parameters
        first = inputs[0] if inputs else next(iter(named.values()))
        own = {slot: slots[slot] for slot in self._owned}
        forward = self._instead or type(module).forward
        try:
            for slot, tensor in own.items():
                slots[slot] = _copies(tensor, first, kept, self._owned[slot])  # type: ignore[assignment]
            return forward(module, *inputs, **named)
        finally:
            slots.update(own)


def _root_mean_square(module: Any, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
    """Torch's own takes no weight of another shape."""
    made: Tensor = nn.functional.rms_norm(input, module.normalized_shape, None, module.eps) * module.weight
    return made


class _Scaled:
    """The forward of peft's IA3 layer: the factor before a feed-forward's last layer, else after."""

    def __init__(self, module: nn.Module, factor: nn.Parameter, name: str) -> None:
        self._module = module
        self._factor = factor
        self._name = name

    def __call__(self, kept: Kept, input: Tensor, *inputs: Any, **named: Any) -> Tensor:  # noqa: A002
        """``s * (W x + b)``, or ``W (s * x) + b``."""
        module: Any = self._module
        if module.is_feedforward:
            scaled = (input * self._copies(kept, input)).to(input.dtype)
            made: Tensor = module.base_layer(scaled, *inputs, **named)
            return made
        made = module.base_layer(input, *inputs, **named)
        return (made * self._copies(kept, made)).to(made.dtype)

    def _copies(self, kept: Kept, like: Tensor) -> Tensor:
        flat: Tensor = _CopyPass.apply(self._factor, (kept, self._name, len(like)))  # type: ignore[no-untyped-call]
        return flat.reshape(len(like), *[1] * (like.dim() - 2), -1)


def _copies(tensor: Any, like: Tensor, kept: Kept, name: str) -> Tensor:
    """[n, 1 ..., *shape], to stand where [*shape] was beside ``like`` [n, ...]."""
    made: Tensor = _CopyPass.apply(tensor, (kept, name, len(like)))  # type: ignore[no-untyped-call]
    return made.reshape(len(like), *[1] * (like.dim() - 1 - tensor.dim()), *tensor.shape)


class _CopyPass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, wanted: tuple[Kept, str, int]) -> Tensor:
        ctx.wanted = wanted
        return tensor.expand(wanted[2], *tensor.shape)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[None, None]:
        (grad,) = outer
        kept, name, _ = ctx.wanted
        kept.add(name, grad.to(_wide(grad.dtype)).clone())
        return None, None


def _autocast(x: Tensor) -> Tensor:
    """The input as autocast would have it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
