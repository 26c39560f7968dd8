"""The floor that `engines.py` measures against: a federation written by hand with torch, transformers and peft.

    python simulations/benchmarks/parts/bare_federation.py FOLDER RUN_FOLDER

The same examples, steps and plain mean of deltas as the engines, in two forked processes: no Flower, no messages, no
registry, no report and no checks. It imports nothing of this library. ``FOLDER`` is what `engines.py` prepared.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save
from torch import Tensor, nn

__all__ = ["main"]

Arrays = dict[str, npt.NDArray[np.float32]]

IGNORE, PAD = -100, 0

job: dict[str, Any] = {}
model: Any = None
examples: dict[str, dict[str, list[list[int]]]] = {}
factors: dict[str, nn.Parameter] = {}


def load(folder: Path) -> None:
    """Everything that the forked processes share."""
    global model
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job.update(json.loads((folder / "bare.json").read_text()))
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    for client, texts in job["clients"].items():
        examples[client] = {part: _encode(tokenizer, texts[part]) for part in ("train", "test")}
    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    targets = ["q_proj", "v_proj"]
    lora = LoraConfig(r=job["rank"], lora_alpha=job["alpha"], target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).eval()
    for name, tensor in model.named_parameters():
        if tensor.requires_grad:
            short = name.removeprefix("base_model.model.")
            short = short.replace("lora_A.default.weight", "factor_a").replace("lora_B.default.weight", "factor_b")
            factors[short] = tensor


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]


def token_losses(samples: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets (-100 where there is none) and cross-entropy of every token."""
    longest = max(map(len, samples))
    tokens = torch.tensor([[*one, *[PAD] * (longest - len(one))] for one in samples])
    mask = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in samples])
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, :-1]
    targets = tokens[:, 1:].masked_fill(mask[:, 1:] == 0, IGNORE)
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORE)
    return logits, targets, losses.view(targets.shape)


def mean_loss(targets: Tensor, losses: Tensor) -> Tensor:
    """Mean over the samples of each one's mean over its own tokens."""
    return (losses.sum(1) / (targets != IGNORE).sum(1)).sum() / len(targets)


def train(client: str, number: int, received: Arrays) -> tuple[tuple[float, float], float, Arrays]:
    """One client's round: held-out loss of what it received, training loss, and what training added."""
    held_out = evaluate(client, received)
    samples, parameters = examples[client]["train"], list(factors.values())
    optimizer = torch.optim.AdamW(parameters, lr=job["learning_rate"], weight_decay=0.0)
    total = 0.0
    for indices in job["clients"][client]["batches"][number]:
        loss = mean_loss(*token_losses([samples[index] for index in indices])[1:])
        total += loss.item()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return held_out, total, {name: tensor.detach().numpy() - received[name] for name, tensor in factors.items()}


@torch.no_grad()
def evaluate(client: str, received: Arrays) -> tuple[float, float]:
    """Held-out loss and token accuracy of an adapter, which stays in the model."""
    for name, tensor in factors.items():
        tensor.copy_(torch.from_numpy(received[name]))
    logits, targets, losses = token_losses(examples[client]["test"])
    hits = (logits.argmax(-1) == targets).sum() / (targets != IGNORE).sum()
    return float(mean_loss(targets, losses)), float(hits)


def federate(pool: Pool, adapter: Arrays) -> Arrays:
    """All rounds: the plain mean of the clients' deltas moves the adapter."""
    clients = sorted(examples)
    for number in range(job["rounds"]):
        sums = {name: np.zeros(tensor.shape) for name, tensor in adapter.items()}
        for _, _, delta in pool.starmap(train, [(client, number, adapter) for client in clients], chunksize=1):
            for name, tensor in delta.items():
                sums[name] += tensor
        adapter = {name: (adapter[name] + total / len(clients)).astype(np.float32) for name, total in sums.items()}
    held_out = pool.starmap(evaluate, [(client, adapter) for client in clients], chunksize=1)
    loss, accuracy = np.mean(held_out, axis=0)
    print(f"held-out loss {loss:.4f}, token accuracy {accuracy:.4f}", file=sys.stderr)
    return adapter


def main(folder: Path, run: Path) -> None:
    """Run, save the last adapter and its digest."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    load(folder)
    with multiprocessing.get_context("fork").Pool(job["workers"]) as pool:
        adapter = federate(pool, load_file(folder / "initial.safetensors"))
    run.mkdir()
    data = save(adapter)
    (run / "adapter.safetensors").write_bytes(data)
    (run / "versions.json").write_text(json.dumps([{"weights_digest": hashlib.sha256(data).hexdigest()}]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
