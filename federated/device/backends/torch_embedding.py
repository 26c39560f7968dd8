"""Texts as vectors: the mean of a backbone's features. Called by `federated.device.backends.torch`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from federated.adapters import BaseModel, inner_model, most_positions
from federated.adapters.heads import MeanPoolClassifier, StockClassifier, backbone_path, mean_pooled
from federated.device.backends.handles import TorchHandle
from federated.device.records import Embedding
from federated.errors import DataError, DeviceError
from federated.tasks.classification import TextInputs

__all__ = ["embeddings"]

_BATCH = 32


def embeddings(base: BaseModel, handle: TorchHandle, tokenizer: Any, texts: Sequence[str]) -> list[Embedding]:
    """The mean of each text's last hidden states over its own tokens, of length 1; texts are cut to the model's length.

    Raises:
        DeviceError: if the base reads no texts, or the adapter is around the whole language model.
        DataError: for a text without features, such as an empty one.
    """
    if tokenizer is None:
        raise DeviceError(f"base model {base.source} reads no texts, so it has no embeddings of them")
    virtual = handle.adapter.spec.virtual_tokens if handle.adapter else 0
    inputs, backbone = TextInputs(tokenizer, most_positions(base) - virtual), _backbone(base, handle)
    features = inputs.encode([{"text": text} for text in texts])
    made: list[Embedding] = []
    for start in range(0, len(features), _BATCH):
        batch = inputs.collate(features[start : start + _BATCH])
        mask = batch.pop("attention_mask")
        pooled = mean_pooled(backbone(attention_mask=mask, **batch), mask)
        nothing = pooled.any(1).logical_not()
        if bool(nothing.any()):
            number = start + int(nothing.nonzero()[0]) + 1
            raise DataError(
                f"input {number} has no features, so it has no direction; expected a text that is not empty"
            )
        made += [Embedding(vector.tolist(), int(count)) for vector, count in zip(pooled, mask.sum(1), strict=True)]
    return made


def _backbone(base: BaseModel, handle: TorchHandle) -> nn.Module:
    """What makes the features that the handle's answers rest on, its adapter included."""
    model = handle.model
    if isinstance(model, MeanPoolClassifier):
        return model.backbone
    if isinstance(model, StockClassifier):
        return model.stock.get_submodule(str(model.stock.base_model_prefix))
    if inner_model(model) is not model:
        raise DeviceError(f"an adapter of kind {handle.kind} on a language model has no embeddings; use another slot")
    return model.get_submodule(backbone_path(base))
