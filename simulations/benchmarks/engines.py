"""What an engine costs: in-process against Flower's Ray engine, and against a bare loop written by hand.

    python simulations/benchmarks/engines.py [--quick] [--seed N] [--repeats N] [--clients N] [--rounds N]

One federation of small clients, three times: each engine in a fresh process of its own, start-up included, with the
same two workers. The client's work is 4 AdamW steps of 8 x 16 tokens on a 2-layer Llama (hidden size 128, a token per
byte, LoRA r=8) and an evaluation of what it received. The engines publish every round and write the report; the bare
loop (`parts/bare_federation.py`) does nothing but train and average.

Runs take turns; each ratio is the median over the repeats. Memory is the peak of the proportional set sizes (PSS) of
all processes together: it is sampled in a run of its own, which is not timed, except with ``--quick``. CPU seconds
count every process that an engine leaves behind. Linux only. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from federated.config import ExperimentConfig

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[2]
BARE = Path(__file__).resolve().parent / "parts" / "bare_federation.py"
ENGINES = ("bare", "inprocess", "ray")
WORKERS, BATCH, STEPS, LENGTH, HELD_OUT = 2, 8, 4, 16, 8
PERIOD = 0.25  # seconds between looks at memory
PR_SET_CHILD_SUBREAPER = 36
OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Figures:
    """One run of one engine.

    Args:
        wall: seconds from start to exit.
        cpu: seconds of all its processes, user and system.
        memory: peak of the processes' PSS together, in MB; 0 where it was not sampled.
        digest: SHA-256 of the last adapter.
    """

    wall: float
    cpu: float
    memory: float
    digest: str


# ---- what runs in a process of its own -------------------------------------------------------------------------------


def overrides(folder: Path, *, seed: int, clients: int, rounds: int) -> list[str]:
    """The federation as ``fedpeft simulate`` takes it; ``engine`` and ``run_dir`` come on top."""
    return [
        "name=engines", f"rounds={rounds}", f"seed={seed}", f"selection.min_clients={clients}",
        "model=tiny_llama", f"model.source={folder / 'model'}",
        "adapter=lora", "adapter.rank=8", "adapter.target_modules=[q_proj,v_proj]",
        "task=causal_lm", f"task.max_length={LENGTH}",
        "data=table", f"data.path={folder / 'table.jsonl'}",
        f"data.test_fraction={HELD_OUT / (STEPS * BATCH + HELD_OUT)}",
        "train=adamw", "train.learning_rate=0.001", f"train.batch_size={BATCH}", f"train.eval_batch_size={BATCH}",
        "train.precision=float32", "train.device=cpu", f"engine.workers={WORKERS}", "tracking.progress=false",
    ]  # fmt: skip


def prepare(folder: Path, *, seed: int, clients: int, rounds: int) -> None:
    """Write the model and the examples, and what the bare loop reads instead of a configuration."""
    import torch
    from safetensors.numpy import save_file

    from federated.cli.compose import compose
    from federated.flower import open_session

    torch.set_num_threads(1)
    _make_model(folder / "model", seed)
    _make_table(folder, seed, clients)
    config = compose(ROOT, overrides(folder, seed=seed, clients=clients, rounds=rounds))
    session = open_session(config)
    save_file(
        {name: tensor.numpy() for name, tensor in session.initial.tensors.items()}, folder / "initial.safetensors"
    )
    parts = {}
    for client in session.source.client_ids:
        data = session.source.load(client)
        parts[client] = {
            "train": [row["text"] for row in data.train],
            "test": [row["text"] for row in data.test],
            "batches": [_batches(config, client, number) for number in range(1, rounds + 1)],
        }
    bare = {"model": str(folder / "model"), "rounds": rounds, "workers": WORKERS, "clients": parts}
    settings = {"learning_rate": config.train.learning_rate, "rank": config.adapter.rank, "alpha": config.adapter.alpha}
    (folder / "bare.json").write_text(json.dumps(bare | settings))


def _batches(config: ExperimentConfig, client: str, number: int) -> list[list[int]]:
    """The order in which that client sees its examples in that round."""
    from federated.tasks.batching import step_groups
    from federated.training import client_seed

    groups = step_groups([LENGTH] * (STEPS * BATCH), config.train, client_seed(config.seed, number, client))
    return [batch for group in groups for batch in group]


def _make_model(folder: Path, seed: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from federated.adapters.tiny import byte_tokenizer

    tokenizer = byte_tokenizer(chat=False)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=336, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_table(folder: Path, seed: int, clients: int) -> None:
    """One file with a client column; every text is ``LENGTH`` tokens with its end."""
    import random
    import string

    chance = random.Random(seed)  # noqa: S311 - made-up examples
    with (folder / "table.jsonl").open("w") as file:
        for client in range(clients):
            for _ in range(STEPS * BATCH + HELD_OUT):
                text = "".join(chance.choices(string.ascii_lowercase, k=LENGTH - 1))
                file.write(json.dumps({"client": f"client-{client:04d}", "text": text}) + "\n")


# ---- what measures ---------------------------------------------------------------------------------------------------


def descendants(root: int) -> Iterator[int]:
    """Process ids below ``root``."""
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                found = [int(child) for child in path.read_text().split()]
            except OSError:
                continue
            yield from found
            waiting += found


def total_pss() -> float:
    """Proportional set size of all processes below this one, in MB."""
    total = 0
    for pid in descendants(os.getpid()):
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    return total / 1000


class PeakMemory:
    """Samples in a thread until `stop`, which gives the peak in MB."""

    def __init__(self) -> None:
        self._peak = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._done.wait(PERIOD):
            self._peak = max(self._peak, total_pss())

    def stop(self) -> float:
        """The peak so far."""
        self._done.set()
        self._thread.join()
        return self._peak


def measure(engine: str, folder: Path, *, options: list[str], sample: bool) -> Figures:
    """Run one engine in a fresh process and wait until all that it started is gone."""
    run = folder / f"run-{time.time_ns()}"
    command = [sys.executable, str(BARE), str(folder), str(run)]
    if engine != "bare":
        command = [sys.executable, "-m", "federated.cli.main", "simulate", f"--app={ROOT}", *options]
        command += [f"engine.name={engine}", f"run_dir={run}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = PeakMemory() if sample else None
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False)
    wall = time.perf_counter() - began
    memory = peak.stop() if peak else 0.0
    if done.returncode:
        raise SystemExit(f"engine {engine} failed:\n{done.stderr[-4000:]}")
    _reap()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Figures(wall, cpu, memory, json.loads((run / "versions.json").read_text())[-1]["weights_digest"])


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **OFFLINE, "PYTHONPATH": path}


def _reap() -> None:
    """Wait for the daemons that an engine left: as their reaper we get their CPU seconds too."""
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def compare(folder: Path, *, options: list[str], repeats: int, combined: bool) -> dict[str, list[Figures]]:
    """All runs, in turns; the last of each engine has its memory sampled."""
    found: dict[str, list[Figures]] = {engine: [] for engine in ENGINES}
    for turn in range(repeats + (not combined)):
        for engine in ENGINES if turn % 2 == 0 else reversed(ENGINES):
            sample = combined or turn == repeats
            figures = measure(engine, folder, options=options, sample=sample)
            found[engine].append(figures)
            memory = f", {figures.memory:.0f} MB" if sample else ""
            print(f"{engine}: {figures.wall:.1f} s, {figures.cpu:.1f} CPU-s{memory}", file=sys.stderr)
    return found


def results(found: dict[str, list[Figures]], repeats: int) -> dict[str, Any]:
    """The ratios and the raw figures."""

    def ratio(above: str, below: str, figure: str) -> float:
        pairs = zip(found[above][:repeats], found[below][:repeats], strict=True)
        return float(round(statistics.median(getattr(one, figure) / getattr(other, figure) for one, other in pairs), 3))

    def peak(engine: str) -> float:
        return float(max(figures.memory for figures in found[engine]))

    return {
        "ray_over_inprocess_wall": ratio("ray", "inprocess", "wall"),
        "ray_over_inprocess_cpu": ratio("ray", "inprocess", "cpu"),
        "ray_over_inprocess_memory": round(peak("ray") / peak("inprocess"), 3),
        "inprocess_over_bare": ratio("inprocess", "bare", "wall"),
        "inprocess_over_bare_cpu": ratio("inprocess", "bare", "cpu"),
        "same_adapter": len({figures.digest for runs in found.values() for figures in runs}) == 1,
        "wall_seconds": {name: [round(one.wall, 2) for one in runs[:repeats]] for name, runs in found.items()},
        "cpu_seconds": {name: [round(one.cpu, 2) for one in runs[:repeats]] for name, runs in found.items()},
        "peak_pss_mb": {name: round(peak(name), 1) for name in found},
    }


def show(result: dict[str, Any], title: str) -> None:
    """A table on standard error."""
    table = Table("engine", "wall (s)", "CPU (s)", "peak PSS (MB)", title=title)
    for engine in ENGINES:
        wall, cpu = (statistics.median(result[key][engine]) for key in ("wall_seconds", "cpu_seconds"))
        table.add_row(engine, f"{wall:.2f}", f"{cpu:.2f}", f"{result['peak_pss_mb'][engine]:.0f}")
    Console(stderr=True).print(table)


def main() -> None:
    """Prepare, run every engine in turn, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute on two cores: one run of each engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, help="timed runs of each engine (default 3, with --quick 1)")
    parser.add_argument("--clients", type=int, help="default 100, with --quick 40")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    clients = arguments.clients or (40 if arguments.quick else 100)
    size = {"seed": arguments.seed, "clients": clients, "rounds": arguments.rounds}
    if arguments.prepare:
        prepare(arguments.prepare, **size)
        return
    repeats = arguments.repeats or (1 if arguments.quick else 3)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory(prefix="engines-") as name:
        given = [f"--{key}={value}" for key, value in size.items()]
        # In a process of its own: what this one maps would be shared with the engines, and hide their memory.
        subprocess.run([sys.executable, __file__, f"--prepare={name}", *given], env=_environment(), check=True)
        options = overrides(Path(name), **size)
        found = compare(Path(name), options=options, repeats=repeats, combined=arguments.quick)
    result = results(found, repeats)
    show(result, f"{clients} clients, {arguments.rounds} rounds, {WORKERS} workers")
    print(json.dumps(result | size | {"quick": arguments.quick}))


if __name__ == "__main__":
    main()
