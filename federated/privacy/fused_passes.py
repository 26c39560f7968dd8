"""Backward passes that keep the gradients of single examples and give autograd none: `federated.privacy.fused_layers`.

The last argument of each, ``wanted``, says where gradients go and under which names; no gradient reaches a trained
tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from federated.errors import PrivacyError

__all__ = ["CopyPass", "Kept", "LookupPass", "NormPass", "ProjectionPass"]


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


class ProjectionPass(torch.autograd.Function):
    """``x W^T + b``; ``wanted``: kept, the names of W and b or None, whether W is d_in x d_out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[Any, ...]) -> Tensor:
        """The ordinary one."""
        ctx.save_for_backward(x, weight)
        ctx.wanted = wanted
        matrix = weight.to(x.dtype)
        return nn.functional.linear(x, matrix.T if wanted[3] else matrix, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, None, None, None]:
        """Keeps what is wanted; gives the gradient of the input alone, where there is one."""
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


class NormPass(torch.autograd.Function):
    """A layer norm; ``wanted``: kept, the names of w and b or None, the normalised shape, epsilon."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[Any, ...]) -> Tensor:
        """The ordinary one."""
        shape, eps = wanted[3:]
        made, mean, scale = torch.native_layer_norm(x, shape, weight.to(x.dtype), _cast(bias, x.dtype), eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.wanted = wanted
        return made

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, None, None, None]:
        """Keeps what is wanted; gives the gradient of the input alone, where there is one."""
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


class LookupPass(torch.autograd.Function):
    """``w[ids]``; ``wanted``: kept, the name of w, the id of padding or None."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, wanted: tuple[Any, ...]) -> Tensor:
        """The ordinary one."""
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype, ctx.wanted = weight.shape, _wide(weight.dtype), wanted
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[None, None, None]:
        """Keeps what is wanted; gives the gradient of the input alone, where there is one."""
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


class CopyPass(torch.autograd.Function):
    """A tensor once for each example, [n, *shape]; ``wanted``: kept, its name, n."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, wanted: tuple[Kept, str, int]) -> Tensor:
        """The ordinary one."""
        ctx.wanted = wanted
        return tensor.expand(wanted[2], *tensor.shape)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[None, None]:
        """Keeps what is wanted; gives the gradient of the input alone, where there is one."""
        (grad,) = outer
        kept, name, _ = ctx.wanted
        kept.add(name, grad.to(_wide(grad.dtype)).clone())
        return None, None


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
