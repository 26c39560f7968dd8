"""The lines of Python in a model card that load an adapter with transformers and peft alone.

A mean-pooled head is no architecture of transformers: its dozen lines stand in the card, the same as
`federated.adapters.heads.MeanPoolClassifier`. That cards load with equal answers is tested by running them.
"""

from __future__ import annotations

import json
from typing import Any

from federated.release.exportable import Exportable

__all__ = ["loading_code"]

_MEAN_POOL = '''\
class MeanPoolClassifier(torch.nn.Module):
    """A linear layer on the mean of the real positions' features, normalised to length 8."""

    def __init__(self, backbone, hidden_size, num_labels):
        super().__init__()
        self.backbone = backbone
        self.classifier = torch.nn.Linear(hidden_size, num_labels)

    def forward(self, attention_mask, **inputs):
        output = self.backbone(attention_mask=attention_mask, **inputs)
        hidden = getattr(output, "last_hidden_state", output).float()
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)
        return self.classifier(torch.nn.functional.normalize(pooled, dim=-1) * 8.0)
'''


def loading_code(subject: Exportable) -> str:
    """Python that ends with ``model``, to be run in the folder; logits come from ``model(**inputs)``."""
    head = subject.manifest.spec.head
    if head is None:
        return _transformers(subject, "AutoModelForCausalLM")
    if head.kind == "stock":
        return _transformers(subject, "AutoModelForSequenceClassification", _stock_arguments(subject, head.num_labels))
    around = f"MeanPoolClassifier(backbone, hidden_size={subject.base.hidden_size}, num_labels={head.num_labels})"
    made, imported = _backbone(subject)
    lines = ["import torch", "from peft import PeftModel", *imported, "", "", _MEAN_POOL, "", *made]
    return "\n".join([*lines, f"model = PeftModel.from_pretrained({around}, '.').eval()", *_labels(subject)])


def _backbone(subject: Exportable) -> tuple[list[str], list[str]]:
    if subject.base.kind == "module":
        return ["# the plain torch module that the adapter was trained on, such as:", "backbone = YourModule()"], []
    from_base = f"{_name(subject)}{_arguments(subject)}"
    made = [
        f"tokenizer = AutoTokenizer.from_pretrained({_name(subject)})",
        f"backbone = AutoModel.from_pretrained({from_base})",
        "backbone.config.use_cache = False",
    ]
    return made, ["from transformers import AutoModel, AutoTokenizer"]


def _transformers(subject: Exportable, factory: str, arguments: str = "") -> str:
    name = _name(subject)
    lines = [
        "from peft import PeftModel",
        f"from transformers import {factory}, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({name})",
        f"base = {factory}.from_pretrained({name}{_arguments(subject)}{arguments})",
        "model = PeftModel.from_pretrained(base, '.').eval()",
    ]
    return "\n".join([*lines, *_labels(subject)])


def _stock_arguments(subject: Exportable, num_labels: int) -> str:
    config: Any = subject.base.model.config
    padding = f", pad_token_id={subject.base.tokenizer.pad_token_id}" if config.pad_token_id is None else ""  # type: ignore[union-attr]
    return f", num_labels={num_labels}{padding}"


def _name(subject: Exportable) -> str:
    return json.dumps(subject.base_name)


def _arguments(subject: Exportable) -> str:
    """What of the record's model says how to load it."""
    model = subject.manifest.task.get("model") or {}
    given = {"dtype": model.get("dtype"), "revision": model.get("revision"), "gguf_file": model.get("gguf_file")}
    return "".join(f", {key}={json.dumps(value)}" for key, value in given.items() if value)


def _labels(subject: Exportable) -> list[str]:
    return [f"labels = {json.dumps(list(subject.task.labels))}"] if subject.manifest.spec.head else []
