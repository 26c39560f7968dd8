"""What `LocalTrainer` costs over a training loop written by hand: the same model, batches, optimizer and steps.

    python simulations/benchmarks/trainer.py [--quick] [--seed N]

Two models: the tiny Llama of this repository (language modelling) and a BERT of MiniLM's size with random weights
(classification, stock head). The bare loop is peft and torch alone: no write of a received adapter, no delta, no
check of the loss. Runs alternate, and each ratio is the median over pairs, in CPU seconds of one thread (wall time on
a busy machine measures the neighbours). The last line is one JSON object; ``trainer_over_bare`` is the larger ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn

from federated.adapters import BaseModel, attach, base_from_module, load_base
from federated.adapters.quiet import quiet_peft, quiet_transformers
from federated.adapters.tiny import byte_tokenizer
from federated.config import AdapterConfig, ModelConfig, TaskConfig, TrainConfig
from federated.manifest import TrainPlan
from federated.tasks import Features, make_task
from federated.tasks.batching import step_groups
from federated.training import LocalData, LocalTrainer

ROOT = Path(__file__).resolve().parents[2]
LLAMA = ROOT / "simulations" / "models" / "tiny-llama-sotu"
RANK, ALPHA, RATE, BATCH = 8, 16.0, 1e-3, 8
LABELS = ("negative", "neutral", "positive")


@dataclass(frozen=True)
class Contest:
    """One model, trained both ways.

    Args:
        base: the shared base of the trainer.
        task: what is learnt.
        fresh: makes the same model, bare.
        peft_task: what peft calls the task.
        targets: adapted layers.
        features: training examples, encoded once for both.
    """

    base: BaseModel
    task: TaskConfig
    fresh: Callable[[], nn.Module]
    peft_task: str
    targets: tuple[str, ...]
    features: list[Features]


def _lengths(count: int, longest: int, generator: torch.Generator) -> list[int]:
    return torch.randint(longest // 2, longest + 1, (count,), generator=generator).tolist()


def llama_contest(count: int, generator: torch.Generator) -> Contest:
    """The 1 M-parameter Llama on random tokens."""
    from transformers import AutoModelForCausalLM

    texts = [torch.randint(4, 2048, (n,), generator=generator).tolist() for n in _lengths(count, 96, generator)]
    return Contest(
        base=load_base(ModelConfig(source=str(LLAMA))),
        task=TaskConfig(name="causal_lm"),
        fresh=lambda: AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32),
        peft_task=TaskType.CAUSAL_LM,
        targets=("q_proj", "v_proj"),
        features=[{"input_ids": ids, "labels": ids} for ids in texts],
    )


def bert_contest(count: int, generator: torch.Generator) -> Contest:
    """A random BERT of MiniLM's size (6 layers of 384) on random tokens."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=260, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=len(LABELS),
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    texts = [torch.randint(4, 260, (n,), generator=generator).tolist() for n in _lengths(count, 48, generator)]

    def fresh() -> nn.Module:
        made: nn.Module = BertForSequenceClassification(config)
        made.load_state_dict(model.state_dict())
        return made

    return Contest(
        base=base_from_module(model.bert, byte_tokenizer(chat=False), source="random BERT 6x384"),
        task=TaskConfig(labels=LABELS, head="stock"),
        fresh=fresh,
        peft_task=TaskType.SEQ_CLS,
        targets=("query", "value"),
        features=[{"input_ids": ids, "label": ids[0] % len(LABELS)} for ids in texts],
    )


def trainer_run(contest: Contest, seed: int) -> Callable[[], None]:
    """One client's round by `LocalTrainer`, without evaluation."""
    adapter_config = AdapterConfig(rank=RANK, alpha=ALPHA, target_modules=contest.targets)
    adapter = attach(contest.base, adapter_config, contest.task, seed=seed)
    config = TrainConfig(learning_rate=RATE, batch_size=BATCH, precision="float32", device="cpu")
    trainer = LocalTrainer(adapter, make_task(contest.task, contest.base.tokenizer), config)
    state, plan, data = adapter.read(), TrainPlan(evaluate_before=False), LocalData(contest.features)

    def run() -> None:
        trainer.run(state, plan, data, seed=seed)

    return run


def _pad(rows: Sequence[list[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def _collate(features: Sequence[Features]) -> dict[str, Tensor]:
    ids = [one["input_ids"] for one in features]
    batch = {"input_ids": _pad(ids, 0), "attention_mask": _pad([[1] * len(one) for one in ids], 0)}
    if "label" in features[0]:
        return {**batch, "labels": torch.tensor([one["label"] for one in features])}
    return {**batch, "labels": _pad([one["labels"] for one in features], -100)}


def bare_run(contest: Contest, seed: int) -> Callable[[], None]:
    """The same epoch as one would write it with peft and torch."""
    lora = LoraConfig(
        task_type=contest.peft_task, r=RANK, lora_alpha=ALPHA, target_modules=list(contest.targets), lora_dropout=0.0
    )
    with quiet_transformers(), quiet_peft():
        model: Any = get_peft_model(contest.fresh(), lora)  # type: ignore[arg-type, unused-ignore]
    parameters = [tensor for tensor in model.parameters() if tensor.requires_grad]
    features = contest.features
    groups = step_groups([len(one["input_ids"]) for one in features], TrainConfig(batch_size=BATCH), seed)
    batches = [batch for group in groups for batch in group]

    def run() -> None:
        model.train()
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
        for batch in batches:
            loss = model(**_collate([features[index] for index in batch])).loss
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def measure(runs: Sequence[Callable[[], None]], pairs: int) -> list[list[float]]:
    """CPU seconds of each run, ``pairs`` times over in turn, after one round to warm up."""
    for run in runs:
        run()
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in range(pairs):
        for index in range(len(runs)) if turn % 2 == 0 else reversed(range(len(runs))):
            began = time.process_time()
            runs[index]()
            seconds[index].append(time.process_time() - began)
    return seconds


def contest_result(name: str, contest: Contest, *, pairs: int, seed: int) -> dict[str, float]:
    """Measure one contest and print a line about it."""
    steps = -(-len(contest.features) // BATCH)
    ours, bare = measure([trainer_run(contest, seed), bare_run(contest, seed)], pairs)
    ratio = statistics.median(one / other for one, other in zip(ours, bare, strict=True))
    per_step = [1000 * statistics.median(times) / steps for times in (ours, bare)]
    print(f"{name}: trainer {per_step[0]:.1f} ms a step, bare {per_step[1]:.1f} ms, ratio {ratio:.3f} ({pairs} pairs)")
    return {"trainer_ms": round(per_step[0], 2), "bare_ms": round(per_step[1], 2), "ratio": round(ratio, 4)}


def main() -> None:
    """Run both contests and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute on two cores")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    contests = {
        "tiny_llama": llama_contest(96 if arguments.quick else 160, generator),
        "bert_6x384": bert_contest(32 if arguments.quick else 64, generator),
    }
    pairs = 7 if arguments.quick else 25
    results = {name: contest_result(name, one, pairs=pairs, seed=arguments.seed) for name, one in contests.items()}
    worst = max(result["ratio"] for result in results.values())
    print(json.dumps({"trainer_over_bare": worst, "seed": arguments.seed, "quick": arguments.quick, **results}))


if __name__ == "__main__":
    main()
