"""The plain loop that `airlines.py` measures against: FedAvg of LoRA by hand, with torch, transformers and peft alone.

    python simulations/benchmarks/parts/bare_airlines.py FOLDER [--same-batches]

One process, one thread, one client after another; the global adapter is measured on everybody's held-out tweets before
the first round and after each. It imports nothing of this library. ``FOLDER`` is what `airlines.py` prepared. Each
client's tweets are shuffled and cut into batches, as one would write it; ``--same-batches`` does all once more with
the batches that the library makes: the last adapter must then be the same, bit for bit. The last line is one JSON
object.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save
from torch import Tensor, nn

__all__ = ["main"]

Arrays = dict[str, npt.NDArray[np.float32]]
Example = tuple[list[int], int]

LENGTH = 8.0  # of the pooled features


class Classifier(nn.Module):
    """A linear head on the mean of the real tokens' features, normalised."""

    def __init__(self, encoder: Any, num_labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, num_labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [batch, num_labels]."""
        features = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).float()
        pooled = (features * mask).sum(1) / mask.sum(1)
        logits: Tensor = self.classifier(nn.functional.normalize(pooled, dim=-1) * LENGTH)
        return logits


class Loop:
    """The model, the encoded tweets, and what is done with them."""

    def __init__(self, folder: Path) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModel, AutoTokenizer

        self.job: dict[str, Any] = json.loads((folder / "bare.json").read_text())
        self.same_batches = False
        tokenizer = AutoTokenizer.from_pretrained(self.job["model"])
        self.padding = tokenizer.pad_token_id
        self.examples = {
            client: {part: self._encode(tokenizer, rows[part]) for part in ("train", "test", "more")}
            for client, rows in self.job["clients"].items()
        }
        base = AutoModel.from_pretrained(self.job["model"], dtype=torch.float32)
        settings = {"r": self.job["rank"], "lora_alpha": self.job["alpha"], "lora_dropout": self.job["dropout"]}
        encoder = get_peft_model(base, LoraConfig(target_modules=["query", "value"], **settings))
        self.model = Classifier(encoder, self.job["num_labels"]).eval()
        found = {_short(name): tensor for name, tensor in self.model.named_parameters() if tensor.requires_grad}
        self.parameters = {name: found[name] for name in sorted(found)}  # in this order the gradient's norm is summed
        self.chance = torch.Generator().manual_seed(self.job["seed"])

    def _encode(self, tokenizer: Any, rows: list[tuple[str, int]]) -> list[Example]:
        texts = [text for text, _ in rows]
        if not texts:
            return []
        ids = tokenizer(texts, truncation=True, max_length=self.job["max_length"])["input_ids"]
        return [(one, label) for one, (_, label) in zip(ids, rows, strict=True)]

    def forward(self, batch: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Logits and labels, padded to the batch's longest."""
        longest = max(len(ids) for ids, _ in batch)
        tokens = torch.tensor([[*ids, *[self.padding] * (longest - len(ids))] for ids, _ in batch])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch])
        return self.model(tokens, mask), torch.tensor([label for _, label in batch])

    def load(self, adapter: Arrays) -> None:
        """Put an adapter into the model."""
        with torch.no_grad():
            for name, tensor in self.parameters.items():
                tensor.copy_(torch.from_numpy(adapter[name]))

    def train(self, client: str, number: int, received: Arrays) -> Arrays:
        """One client's round; returns what training added."""
        self.load(received)
        parameters, examples = list(self.parameters.values()), self.examples[client]["train"]
        optimizer = torch.optim.AdamW(parameters, lr=self.job["learning_rate"], weight_decay=0.0)
        for indices in self.batches(client, number, len(examples)):
            logits, labels = self.forward([examples[index] for index in indices])
            losses = nn.functional.cross_entropy(logits, labels, reduction="none")
            (losses.sum() / len(indices)).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, self.job["max_grad_norm"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {name: tensor.detach().numpy() - received[name] for name, tensor in self.parameters.items()}

    def batches(self, client: str, number: int, count: int) -> list[list[int]]:
        """The examples of each step."""
        if self.same_batches:
            given: list[list[int]] = self.job["clients"][client]["batches"][number]
            return given
        order: list[int] = torch.randperm(count, generator=self.chance).tolist()
        return [order[start : start + self.job["batch_size"]] for start in range(0, count, self.job["batch_size"])]

    @torch.no_grad()
    def evaluate(self, adapter: Arrays, part: str = "test") -> float:
        """Accuracy on everybody's held-out tweets."""
        self.load(adapter)
        hits = total = 0
        for batch in self.test_batches(part):
            logits, labels = self.forward(batch)
            hits += int((logits.argmax(-1) == labels).sum())
            total += len(batch)
        return hits / total

    def test_batches(self, part: str) -> list[list[Example]]:
        """All held-out tweets as they come, or each client's own by length."""
        tests = [examples[part] for examples in self.examples.values()]
        if self.same_batches:
            pools = [sorted(test, key=lambda one: (len(one[0]), one)) for test in tests]
        else:
            pools = [[one for test in tests for one in test]]
        size = self.job["eval_batch_size"]
        return [pool[start : start + size] for pool in pools for start in range(0, len(pool), size)]

    def run(self, adapter: Arrays) -> tuple[Arrays, list[float]]:
        """All rounds: the mean of the clients' deltas, weighted by their tweets, moves the adapter."""
        curve = [self.evaluate(adapter)]
        for number in range(self.job["rounds"]):
            sums = {name: np.zeros(tensor.shape) for name, tensor in adapter.items()}
            weights = 0
            for client in sorted(self.examples):
                weight = len(self.examples[client]["train"])
                for name, tensor in self.train(client, number, adapter).items():
                    sums[name] += tensor.astype(np.float64) * weight
                weights += weight
            adapter = {name: (adapter[name] + total / weights).astype(np.float32) for name, total in sums.items()}
            curve.append(self.evaluate(adapter))
            print(f"round {number + 1}: {curve[-1]:.1%}", file=sys.stderr)
        return adapter, curve


def _short(name: str) -> str:
    """A parameter's name in the prepared file."""
    short = name.removeprefix("encoder.base_model.model.")
    return short.replace("lora_A.default.weight", "factor_a").replace("lora_B.default.weight", "factor_b")


def main(folder: Path, *, same_batches: bool) -> None:
    """Run, and print accuracy by round and CPU seconds: start-up, and from then on."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    loop = Loop(folder)
    start_up = time.process_time()
    results = {"bare": measured(loop, folder, start_up)}
    if same_batches:
        loop.same_batches = True
        results["same"] = measured(loop, folder, start_up)
    print(json.dumps(results))


def measured(loop: Loop, folder: Path, start_up: float) -> dict[str, Any]:
    """One run of all rounds, and its last adapter on the tweets that only the last one is measured on."""
    began = time.process_time()
    adapter, curve = loop.run(load_file(folder / "initial.safetensors"))
    data = save(adapter)
    work = time.process_time() - began
    more = any(examples["more"] for examples in loop.examples.values())
    return {
        "curve": curve,
        "accuracy": curve[-1],
        "accuracy_all": loop.evaluate(adapter, "more") if more else None,
        "start_up": start_up,
        "work": work,
        "weights_digest": hashlib.sha256(data).hexdigest(),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), same_batches="--same-batches" in sys.argv)
