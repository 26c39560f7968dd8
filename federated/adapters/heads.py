"""Task heads: a mean-pooled one of our own, and the architecture's stock one on the same backbone.

Mean-pooled features, normalised to length 8, under one linear layer learn much faster than BERT's stock pooler, which
was pretrained for another end and leaves a head-only model at the majority class; hence the default. A head's first
weights depend on its seed alone. To a stock head of the BERT family belongs the pooler: it travels with the head when
the head is trained, and starts from the base model's weights.
"""

from __future__ import annotations

import copy
import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from federated.adapters.base import BaseModel
from federated.errors import ModelError
from federated.manifest import HeadSpec

__all__ = ["MeanPoolClassifier", "StockClassifier", "backbone_path", "build_head", "generator_for", "mean_pooled"]

_LENGTH = 8.0


def generator_for(seed: int, purpose: str) -> torch.Generator:
    """An own generator for one purpose: streams of different purposes are unrelated, the global one is untouched."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def mean_pooled(output: Any, attention_mask: Tensor) -> Tensor:
    """The mean of the real positions' features, of length 1.

    Args:
        output: features [batch, time, hidden], or an output object with ``last_hidden_state``.
        attention_mask: [batch, time], 0 on padding.

    Returns:
        float32 [batch, hidden].
    """
    hidden = getattr(output, "last_hidden_state", output).float()
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)
    return nn.functional.normalize(pooled, dim=-1)


class MeanPoolClassifier(nn.Module):
    """``logits = W normalise(mean of the real positions' features) * 8 + b``.

    Args:
        backbone: takes ``attention_mask`` and the inputs, returns features [batch, time, hidden] (or an output object
            with ``last_hidden_state``).
        hidden_size: of the features.
        num_labels: classes.
    """

    def __init__(self, backbone: nn.Module, hidden_size: int, num_labels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(hidden_size, num_labels)

    def classify(self, features: Tensor) -> Tensor:
        """Logits [batch, num_labels] of what `mean_pooled` returns."""
        logits: Tensor = self.classifier(features * _LENGTH)
        return logits

    def forward(self, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Logits [batch, num_labels] of padded inputs; ``attention_mask`` [batch, time] is 0 on padding."""
        output = self.backbone(attention_mask=attention_mask, **inputs)
        return self.classify(mean_pooled(output, attention_mask))


class StockClassifier(nn.Module):
    """An architecture's own sequence classifier, as a module that returns logits.

    Args:
        stock: a transformers ``...ForSequenceClassification``.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits [batch, num_labels]."""
        logits: Tensor = self.stock(**inputs).logits
        return logits


def backbone_path(base: BaseModel) -> str:
    """Path of the feature extractor inside the base model: ``""`` when it is the whole of it."""
    return str(base.model.base_model_prefix) if base.kind == "decoder" else ""


def build_head(base: BaseModel, tree: nn.Module, head: HeadSpec) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Put a head on an adapted tree of the base.

    Args:
        base: where the tree comes from.
        tree: what `federated.adapters.share` made of it.
        head: kind, classes, seed.

    Returns:
        The whole model, and the head's parameters by canonical name.

    Raises:
        ModelError: if the head's kind is unknown, or the architecture has no such head.
    """
    path = backbone_path(base)
    backbone: Any = tree.get_submodule(path)
    if hasattr(backbone, "config"):
        backbone.config.use_cache = False  # a decoder would keep keys and values that no classifier reads
    if head.kind == "mean_pool":
        model = MeanPoolClassifier(backbone, base.hidden_size, head.num_labels)
        _reset_linear(model.classifier, generator_for(head.seed, "head"))
        return model, {f"classifier.{name}": tensor for name, tensor in model.classifier.named_parameters()}
    if head.kind == "stock":
        return _build_stock(base, backbone, head)
    raise ModelError(f"head kind {head.kind!r} is unknown; expected 'mean_pool' or 'stock'")


def _reset_linear(layer: nn.Linear, generator: torch.Generator) -> None:
    bound = 1.0 / math.sqrt(layer.in_features)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.zero_()


def _build_stock(base: BaseModel, backbone: Any, head: HeadSpec) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    stock = _stock_shell(base, backbone, head.num_labels)
    prefix = stock.base_model_prefix
    stock._modules[prefix] = backbone
    rest = [(name, module) for name, module in stock.named_children() if name != prefix]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_for(head.seed, "head").initial_seed())
        for _, module in rest:
            module.to_empty(device="cpu")
            for part in module.modules():
                stock._init_weights(part)
    names = {f"{name}.{tail}": tensor for name, module in rest for tail, tensor in module.named_parameters()}
    pooler = getattr(backbone, "pooler", None)
    if pooler is not None:
        backbone.pooler = copy.deepcopy(pooler)  # the head's own: the base's stays as it is
        names |= {f"pooler.{tail}": tensor for tail, tensor in backbone.pooler.named_parameters()}
    return StockClassifier(stock), names


def _stock_shell(base: BaseModel, backbone: Any, num_labels: int) -> Any:
    """The stock classifier without any weights (on torch's meta device)."""
    if base.kind == "module":
        raise ModelError(f"base model {base.source} is a plain module and has no stock head; set task.head=mean_pool")
    if next(base.model.parameters()).dtype != torch.float32:
        raise ModelError("a stock head needs a float32 base model; set model.dtype=float32 or task.head=mean_pool")
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(backbone.config)
    config.num_labels = num_labels
    if config.pad_token_id is None and base.tokenizer is not None:
        config.pad_token_id = base.tokenizer.pad_token_id  # decoders look for the last real token by it
    try:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config)
    except ValueError:
        raise ModelError(
            f"{type(base.model).__name__} has no stock classification head; set task.head=mean_pool"
        ) from None
