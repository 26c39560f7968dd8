"""Models, batches and the truth: one example at a time, each alone, by ordinary autograd."""

from collections.abc import Mapping

import torch
from torch import nn

from federated.adapters import attach, load_base
from federated.config import AdapterConfig, ModelConfig, TaskConfig
from federated.tasks import make_task

LABELS = TaskConfig(labels=("bad", "good", "odd"), max_length=24)
STOCK = TaskConfig(labels=("bad", "good", "odd"), max_length=24, head="stock")
LM = TaskConfig(name="causal_lm", max_length=24)
SERIES = TaskConfig(name="sensor", labels=("down", "up"), max_length=16)
TEXTS = ("fine and good", "bad", "an odd one out of it", "so so", "good day good day")


def rows(task):
    if task.name == "sensor":
        return [{"values": [[float(step), 1.0, -step / 3]] * step, "label": step % 2} for step in (3, 5, 2, 6)]
    return [{"text": text, "label": index % 3} for index, text in enumerate(TEXTS)]


class Case:
    """One adapted model with a batch of examples of different lengths."""

    def __init__(self, model: str, task: TaskConfig, *, groups=None, dtype=torch.float32, **adapter):
        base = load_base(ModelConfig(source=f"tiny:{model}"))
        self.adapter = attach(base, AdapterConfig(**{"kind": "lora", **adapter}), task, seed=1)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for tensor in self.adapter.trainable().values():
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
        self.adapter.set_trainable(groups or self.adapter.spec.groups)
        self.parameters: Mapping[str, nn.Parameter] = self.adapter.trainable(groups or self.adapter.spec.groups)
        self.model = self.adapter.model
        self.task = make_task(task, base.tokenizer)
        self.features = self.task.encode(rows(task))
        if dtype != torch.float32:
            self.model.to(dtype)

    @property
    def loss(self):
        return self.task.per_sample_loss

    @property
    def batch(self):
        return self.task.collate(self.features)

    def truth(self):
        """{name: [n, *shape]}: each example in a batch of its own."""
        made = {name: [] for name in self.parameters}
        for feature in self.features:
            loss = self.loss(self.model, self.task.collate([feature])).sum()
            grads = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
            for (name, parameter), grad in zip(self.parameters.items(), grads, strict=True):
                made[name].append(torch.zeros_like(parameter) if grad is None else grad)
        return {name: torch.stack(grads) for name, grads in made.items()}


def assert_equal_gradients(found, expected, *, tolerance=1e-5):
    assert found.keys() == expected.keys()
    scale = max(float(one.norm()) for one in expected.values())
    for name, one in expected.items():
        assert found[name].shape == one.shape, name
        gap = float((found[name] - one).norm())
        assert gap <= tolerance * max(float(one.norm()), 1e-3 * scale), (name, gap, float(one.norm()))
