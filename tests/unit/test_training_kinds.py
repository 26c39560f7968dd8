"""Every kind of adapter learns, by the same trainer, and the base stays as it was."""

import pytest
import torch

from federated.adapters import attach, load_base
from federated.adapters.fingerprint import base_digest
from federated.config import AdapterConfig, ModelConfig, TaskConfig, TrainConfig
from federated.delta import apply
from federated.manifest import TrainPlan
from federated.tasks import make_task
from federated.training import LocalData, LocalTrainer

torch.set_num_threads(1)

RATES = {"ia3": 0.05, "layernorm": 0.02, "head": 0.02, "full": 0.005, "prompt": 0.1, "prefix": 0.1}
TEXTS = [("fine and good", 1), ("good fine day", 1), ("bad awful mess", 0), ("awful and bad", 0)] * 2
SERIES = [([[float(sign)] * 3] * 4, int(sign > 0)) for sign in (1, -1)] * 4
CASES = {
    "classification": ("bert", TaskConfig(labels=("bad", "good")), [{"text": t, "label": y} for t, y in TEXTS]),
    "stock": ("bert", TaskConfig(labels=("bad", "good"), head="stock"), [{"text": t, "label": y} for t, y in TEXTS]),
    "causal_lm": ("llama", TaskConfig(name="causal_lm"), [{"text": "over and over again"}] * 4),
    "gpt2": ("gpt2", TaskConfig(name="causal_lm"), [{"text": "over and over again"}] * 4),
    "sensor": (
        "sensor",
        TaskConfig(name="sensor", labels=("down", "up")),
        [{"values": v, "label": y} for v, y in SERIES],
    ),
}
MISSING = {
    ("layernorm", "sensor"), ("prompt", "sensor"), ("prefix", "sensor"), ("head", "causal_lm"), ("head", "gpt2"),
    ("prompt", "stock"),
}  # fmt: skip


def trainer_for(kind, case, **train):
    name, task_config, rows = CASES[case]
    base = load_base(ModelConfig(source=f"tiny:{name}"))
    adapter = attach(base, AdapterConfig(kind=kind), task_config, seed=1)
    task = make_task(task_config, base.tokenizer)
    config = TrainConfig(
        **{"learning_rate": RATES[kind], "steps": 15, "batch_size": 4, "precision": "float32", **train}
    )
    return LocalTrainer(adapter, task, config), LocalData(task.encode(rows), task.encode(rows))


@pytest.mark.parametrize(
    ("kind", "case"), [(kind, case) for kind in RATES for case in CASES if (kind, case) not in MISSING]
)
def test_the_loss_falls_and_the_base_stays(kind, case):
    trainer, data = trainer_for(kind, case)
    base, received = trainer.adapter.base, trainer.adapter.read()
    result = trainer.run(received, TrainPlan(evaluate_after=True), data, seed=0)
    after = result.metrics["eval_after_loss"]
    assert after < result.metrics["eval_before_loss"] - 0.02  # a random language model cannot learn much
    assert result.delta.keys() == received.tensors.keys()
    assert base_digest(base.model, base.tokenizer) == base.base_digest
    assert trainer.evaluate(apply(received, result.delta), data.test).loss == pytest.approx(after, rel=1e-5)


@pytest.mark.parametrize("kind", RATES)
def test_equal_inputs_give_equal_bits_whoever_trained_before(kind):
    trainer, data = trainer_for(kind, "classification", steps=2)
    received = trainer.adapter.read()
    first = trainer.run(received, TrainPlan(), data, seed=0).delta
    trainer.run(apply(received, first), TrainPlan(), data, seed=9)
    again = trainer.run(received, TrainPlan(), data, seed=0).delta
    assert all(torch.equal(first[name], again[name]) for name in first)
