"""A frozen base in 8 or 4 bits: less memory for serving and for training adapters beside it.

    int8: W ~ s_i * q_ij, one scale for each row, q in -127 ... 127       y = s * (q x)
    nf4:  blocks of 64 values, each a scale and 16 levels of a normal distribution (QLoRA's NormalFloat)

Linear layers are quantised; embeddings, norms, heads, poolers and output embeddings keep their dtype. Only weights
are: activations and all arithmetic stay in the input's dtype, and gradients flow through to adapters, not to the
weights. ``int8`` is plain torch; ``nf4`` needs bitsandbytes, which is imported here alone. Nothing in a layer is
written after it is made, so that trees share it like any other.

Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, section 3 (nf4, without its second
quantisation of the scales).
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from federated.adapters.base import BaseModel
from federated.adapters.targets import adaptable
from federated.errors import ModelError
from federated.manifest import digest_of

__all__ = ["Int8Linear", "Nf4Linear", "quantize"]

_BLOCK = 64


def quantize(base: BaseModel, kind: Literal["int8", "nf4"]) -> BaseModel:
    """Quantise a base that nobody else uses, in place, layer by layer: the full weights are freed as it goes.

    The fingerprint of the result is that of the full base's parts with the quantisation as one more part: it says which
    weights were quantised and how, and is another base's than the full one's, since a model answers otherwise and an
    adapter trained on it is trained on something else.

    Raises:
        ModelError: if there is nothing to quantise, or bitsandbytes is missing for ``nf4``.
    """
    layers = {name: layer for name, layer in adaptable(base.model).items() if isinstance(layer, nn.Linear)}
    if not layers:
        raise ModelError(f"{base.source} has no Linear layer to quantise; set model.quantization=none")
    if kind == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("model.quantization=nf4 needs the quant extra; run: pip install 'federated-peft[quant]'")
    make = Int8Linear if kind == "int8" else Nf4Linear
    for name in list(layers):
        parent, _, last = name.rpartition(".")
        base.model.get_submodule(parent)._modules[last] = make(layers.pop(name))
    base.model.eval().requires_grad_(False)
    tensors = {id(one): one.nbytes for one in [*base.model.parameters(), *base.model.buffers()]}
    parts = {**base.parts, "quantization": kind}
    return replace(base, parts=parts, base_digest=digest_of(parts), num_bytes=sum(tensors.values()))


class _Quantized(nn.Linear):
    """A linear layer whose weight is stored in another form; only `forward` can read it."""

    def __init__(self, layer: nn.Linear, stored: Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.bias = layer.bias


class Int8Linear(_Quantized):
    """``y = s * (q x) + b``.

    Args:
        layer: full.
    """

    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        full = layer.weight.detach().float()
        scale = full.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        super().__init__(layer, (full / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., d_in] to [..., d_out], in the inputs' dtype."""
        made: Tensor = _Int8Product.apply(inputs, self.weight, self.scale)  # type: ignore[no-untyped-call]
        return made if self.bias is None else made + self.bias.to(made.dtype)


class _Int8Product(torch.autograd.Function):
    """Keeps the 8-bit weight for the backward pass, not the one that it was widened to."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """``s * (q x)``."""
        ctx.save_for_backward(weight, scale)
        return nn.functional.linear(inputs, weight.to(inputs.dtype)) * scale.to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """``(s * g) q``."""
        weight, scale = ctx.saved_tensors
        return (gradient * scale.to(gradient.dtype)) @ weight.to(gradient.dtype), None, None


class Nf4Linear(_Quantized):
    """A layer in 4 bits, by bitsandbytes.

    Args:
        layer: full.
    """

    absmax: Tensor
    code: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        from bitsandbytes.functional import quantize_4bit

        full = layer.weight.detach().contiguous()
        stored, state = quantize_4bit(full, blocksize=_BLOCK, quant_type="nf4", compress_statistics=False)
        super().__init__(layer, stored)
        self.register_buffer("absmax", state.absmax)
        self.register_buffer("code", state.code)
        self._dtype = full.dtype

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., d_in] to [..., d_out], in the inputs' dtype."""
        from bitsandbytes import matmul_4bit
        from bitsandbytes.functional import QuantState

        state = QuantState(
            absmax=self.absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.code,
            blocksize=_BLOCK,
            quant_type="nf4",
            dtype=self._dtype,
        )
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        made: Tensor = matmul_4bit(inputs, self.weight, quant_state=state, bias=bias)
        return made
