"""A server under load: swaps while a second process asks over HTTP, and what an adapter costs a request.

    python -m simulations.benchmarks.serving [--quick] [--seed N]

The load is that of `simulations.benchmarks.device` (four clients, outputs judged one by one), here against the server
of ``fedpeft serve`` on a port of this machine: 1,000 swaps (``--quick``: 150) of the active adapter of MiniLM, phases
with and without swaps in turns. Then one client alone: a text by the null adapter, by an adapter, and by the adapter
merged into copies of its layers, in turns, beside the same calls in Python without HTTP; and eight clients whose texts
are for eight adapters, against eight clients of one.

``*_ms`` are medians of wall time, ratios medians over turns. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import torch
from rich.console import Console
from rich.table import Table

from federated.device import NULL
from federated.device.serving import Control, Directory, Service, public_listener, serve
from simulations.benchmarks.device import TEXTS, Bench, Load, show_loads, under_load
from simulations.benchmarks.parts.device_server import Slots, Target

__all__ = ["main"]

ROWS = [{"text": f"row {number}"} for number in range(len(TEXTS))]
"""What the load's HTTP clients ask for."""
NAMES = tuple(f"adapter-{number}" for number in range(8))


@contextmanager
def listening(service: Service) -> Iterator[str]:
    """Serve on a free port from a thread; yields the URL."""
    listener, stop, started = public_listener(service, port=0), threading.Event(), threading.Event()
    thread = threading.Thread(target=serve, args=(service, [listener]), kwargs={"started": started.set, "stop": stop})
    thread.start()
    try:
        started.wait()
        yield listener.place
    finally:
        stop.set()
        thread.join()


def new_service(bench: Bench) -> Service:
    """A server over a benchmark's runtime; an event loop is used once."""
    return Service(bench.runtime, Control(bench.runtime, Directory(bench.runtime, "minilm")), speaks="labels")


def swapped(bench: Bench, digests: Sequence[str], *, quick: bool) -> tuple[Load, Load]:
    """What four clients saw over HTTP, without and with swaps."""
    swaps, phases, seconds = (150, 2, 2.0) if quick else (1000, 5, 12.0)

    @contextmanager
    def over_http(_: Target) -> Iterator[str]:
        with listening(new_service(bench)) as url:
            yield url

    return under_load(Slots(bench.runtime, (digests[0], digests[1]), ROWS), swaps, phases, seconds, serve=over_http)


def costs(bench: Bench, url: str, models: dict[str, str], repeats: int) -> dict[str, float]:
    """Milliseconds of one text, over HTTP and in Python, by what answers; all of them in turns."""
    took: dict[str, list[float]] = {f"{kind}_{name}": [] for name in models for kind in ("http", "python")}
    with httpx.Client(base_url=url, timeout=60) as client:
        for turn in range(repeats + 3):
            for name, digest in models.items():
                model = NULL if digest == NULL else f"{name}@sha256:{digest}" if len(digest) == 64 else name
                asked = _timed(lambda model=model: _ask(client, model))  # type: ignore[misc]
                called = _timed(lambda digest=digest: bench.runtime.predict(ROWS[:1], digest=digest))  # type: ignore[misc]
                if turn >= 3:
                    took[f"http_{name}"].append(asked)
                    took[f"python_{name}"].append(called)
    made = {f"{name}_ms": statistics.median(times) for name, times in took.items()}
    for name in ("adapter", "merged"):
        pairs = zip(took[f"http_{name}"], took["http_null"], strict=True)
        made[f"{name}_over_null_latency"] = statistics.median(one / other for one, other in pairs)
    return made


def mixture(url: str, repeats: int, seconds: float) -> dict[str, float]:
    """Answers per second of eight clients for eight adapters, over those of eight for one."""
    ratios = []
    for _ in range(repeats):
        many, one = _rate(url, NAMES, seconds), _rate(url, NAMES[:1] * len(NAMES), seconds)
        ratios.append(many / one)
    return {"eight_adapters_over_one_throughput": statistics.median(ratios)}


def _rate(url: str, models: Sequence[str], seconds: float) -> float:
    counts, until = [0] * len(models), time.perf_counter() + seconds

    def ask(at: int) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while time.perf_counter() < until:
                _ask(client, models[at])
                counts[at] += 1

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


def _ask(client: httpx.Client, model: str) -> None:
    client.post("/classify", json={"input": ROWS[0]["text"], "model": model}).raise_for_status()


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1000


def measure(seed: int, *, quick: bool) -> tuple[tuple[Load, Load], dict[str, Any]]:
    """Everything."""
    bench = Bench(seed)
    digests = [bench.install(bench.version(number)).digest for number in range(1, len(NAMES) + 1)]
    calm, loaded = swapped(bench, digests, quick=quick)
    result: dict[str, Any] = {
        "torn_outputs": calm.torn + loaded.torn + loaded.mixed_up,
        "failed_requests": calm.failed + loaded.failed,
        "swaps": loaded.swaps,
        "requests": len(loaded.milliseconds),
        "two_versions_in_flight": loaded.in_flight > 0,
    }
    for share in (0.5, 0.99):
        name = f"p{round(share * 100)}"
        result |= {f"{name}_ms": calm.percentile(share), f"{name}_swap_ms": loaded.percentile(share)}
        result[f"{name}_swap_over_no_swap"] = loaded.percentile(share) / calm.percentile(share)
    merged = bench.runtime.merge(digests[0]).digest
    names = {**dict(zip(NAMES, digests, strict=True)), "adapter": digests[0], "merged": merged}
    for name, digest in names.items():
        bench.runtime.reroute(lambda routes, name=name, digest=digest: routes.named(name, digest))  # type: ignore[misc]
    with listening(new_service(bench)) as url:
        result |= costs(bench, url, {"null": NULL, "adapter": digests[0], "merged": merged}, 20 if quick else 100)
        result |= mixture(url, *((1, 1.5) if quick else (5, 4.0)))
    return (calm, loaded), {key: round(one, 6) if isinstance(one, float) else one for key, one in result.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: fewer swaps and repeats")
    parser.add_argument("--seed", type=int, default=0, help="of the adapters' weights")
    options = parser.parse_args()
    torch.set_num_threads(1)
    loads, result = measure(options.seed, quick=options.quick)
    console = Console(width=120)
    show_loads(console, {"serve": loads})
    table = Table("measured", "value")
    for name, value in result.items():
        table.add_row(name, f"{value:g}" if isinstance(value, float) else str(value))
    console.print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
