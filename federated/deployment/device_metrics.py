"""A training device's numbers for Prometheus, as a file that node_exporter's textfile collector picks up.

A file and no port: a device opens none, most are behind a router where nobody could scrape them, and whoever runs
node_exporter on them has a way for its numbers already. The file is ``metrics.prom`` in ``training.state``, replaced as
a whole; ``--collector.textfile.directory`` points there. Counters begin anew with the process, as Prometheus expects.

What is counted comes from the lines that the client's tasks append (`federated.device_events`) and from the
processes that `federated.deployment.joining` starts. The lines are written by the app, so they are read with care: a
label's values are bounded, and a line that is none is passed over.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from federated.device_events import set_aside
from federated.files import write_whole

__all__ = ["EVENTS_FILE", "METRICS_FILE", "DeviceMetrics"]

EVENTS_FILE, METRICS_FILE = "events.jsonl", "metrics.prom"
_KINDS = ("query", "train", "evaluate", "app")
_OUTCOMES = ("ok", "refused", "not_now")
_MOST_REASONS = 20
_EVERY = 5.0  # seconds between two writings, at least
_AT_LEAST = 60.0  # seconds after which it is written although nothing changed: its age says that we are alive
_LARGEST = 4_000_000


class DeviceMetrics(Collector):
    """Reads the device's events and writes its numbers down.

    Args:
        folder: ``training.state``.
        restarts: processes by name, and how often each was started again.
        pinned: whether only named bundles run here.
        clock: seconds, from anywhere.
    """

    def __init__(
        self,
        folder: Path,
        *,
        restarts: Callable[[], Mapping[str, int]],
        pinned: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._events = folder / EVENTS_FILE
        self._target = folder / METRICS_FILE
        self._restarts = restarts
        self._pinned = pinned
        self._clock = clock
        self._position, self._file = 0, 0
        self._messages: Counter[tuple[str, str]] = Counter()
        self._refusals: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._steps = self._trained = self._last_round = 0
        self._last, self._epsilon = 0.0, dict[str, float]()
        self._written = b""
        self._looked = self._at = -math.inf
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._begin()

    def _begin(self) -> None:
        """Take what holds on, such as epsilon, from lines of an earlier process, and count from none."""
        self._read()
        for counts in (self._messages, self._refusals, self._bytes, self._seconds):
            counts.clear()
        self._steps = self._trained = 0

    def look(self) -> None:
        """Read what is new and, when it is time, write the file.

        Raises:
            OSError: as the file system raises it.
        """
        now = self._clock()
        if now - self._looked < _EVERY:
            return
        self._looked = now
        self._read()
        text = generate_latest(self._registry)
        if text != self._written or now - self._at >= _AT_LEAST:
            write_whole(self._target, text, mode=0o644)
            self._written, self._at = text, now

    def _read(self) -> None:
        """The whole lines that came since; of a file that was set aside meanwhile the rest first."""
        before = set_aside(self._events)
        found = _inode(self._events)
        if self._file and found != self._file:
            if _inode(before) == self._file:
                self._take(before)
            self._position = 0
        self._file = found
        if found:
            self._take(self._events)

    def _take(self, path: Path) -> None:
        with path.open("rb") as file:
            file.seek(self._position)
            found = file.read(_LARGEST)
        whole = found.rpartition(b"\n")[0]
        self._position += len(whole) + 1 if whole else len(found) if len(found) == _LARGEST else 0
        for line in whole.splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                self._count(event)

    def _count(self, event: Mapping[str, Any]) -> None:
        seconds = _number(event.get("seconds"))
        if event.get("event") == "answer":
            kind, outcome = _of(event.get("kind"), _KINDS), _of(event.get("outcome"), _OUTCOMES)
            self._messages[kind, outcome] += 1
            self._bytes["up"] += int(_number(event.get("bytes_up")))
            self._bytes["down"] += int(_number(event.get("bytes_down")))
            self._seconds["answering"] += seconds
            if outcome != "ok":
                self._refused(str(event.get("reason"))[:64])
        elif event.get("event") == "trained":
            self._trained += 1
            self._steps += int(_number(event.get("steps")))
            self._seconds["training"] += seconds
            self._last_round, self._last = int(_number(event.get("round"))), _number(event.get("at"))
            if "epsilon" in event:
                self._spent(event)

    def _refused(self, reason: str) -> None:
        known = reason in self._refusals or len(self._refusals) < _MOST_REASONS
        self._refusals[reason if known else "others"] += 1

    def _spent(self, event: Mapping[str, Any]) -> None:
        beside = f"{_number(event.get('target_delta')):g}"
        if beside in self._epsilon or len(self._epsilon) < _MOST_REASONS:
            self._epsilon[beside] = _number(event["epsilon"])

    def collect(self) -> Iterable[Metric]:
        """The numbers as they are."""
        yield _counter("messages", "Messages answered, by kind and outcome", ["kind", "outcome"], self._messages)
        yield _counter("refusals", "Messages refused or put off, by reason", ["reason"], self._refusals)
        yield _counter("packet_bytes", "Bytes of packets: up is to the server", ["direction"], self._bytes)
        yield _counter("seconds", "Seconds of answering messages, and of it of training", ["work"], self._seconds)
        yield _counter("trained_rounds", "Rounds trained in; an answer sent again is none", [], {(): self._trained})
        yield _counter("steps", "Optimizer steps", [], {(): self._steps})
        yield _counter("restarts", "Processes that ended and were started again", ["process"], self._restarts())
        yield _gauge("pinned", "1 where only named app bundles run, 0 where any does", [], {(): float(self._pinned)})
        yield _gauge("last_trained_round", "Round of the last training", [], {(): float(self._last_round)})
        yield _gauge("last_trained_timestamp_seconds", "Time of the last training", [], {(): self._last})
        yield _gauge("epsilon", "Epsilon spent on this device's examples, each example, at target_delta",
                     ["target_delta"], self._epsilon)  # fmt: skip


def _counter(name: str, said: str, labels: list[str], rows: Mapping[Any, float]) -> Metric:
    family = CounterMetricFamily(f"fedpeft_training_{name}", said, labels=labels)
    for values, number in _rows(rows):
        family.add_metric(values, number)
    return family


def _gauge(name: str, said: str, labels: list[str], rows: Mapping[Any, float]) -> Metric:
    family = GaugeMetricFamily(f"fedpeft_training_{name}", said, labels=labels)
    for values, number in _rows(rows):
        family.add_metric(values, number)
    return family


def _rows(rows: Mapping[Any, float]) -> Iterator[tuple[list[str], float]]:
    for key, number in rows.items():
        yield list(key) if isinstance(key, tuple) else [key], number


def _of(value: Any, known: tuple[str, ...]) -> str:
    return value if value in known else "other"


def _number(value: Any) -> float:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else 0.0


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0
