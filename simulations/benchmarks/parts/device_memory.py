"""Memory of one base model with n adapters beside it, in a process of its own.

    python simulations/benchmarks/parts/device_memory.py COUNT [COUNT ...]

The last line is one JSON object: of each count the megabytes of the process beyond those with the base alone, and the
adapters' own tensors. Only memory that no file stands for is counted. Called by `simulations/benchmarks/device.py`.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

__all__ = ["main"]


def own_mb() -> float:
    """Megabytes of this process that no file stands for: the kernel drops and reloads the others as it likes."""
    gc.collect()
    (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("RssAnon:")]
    return int(line.split()[1]) / 1000


def main() -> None:
    """Install one after another and look."""
    from simulations.benchmarks.device import Bench

    counts = sorted(int(one) for one in sys.argv[1:])
    bench = Bench(seed=0, capacity=max(counts))
    bench.runtime.predict(bench.rows)
    bench.version(0)  # loads peft, which is 50 MB of code and not an adapter
    before = own_mb()
    made = {"base_mb": round(bench.base_bytes / 1e6, 1), "process_mb": round(before, 1)}
    for number in range(1, max(counts) + 1):
        bench.install(bench.version(number))
        if number in counts:
            made[f"memory_mb_{number}"] = round(own_mb() - before, 1)
            made[f"tensors_mb_{number}"] = round(bench.runtime.nbytes / 1e6, 1)
    print(json.dumps(made))


if __name__ == "__main__":
    main()
