"""Memory of one base model with n adapters beside it, in a process of its own.

    python simulations/benchmarks/parts/device_memory.py COUNT [COUNT ...]

The last line is one JSON object: of each count the megabytes of the process beyond those with the base alone, and the
adapters' own tensors. Called by `simulations/benchmarks/device.py`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

__all__ = ["main"]


def resident_mb() -> float:
    """Megabytes of this process in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    """Install one after another and look."""
    from simulations.benchmarks.device import Bench

    counts = sorted(int(one) for one in sys.argv[1:])
    bench = Bench(seed=0, capacity=max(counts))
    bench.runtime.predict(bench.rows)
    before = resident_mb()
    made = {"base_mb": round(bench.base_bytes / 1e6, 1), "process_mb": round(before, 1)}
    for number in range(1, max(counts) + 1):
        bench.install(bench.version(number))
        if number in counts:
            made[f"memory_mb_{number}"] = round(resident_mb() - before, 1)
            made[f"tensors_mb_{number}"] = round(bench.runtime.nbytes / 1e6, 1)
    print(json.dumps(made))


if __name__ == "__main__":
    main()
