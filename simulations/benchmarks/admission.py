"""What it costs to let an update in: throughput of `federated.wire.admit`, and its largest memory, by message size.

    python -m simulations.benchmarks.admission [--quick] [--seed N]

An update of 96 tensors, as of LoRA on 48 layers, in messages of 1, 10 and 100 MB (quick: 1, 4 and 16), unsigned and
signed by an enrolled device. All that admission does is in it: size, header, envelope, signature, digest, canonical
form, exact tensors, finite values, norm.

The baseline, in the same run and on the same bytes: `safetensors.numpy.load`, and `isfinite` on every tensor, which is
the least that anybody would do; it knows no sender, no digest and no norm. Runs alternate. Times are processor seconds
of one thread, the median of all runs; memory is what is allocated at the most beside the message itself (tracemalloc).
The last line is one JSON object; its figures are of the largest message, and those of the others under ``sizes``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load

from federated.manifest import AdapterSpec, ModuleSpec, RawTensor, layout_of
from federated.wire import Expectation, admit, encode_tensors, seal_update

__all__ = ["main"]

LAYERS, RANK, MB = 48, 8, 1_000_000
Work = Callable[[], object]


def update_of(nbytes: int, seed: int) -> dict[str, RawTensor]:
    """Random factors of about so many bytes together."""
    width = max(1, nbytes // (4 * 2 * LAYERS * RANK))
    chance = np.random.default_rng(seed)

    def drawn(*shape: int) -> RawTensor:
        return RawTensor.from_array(chance.standard_normal(shape).astype("<f4") / 100)

    names = (f"model.layers.{number}.self_attn.q_proj" for number in range(LAYERS))
    return {
        f"{name}.{factor}": drawn(*shape)
        for name in names
        for factor, shape in {"factor_a": (RANK, width), "factor_b": (width, RANK)}.items()
    }


def works_of(tensors: dict[str, RawTensor], key: Ed25519PrivateKey) -> tuple[int, dict[str, Work]]:
    """The size of the message, and what is measured on it."""
    (width,) = {one.shape[1] for name, one in tensors.items() if name.endswith("factor_a")}
    modules = tuple(
        ModuleSpec(name.removesuffix(".factor_a"), width, width, RANK, 2.0 * RANK)
        for name in sorted(tensors)
        if name.endswith("factor_a")
    )
    spec, layout = AdapterSpec("lora", RANK, 2.0 * RANK, use_rslora=False, modules=modules), layout_of(tensors)
    place: dict[str, Any] = {"run_id": "run", "client_id": "client", "round_number": 1, "phase": 1, "spec": spec}
    place |= {"task_token": "t" * 64, "parent_version": "p" * 64, "base_digest": "b" * 64, "plan_digest": "d" * 64}
    sealed = {
        name: seal_update(tensors, **place, counter=1, num_examples=100, signing_key=one)
        for name, one in {"admit": None, "admit_signed": key}.items()
    }
    keys = {"admit": None, "admit_signed": key.public_key().public_bytes_raw()}

    def admitting(name: str) -> Work:
        expected = Expectation(**place, update_key=keys[name])
        return lambda: admit(sealed[name], expected, layout=layout)

    payload = encode_tensors(tensors)

    def bare() -> bool:
        return all(bool(np.isfinite(array).all()) for array in load(payload).values())

    return len(sealed["admit"]), {"bare": bare, **{name: admitting(name) for name in sealed}}


def seconds_of(works: dict[str, Work], repeats: int) -> dict[str, float]:
    """Median processor time of each; they take turns."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            if turn:  # the first is to warm up
                found[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in found.items()}


def memory_of(work: Work) -> int:
    """Most bytes that are allocated at once while it works."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def measured(nbytes: int, options: argparse.Namespace) -> dict[str, float]:
    """All figures of one size."""
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    size, works = works_of(update_of(nbytes, options.seed), key)
    seconds = seconds_of(works, 5 if options.quick else 15)
    peak = {name: memory_of(work) / size for name, work in works.items()}
    return {
        "message_mb": round(size / MB, 2),
        "admission_mb_per_second": round(size / MB / seconds["admit"], 1),
        "admission_mb_per_second_signed": round(size / MB / seconds["admit_signed"], 1),
        "bare_mb_per_second": round(size / MB / seconds["bare"], 1),
        "admission_over_bare": round(seconds["admit"] / seconds["bare"], 2),
        "admission_over_bare_signed": round(seconds["admit_signed"] / seconds["bare"], 2),
        "admission_peak_memory_over_message": round(peak["admit"], 4),
        "admission_peak_memory_over_message_signed": round(peak["admit_signed"], 4),
        "bare_peak_memory_over_message": round(peak["bare"], 4),
    }


def main() -> None:
    """Measure all sizes, print a table and the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller messages, fewer repeats: some seconds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = [measured(megabytes * MB, options) for megabytes in ((1, 4, 16) if options.quick else (1, 10, 100))]
    table = Table("message", "MB/s", "signed", "bare", "over bare", "memory", "bare's", title="admission of one update")
    for row in rows:
        table.add_row(
            f"{row['message_mb']} MB",
            f"{row['admission_mb_per_second']:.0f}",
            f"{row['admission_mb_per_second_signed']:.0f}",
            f"{row['bare_mb_per_second']:.0f}",
            f"{row['admission_over_bare']:.2f}",
            f"{row['admission_peak_memory_over_message']:.3f}",
            f"{row['bare_peak_memory_over_message']:.3f}",
        )
    Console(stderr=True).print(table)
    print(json.dumps({**rows[-1], "sizes": rows, "seed": options.seed, "quick": options.quick}))


if __name__ == "__main__":
    main()
