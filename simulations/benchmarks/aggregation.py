"""What exact aggregation of LoRA products costs: against the dense way, against factor averaging; and its memory.

    python simulations/benchmarks/aggregation.py [--quick] [--seed N]

Time: K clients' factors of one d x d layer, rank r, in float64 on one thread. ``dense`` forms ``sum_k p_k B_k A_k`` and
takes its SVD; ``exact`` is `federated.lowrank` (two thin QR, one SVD of a K r x K r core); ``sketch`` its randomised
form; ``factor mean`` averages A and B on their own. Errors are distances from the true sum, less the optimum's,
relative to the sum's norm. Where K r reaches d there is nothing to gain, and the table says so.

Memory: updates of 1 MB (10 MB without ``--quick``) are made one at a time and handed to FedIT's accumulator, and the
same arrays to Flower's FedAvg, each in a process of its own, imports included: its peak resident memory. No process may
have more than ``--bound`` GB: one that wants more is stopped, and its peak is given as that bound. Without ``--quick``
every other rule that is a sum follows, with factors of 768 x 768 layers at rank 16 that add up to the same bytes.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from federated.lowrank import LowRank, balanced_factors, decompose, sketch, sum_of

__all__ = ["main"]

HEADLINE = (2048, 16, 16)
SIDE, RANK = 768, 16
QUICK = ((768, 8, 8), (768, 32, 8), HEADLINE)
FULL = tuple((side, clients, rank) for side in (768, 2048, 4096) for clients in (8, 32, 128) for rank in (8, 16))
DENSE_LIMIT = 2048
"""A dense SVD of a larger side takes minutes: left out with ``--quick``."""


@dataclass(frozen=True)
class Row:
    """Seconds and errors at one size; NaN where it was not run."""

    side: int
    clients: int
    rank: int
    dense: float
    exact: float
    sketch: float
    factor_mean: float
    exact_error: float
    sketch_error: float


def clients_of(side: int, count: int, rank: int, generator: torch.Generator) -> list[LowRank]:
    """Factors as they are after training: a common part, and each client's own."""

    def drawn(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64) / math.sqrt(side)

    left, right = drawn(side, rank), drawn(rank, side)
    return [LowRank(left + 0.3 * drawn(side, rank), right + 0.3 * drawn(rank, side)) for _ in range(count)]


def timed(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median seconds of some runs, and the last result."""
    seconds, result = [], None
    for _ in range(repeats):
        began = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), result


def measure(size: tuple[int, int, int], *, seed: int, dense: bool) -> Row:
    """All ways at one size."""
    side, count, rank = size
    generator = torch.Generator().manual_seed(seed)
    products = clients_of(side, count, rank, generator)
    weights = [1 / count] * count

    def exact() -> LowRank:
        found = decompose(sum_of(zip(weights, products, strict=True)))
        factor_a, factor_b = balanced_factors(found, rank=rank, scaling=1.0)
        return LowRank(factor_b, factor_a)

    def sketched() -> LowRank:
        chance = torch.Generator().manual_seed(seed)
        found = sketch(sum_of(zip(weights, products, strict=True)), rank, generator=chance)
        return LowRank(found.u * found.s, found.v.T)

    def factor_mean() -> LowRank:
        left = sum(weight * one.left for weight, one in zip(weights, products, strict=True))
        right = sum(weight * one.right for weight, one in zip(weights, products, strict=True))
        return LowRank(torch.as_tensor(left), torch.as_tensor(right))

    def densely() -> tuple[Tensor, Tensor]:
        total = torch.zeros(side, side, dtype=torch.float64)
        for weight, one in zip(weights, products, strict=True):
            total += weight * one.dense()
        return total, torch.linalg.svd(total, full_matrices=False).S

    seconds_dense, reference = timed(densely, 1) if dense else (math.nan, None)
    seconds_exact, found = timed(exact, 3)
    seconds_sketch, near = timed(sketched, 3)
    errors = _errors(reference, found=found, near=near, rank=rank) if reference else (math.nan, math.nan)
    return Row(side, count, rank, seconds_dense, seconds_exact, seconds_sketch, timed(factor_mean, 9)[0], *errors)


def _errors(reference: tuple[Tensor, Tensor], *, found: LowRank, near: LowRank, rank: int) -> tuple[float, float]:
    total, values = reference
    size, best = float(total.norm()), float(values[rank:].norm())
    distances = [float((one.dense() - total).norm()) for one in (found, near)]
    return max(0.0, distances[0] - best) / size, max(0.0, distances[1] - best) / size


# ---- memory ----------------------------------------------------------------------------------------------------------


def updates(count: int, megabytes: float, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Named updates, one at a time."""
    generator = torch.Generator().manual_seed(seed)
    size = int(megabytes * 1e6 / 4)
    for number in range(count):
        yield f"client-{number:04d}", torch.rand(size, generator=generator)


def ours(count: int, megabytes: float, seed: int) -> None:
    """FedIT's accumulator, fed one update at a time."""
    from federated.aggregation import FedIT
    from federated.delta import Update
    from federated.global_state import GlobalState
    from federated.manifest import AdapterSpec
    from federated.state import AdapterState

    spec = AdapterSpec("lora", 1, 1.0, use_rslora=False, modules=())
    state = GlobalState(AdapterState(spec, {"head.weight": torch.zeros(int(megabytes * 1e6 / 4))}))
    accumulator = FedIT().start(state, 1)
    for client_id, tensor in updates(count, megabytes, seed):
        accumulator.add(Update(client_id, {"head.weight": tensor}, num_examples=1), 1.0)
    accumulator.finish()


def flower(count: int, megabytes: float, seed: int) -> None:
    """Flower's FedAvg on the same arrays."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp.strategy import FedAvg
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0

    def replies() -> Iterator[Message]:
        for _, tensor in updates(count, megabytes, seed):
            arrays = ArrayRecord({"head.weight": Array(tensor.numpy())})
            content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
            asked = Message(RecordDict({"config": ConfigRecord()}), 1, "train")
            yield Message(content, reply_to=asked)

    FedAvg().aggregate_train(1, replies())


def one_round(name: str, count: int, megabytes: float, seed: int) -> None:
    """A whole round of a rule, in all its exchanges, fed one update at a time."""
    from federated.aggregation import ClientView, NextPhase, make_rule
    from federated.delta import Update
    from federated.global_state import GlobalState
    from federated.manifest import AdapterSpec, ModuleSpec
    from federated.state import AdapterState
    from federated.uploads import layout, unpack

    rule, generator = make_rule(name), torch.Generator().manual_seed(seed)
    layers = max(1, round(megabytes * 1e6 / (2 * SIDE * RANK * 4)))
    modules = tuple(ModuleSpec(f"layer{number}", SIDE, SIDE, RANK, 2.0 * RANK) for number in range(layers))
    spec = AdapterSpec(rule.properties.adapter, RANK, 2.0 * RANK, use_rslora=False, modules=modules)
    shapes = {"factor_a": (RANK, SIDE), "factor_b": (SIDE, RANK), **({"core": (RANK, RANK)} if spec.has_core else {})}
    tensors = {
        f"{module.name}.{group}": torch.rand(shape, generator=generator) / SIDE
        for module in modules
        for group, shape in shapes.items()
    }
    state, phase = GlobalState(AdapterState(spec, tensors), rule_state=rule.init(spec)), 1
    for _ in range(rule.properties.phases):
        accumulator = rule.start(state, phase)
        for number in range(count):
            plan, payload = rule.plan(state, ClientView(f"client-{number:04d}"), phase)
            sent = {one.name: torch.rand(one.shape, generator=generator) / SIDE for one in layout(plan, payload)}
            update = Update(f"client-{number:04d}", unpack(plan, payload, sent), num_examples=1, received=payload)
            accumulator.add(update, 1.0)
        result = accumulator.finish()
        if isinstance(result, NextPhase):
            state, phase = result.state, result.phase


def sum_rules() -> list[str]:
    """Every rule whose aggregate is a sum of messages."""
    from federated.aggregation import RULES, make_rule

    return [name for name in sorted(RULES) if make_rule(name).properties.linear]


def child(kind: str, count: int, megabytes: float, seed: int) -> None:
    """Run one of them and print the peak of this process's resident memory, in MB."""
    torch.set_num_threads(1)
    if kind in ("ours", "flower"):
        {"ours": ours, "flower": flower}[kind](count, megabytes, seed)
    else:
        one_round(kind, count, megabytes, seed)
    print(json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000}))


def peak_of(kind: str, count: int, megabytes: float, options: argparse.Namespace) -> float:
    """The same in a fresh process, which is stopped when it wants more than the bound: that is its peak then."""
    command = [sys.executable, __file__, "--child", kind, str(count), str(megabytes), f"--seed={options.seed}"]
    size = int(options.bound * 1e9)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (size, size)),
    )
    if done.returncode and any(word in done.stderr for word in ("MemoryError", "alloc", "memory")):
        print(f"{kind} with {count} clients was stopped at {options.bound:g} GB", file=sys.stderr)
        return size / 1e6
    if done.returncode:
        raise SystemExit(f"{kind} with {count} clients failed:\n{done.stderr[-2000:]}")
    print(f"{kind} with {count} clients: done", file=sys.stderr)
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mb"])


# ---- result ----------------------------------------------------------------------------------------------------------


def show(rows: list[Row], memory: dict[str, dict[int, float]]) -> None:
    """Two tables on standard error."""
    console = Console(stderr=True)
    table = Table("d", "K", "r", "dense (s)", "exact (s)", "sketch (s)", "factor mean (s)", "dense / exact", "error",
                  "sketch's error", title="One layer, float64, one thread")  # fmt: skip
    for row in rows:
        gain = (
            "K r reaches d: nothing is gained" if row.clients * row.rank >= row.side else f"{row.dense / row.exact:.0f}"
        )
        seconds = (f"{value:.4f}" for value in (row.dense, row.exact, row.sketch, row.factor_mean))
        errors = (f"{row.exact_error:.1e}", f"{row.sketch_error:.1e}")
        table.add_row(str(row.side), str(row.clients), str(row.rank), *seconds, gain, *errors)
    console.print(table)
    peaks = Table("clients", *memory, title="Peak memory (MB)")
    for count in next(iter(memory.values())):
        peaks.add_row(str(count), *(f"{memory[kind][count]:.0f}" for kind in memory))
    console.print(peaks)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: three sizes, updates of 1 MB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bound", type=float, default=8.0, help="GB of memory that one process may have")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, count, megabytes = options.child
        child(kind, int(count), float(megabytes), options.seed)
        return
    torch.set_num_threads(1)
    rows = []
    for size in QUICK if options.quick else FULL:
        rows.append(measure(size, seed=options.seed, dense=not options.quick or size[0] <= DENSE_LIMIT))
        print(f"d={size[0]} K={size[1]} r={size[2]}: done", file=sys.stderr)
    if HEADLINE not in {(row.side, row.clients, row.rank) for row in rows}:
        rows.append(measure(HEADLINE, seed=options.seed, dense=True))
    megabytes = 1.0 if options.quick else 10.0
    counts = (10, 100, 1000)
    kinds = ["ours", "flower", *([] if options.quick else sum_rules())]
    memory = {kind: {n: peak_of(kind, n, megabytes, options) for n in counts} for kind in kinds}
    show(rows, memory)
    head = next(row for row in rows if (row.side, row.clients, row.rank) == HEADLINE)
    result = {
        "dense_over_exact_time": round(head.dense / head.exact, 1),
        "exact_relative_error": head.exact_error,
        "exact_over_factor_mean_time": round(head.exact / head.factor_mean, 1),
        "exact_over_sketch_time": round(head.exact / head.sketch, 2),
        "sketch_relative_error": head.sketch_error,
        "memory_1000_over_10": round(memory["ours"][1000] / memory["ours"][10], 3),
        "flower_memory_1000_over_ours": round(memory["flower"][1000] / memory["ours"][1000], 2),
        "rules_memory_1000_over_10": {kind: round(memory[kind][1000] / memory[kind][10], 3) for kind in kinds[2:]},
        "bound_gb": options.bound,
        "rows": [asdict(row) for row in rows],
        "peak_mb": memory,
        "megabytes_per_update": megabytes,
        "seed": options.seed,
        "quick": options.quick,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
