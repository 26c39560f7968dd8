"""A device under load: swaps, rollbacks, installs, mixed batches and memory, and the same swaps in one live peft model.

    python -m simulations.benchmarks.device [--quick] [--seed N]

A second process (`parts/device_load.py`) asks with four clients all the time, while 1,000 swaps go to and fro between
two adapters (``--quick``: 150). An output is torn if it is neither adapter's; peft's ``set_adapter`` and
``hotswap_adapter`` on a live model are measured by the same clients and counted the same way. Latencies with and
without swaps are taken in turns, so that other work on the machine falls on both. The model is MiniLM (22.7 million
parameters) with LoRA on query and value.

Besides, an agent is killed (SIGKILL) 200 times at random moments of download, install, activation and commit
(``--quick``: 5 times), and after each kill another one starts on what is left, without a network: see
`simulations.device_kills`.

``*_ms`` are medians of wall time; ratios are medians over interleaved pairs. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from federated.adapters import attach, load_base
from federated.adapters.quiet import quiet_peft
from federated.config import AdapterConfig, ModelConfig, TaskConfig
from federated.device import NULL, AdapterRuntime, Recipe, Slot, TorchBackend
from federated.manifest import VersionManifest, sha256_hex
from federated.release import Artefact, Plan, Publisher, ReleaseClient
from federated.state import AdapterState, from_raw, to_raw
from federated.tasks import make_task
from federated.wire import decode_tensors, encode_tensors
from simulations.benchmarks.parts.device_server import PeftHotswap, PeftSetAdapter, Slots, Target, serving
from simulations.benchmarks.release import ring_in, served
from simulations.device_kills import kill_agents

__all__ = ["Bench", "Load", "main", "show_loads", "under_load"]

Served = Callable[[Target], AbstractContextManager[str]]

PARTS = Path(__file__).resolve().parent / "parts"
CLIENTS = 4
TORN = 1e-3
"""An output further than this from both adapters' is neither's; they are hundreds of times further apart."""
TEXTS = (
    "my flight was late again and nobody said a word", "thank you for the quick answer", "where is my bag",
    "two hours on the phone and no rebooking", "great crew on the way to Denver", "is the 8 am flight on time",
    "lost my seat although I paid for it", "best landing in years",
)  # fmt: skip
LARGE = AdapterConfig(rank=32, target_modules="all-linear", train_head=False)
"""About 5 MB in float32."""


@dataclass(frozen=True)
class Version:
    """A manifest with its bytes."""

    manifest: VersionManifest
    weights: bytes


class Bench:
    """A runtime over one base model, and versions of random weights for it.

    Args:
        seed: of the weights.
        capacity: adapters to keep.
    """

    rows = tuple({"text": text} for text in TEXTS)

    def __init__(self, seed: int, capacity: int = 16) -> None:
        adapter = AdapterConfig(rank=8, train_head=False)  # one head for all: the adapters alone make the difference
        task = TaskConfig(labels=("negative", "neutral", "positive"))
        self.recipe = Recipe(ModelConfig(source="asset:minilm"), adapter, task, 0)
        self.base = load_base(self.recipe.model)
        self.runtime = AdapterRuntime(TorchBackend(self.base, self.recipe), capacity=capacity)
        self._seed = seed
        self._shapes: dict[AdapterConfig, AdapterState] = {}

    @property
    def base_bytes(self) -> int:
        """Of the base's weights."""
        return self.base.num_bytes

    def version(self, number: int, adapter: AdapterConfig | None = None) -> Version:
        """A version whose random factors depend on its number."""
        recipe = replace(self.recipe, adapter=adapter or self.recipe.adapter)
        if recipe.adapter not in self._shapes:
            self._shapes[recipe.adapter] = attach(self.base, recipe.adapter, recipe.task, seed=0).read()
        state = self._shapes[recipe.adapter]
        random = torch.Generator().manual_seed(1000 * self._seed + number)
        tensors = {name: 0.15 * torch.randn(t.shape, generator=random) for name, t in state.tensors.items()}
        weights = encode_tensors(to_raw(tensors))
        record: Any = {key: asdict(getattr(recipe, key)) for key in ("model", "adapter", "task")} | {"seed": 0}
        manifest = VersionManifest(
            weights_digest=sha256_hex(weights),
            base_digest=self.base.base_digest,
            spec=state.spec,
            method="random",
            run_id="benchmark",
            round_number=number,
            task=json.loads(json.dumps(record)),
            adapter_id="benchmark",
            release_counter=number,
        )
        return Version(manifest, weights)

    def install(self, version: Version) -> Slot:
        """Make a version a slot."""
        return self.runtime.install(version.manifest, version.weights, version_id=version.manifest.version_id)


@dataclass
class Load:
    """What clients saw in one phase.

    Args:
        swaps: made meanwhile.
        failed: requests without an answer.
        torn: answers that are neither adapter's.
        mixed_up: answers that are not those of the adapter that is said to have made them.
        in_flight: requests that overlapped in time with one that another adapter answered.
        milliseconds: of each request.
    """

    swaps: int = 0
    failed: int = 0
    torn: int = 0
    mixed_up: int = 0
    in_flight: int = 0
    milliseconds: list[float] = field(default_factory=list)

    def add(self, notes: Sequence[Any], references: dict[str, list[list[float]]]) -> None:
        """Judge what clients noted."""
        answered = [one for one in notes if one[4] is not None]
        self.failed += len(notes) - len(answered)
        for _, row, begin, end, slot, scores in answered:
            self.milliseconds.append((end - begin) * 1000)
            away = {name: _distance(scores, rows[row]) for name, rows in references.items()}
            self.torn += min(away.values()) > TORN
            self.mixed_up += away[slot] > TORN
        self.in_flight += sum(_overlaps(one, answered) for one in answered)

    def percentile(self, share: float) -> float:
        """Of the milliseconds."""
        ordered = sorted(self.milliseconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _distance(scores: Sequence[float], reference: Sequence[float]) -> float:
    return max(abs(one - other) for one, other in zip(scores, reference, strict=True))


def _overlaps(one: Any, others: Sequence[Any]) -> bool:
    return any(other[4] != one[4] and other[2] < one[3] and one[2] < other[3] for other in others)


def under_load(
    target: Target, swaps: int, phases: int, seconds: float, *, serve: Served = serving
) -> tuple[Load, Load]:
    """Ask a target from a second process, in turns without swaps and with them.

    Args:
        target: swapped between its two names.
        swaps: in all.
        phases: how many turns of each.
        seconds: of a turn.
        serve: lets the target be asked at a URL.

    Returns:
        What was seen without and with swaps.
    """
    references = {}
    for name in target.names:
        target.swap(name)
        references[name] = [target.answer(row)[1] for row in range(len(TEXTS))]
    calm, swapped = Load(), Load()
    with serve(target) as url:
        for _ in range(phases):
            calm.add(_asked(url, lambda: time.sleep(seconds)), references)
            swapped.add(_asked(url, lambda: _swap(target, swaps // phases, seconds)), references)
            swapped.swaps += swaps // phases
    return calm, swapped


def _swap(target: Target, count: int, seconds: float) -> None:
    for number in range(count):
        target.swap(target.names[number % 2])
        time.sleep(seconds / count)


def _asked(url: str, meanwhile: Callable[[], None]) -> list[Any]:
    """What clients in a process of their own noted while something else happened here."""
    command = [sys.executable, str(PARTS / "device_load.py"), url, "--clients", str(CLIENTS), "--rows", str(len(TEXTS))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        meanwhile()
        output, _ = process.communicate("\n", timeout=120)
    notes: list[Any] = json.loads(output.splitlines()[-1])
    return notes


def moves(runtime: AdapterRuntime, digests: Sequence[str], count: int) -> dict[str, float]:
    """Medians of activating an installed version, and of rolling back."""
    forth, back = [], []
    for number in range(count):
        forth.append(runtime.activate(digests[number % len(digests)]).milliseconds)
        if number % 2:
            back.append(runtime.rollback().milliseconds)
    return {"activation_ms": statistics.median(forth), "rollback_ms": statistics.median(back)}


def install_from_http(bench: Bench, folder: Path, repeats: int) -> float:
    """Median of: check, fetch and verify a signed version of 5 MB over loopback HTTP, and make it a slot."""
    publisher = Publisher.create(folder / "releases", ring_in(folder / "keys"), Plan(channels=("stable",)))
    root, took = publisher.trusted_root, []

    def read(name: str) -> bytes | None:
        path = publisher.folder / name
        return path.read_bytes() if path.is_file() else None

    with served(read) as (url, _):
        for number in range(1, repeats + 1):
            version = bench.version(1000 + number, LARGE)
            publisher.publish("stable", Artefact(version.manifest, version.weights))
            client = ReleaseClient(root, url, folder / "device")
            began = time.perf_counter()
            client.refresh()
            download = client.download(client.resolve("stable"))
            weights = download.weights.read_bytes()
            bench.runtime.install(download.manifest, weights, version_id=download.version.record.version_id)
            took.append((time.perf_counter() - began) * 1000)
    return statistics.median(took)


def ratio(one: Callable[[], object], other: Callable[[], object], pairs: int) -> float:
    """Median of how much faster ``one`` is than ``other`` (its throughput over the other's), taken in turns."""
    one(), other()
    found = []
    for _ in range(pairs):
        began = time.perf_counter()
        one()
        middle = time.perf_counter()
        other()
        found.append((time.perf_counter() - middle) / (middle - began))
    return statistics.median(found)


def throughput(bench: Bench, digests: Sequence[str], pairs: int) -> dict[str, float]:
    """Batches of eight texts: an adapter against the base, merged against the base, eight adapters against one."""
    runtime, rows = bench.runtime, list(bench.rows)
    merged = runtime.merge(digests[0]).digest
    mixed = list(zip(rows, digests, strict=True))

    def ask(digest: str) -> Callable[[], object]:
        return lambda: runtime.predict(rows, digest=digest)

    alone = {digest: runtime.predict(rows, digest=digest).predictions for digest in digests}
    answers = runtime.predict_mixed(mixed)
    gaps = [
        _distance(list(one.prediction.scores.values()), list(alone[digest][at].scores.values()))
        for at, (one, digest) in enumerate(zip(answers, digests, strict=True))
    ]
    return {
        "adapter_over_base_throughput": ratio(ask(digests[0]), ask(NULL), pairs),
        "merged_over_base_throughput": ratio(ask(merged), ask(NULL), pairs),
        "mixed_8_over_one_adapter_throughput": ratio(lambda: runtime.predict_mixed(mixed), ask(digests[0]), pairs),
        "mixed_8_largest_gap": max(gaps),
        "mixed_8_bit_equal_rows": sum(gap == 0 for gap in gaps),
    }


def memory(counts: Sequence[int]) -> dict[str, float]:
    """Of base and n adapters, in a process of its own."""
    command = [sys.executable, "-m", "simulations.benchmarks.parts.device_memory", *map(str, counts)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PARTS.parents[2])
    made: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return made


def killed(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Kill agents at random moments; what was wrong with what served afterwards."""
    os.environ["no_proxy"] = "127.0.0.1"
    found = kill_agents(folder, kills=count, seed=seed)
    for fault in found.faults:
        print(f"after a kill: {fault}", file=sys.stderr)
    return {"kills": found.kills, "kill_faults": len(found.faults), "kills_that_left_a_transfer": found.resumed}


def peft_targets(bench: Bench, versions: Sequence[Version], folder: Path) -> dict[str, Target]:
    """The same two adapters in live peft models."""
    states = [AdapterState(one.manifest.spec, from_raw(decode_tensors(one.weights))) for one in versions]
    task = make_task(bench.recipe.task, bench.base.tokenizer)
    batches = [task.collate(task.encode([{**row, "label": 0}])) for row in bench.rows]
    for batch in batches:
        del batch["labels"]
    with bench.runtime.pin(NULL) as slot, quiet_peft():
        parts = (bench.base, slot.handle.model, states, batches.__getitem__)
        hot = PeftHotswap(*parts)
        hot.save(folder)
        return {"peft_set_adapter": PeftSetAdapter(*parts), "peft_hotswap": hot}


def show_loads(console: Console, loads: Mapping[str, tuple[Load, Load]]) -> None:
    """What clients saw, for people."""
    table = Table("target", "swaps", "answers", "failed", "torn", "in flight with another", "p50 ms", "p99 ms")
    for name, (calm, swapped) in loads.items():
        for label, one in ((f"{name}, calm", calm), (name, swapped)):
            counts = [one.swaps, len(one.milliseconds), one.failed, one.torn, one.in_flight]
            times = [f"{one.percentile(share):.1f}" for share in (0.5, 0.99)]
            table.add_row(label, *map(str, counts), *times)
    console.print(table)


def show(loads: Mapping[str, tuple[Load, Load]], result: Mapping[str, Any]) -> None:
    """All of it for people."""
    console = Console(width=120)
    show_loads(console, loads)
    table = Table("measured", "value")
    for name, value in result.items():
        table.add_row(name, f"{value:g}" if isinstance(value, float) else str(value))
    console.print(table)


def measure(seed: int, *, quick: bool, folder: Path) -> tuple[dict[str, tuple[Load, Load]], dict[str, Any]]:
    """Everything; first what forks, while this process has one thread."""
    kills = killed(folder / "kills", 5 if quick else 200, seed)
    bench = Bench(seed)
    versions = [bench.version(number) for number in range(1, 9)]
    digests = [bench.install(one).digest for one in versions]
    swaps, phases, seconds = (150, 2, 1.5) if quick else (1000, 5, 6.0)
    targets: dict[str, Target] = {"slots": Slots(bench.runtime, (digests[0], digests[1]), bench.rows)}
    targets |= peft_targets(bench, versions[:2], folder / "peft")
    loads = {"slots": under_load(targets["slots"], swaps, phases, seconds)}
    for name in ("peft_set_adapter", "peft_hotswap"):
        loads[name] = under_load(targets[name], swaps // 5, 1, seconds)
    calm, swapped = loads["slots"]
    result: dict[str, Any] = {
        "torn_outputs": calm.torn + swapped.torn + swapped.mixed_up,
        "failed_requests": calm.failed + swapped.failed,
        "swaps": swapped.swaps,
        "requests": len(swapped.milliseconds),
        "p50_swap_over_no_swap": swapped.percentile(0.5) / calm.percentile(0.5),
        "p99_swap_over_no_swap": swapped.percentile(0.99) / calm.percentile(0.99),
        "requests_beside_another_version": swapped.in_flight,
        "two_versions_in_flight": swapped.in_flight > 0,
    }
    for name in ("peft_set_adapter", "peft_hotswap"):
        result[f"{name}_torn"] = loads[name][1].torn
        result[f"{name}_requests"] = len(loads[name][1].milliseconds)
    result |= moves(bench.runtime, digests[:2], 400 if quick else 4000)
    result |= throughput(bench, digests, 7 if quick else 40)
    result["install_5mb_ms"] = install_from_http(bench, folder, 3 if quick else 15)
    result |= memory((1, 16, 128))
    result |= kills
    return loads, {name: round(one, 6) if isinstance(one, float) else one for name, one in result.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: fewer swaps and repeats")
    parser.add_argument("--seed", type=int, default=0, help="of the adapters' weights")
    options = parser.parse_args()
    torch.set_num_threads(1)  # requests come side by side; each takes one core
    with tempfile.TemporaryDirectory() as place:
        loads, result = measure(options.seed, quick=options.quick, folder=Path(place))
    show(loads, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
