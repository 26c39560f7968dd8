"""What Prometheus reads: requests, latencies, tokens, and what the runtime holds at that moment. No input, no user."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from federated.device.serving.control import Control
from federated.device.slots import AdapterRuntime

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """One server's numbers.

    Args:
        runtime: asked when the numbers are read.
        control: knows whether the channel is followed.
    """

    def __init__(self, runtime: AdapterRuntime, control: Control) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "fedpeft_requests", "Requests by endpoint and status", ["endpoint", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "fedpeft_request_seconds",
            "From a request's last byte to its answer's",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._first = Histogram(
            "fedpeft_first_token_seconds",
            "From a request to its first token",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._tokens = Counter("fedpeft_tokens", "Tokens read and written", ["kind"], registry=self._registry)
        self._rows = Histogram("fedpeft_batch_rows", "Rows in one batch", buckets=_ROWS, registry=self._registry)
        self._runtime = _RuntimeNumbers(runtime, control)
        self._registry.register(self._runtime)

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """A request that was answered, or refused."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """An answer's first token."""
        self._first.observe(seconds)

    def tokens(self, *, prompt: int, completion: int) -> None:
        """Tokens of an answer that ended."""
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("completion").inc(completion)

    def batch(self, rows: int) -> None:
        """A batch that was run."""
        self._rows.observe(rows)

    def watch(self, queue: str, waiting: Callable[[], int]) -> None:
        """Ask for a queue's length whenever the numbers are read."""
        self._runtime.queues[queue] = waiting

    def text(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self._registry)


class _RuntimeNumbers(Collector):
    """What is true at the moment of reading."""

    def __init__(self, runtime: AdapterRuntime, control: Control) -> None:
        self._runtime, self._control = runtime, control
        self.queues: dict[str, Callable[[], int]] = {}

    def collect(self) -> Iterable[Metric]:
        """The gauges, made anew."""
        runtime, active = self._runtime, self._runtime.active
        version = GaugeMetricFamily(
            "fedpeft_active_version", "1 for the active version", labels=["version", "slot", "label"]
        )
        version.add_metric([active.version_id, active.digest, active.label], 1)
        pins = GaugeMetricFamily("fedpeft_pins", "Requests under way on each slot", labels=["slot"])
        for digest, count in runtime.pins.items():
            pins.add_metric([digest], count)
        queues = GaugeMetricFamily("fedpeft_waiting", "Requests that wait", labels=["queue"])
        for name, waiting in self.queues.items():
            queues.add_metric([name], waiting())
        residents = len(runtime.slots) - 1
        return [
            version,
            pins,
            CounterMetricFamily("fedpeft_swaps", "Changes of the active slot", value=runtime.swaps),
            queues,
            GaugeMetricFamily("fedpeft_resident_adapters", "Adapters in memory besides the null one", value=residents),
            GaugeMetricFamily("fedpeft_resident_bytes", "Memory of adapters besides the base", value=runtime.nbytes),
            GaugeMetricFamily("fedpeft_stale", "1 while the store cannot be followed", value=bool(self._control.stale)),
        ]
