"""Where a run's events go: JSON lines, TensorBoard, memory, or several at once (`federated.mlflow_tracker`: MLflow).

An event is a flat mapping with the key ``"event"`` (``"run"``, ``"joined"``, ``"round_start"``, ``"client"``,
``"round"``, ``"dropped"``, ``"final"``, ``"warning"``, ``"baseline"``, ``"activation"``, ``"answer"``, ``"end"``) and
plain values. Whoever drives a run emits events; a tracker writes them down. Trackers decide nothing and never change
a run: `federated.display` shows the same events on a terminal and `federated.report` reads the JSON lines back.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import numbers
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from federated.errors import ConfigError, DataError, StorageFull

__all__ = [
    "JsonlTracker",
    "MemoryTracker",
    "MultiTracker",
    "Scalars",
    "TensorBoardTracker",
    "Tracker",
    "plain_event",
    "read_events",
]

Event = Mapping[str, Any]
Clock = Callable[[], float]


@runtime_checkable
class Tracker(Protocol):
    """Anything that takes a run's events."""

    def emit(self, event: Event) -> None:
        """Take one event; the mapping is not kept and not changed."""
        ...

    def close(self) -> None:
        """Finish; may be called more than once and at any moment."""
        ...


def plain_event(event: Event, *, clock: Clock = time.time) -> dict[str, Any]:
    """Copy an event into plain JSON values and stamp it with ``"time"`` (seconds since the epoch) if it has none.

    JSON cannot carry NaN or infinity: such a number becomes None, and the key ``"not_finite"`` lists where.

    >>> plain_event({"event": "round", "train_loss": float("nan"), "time": 0.0})
    {'event': 'round', 'train_loss': None, 'time': 0.0, 'not_finite': ['train_loss']}

    Raises:
        TypeError: for a value that is no number, text, None, sequence or mapping; the message names its key.
    """
    not_finite: list[str] = []
    plain: dict[str, Any] = {str(key): _plain(value, str(key), not_finite) for key, value in event.items()}
    plain.setdefault("time", clock())
    if not_finite:
        plain["not_finite"] = not_finite
    return plain


def _plain(value: Any, key: str, not_finite: list[str]) -> Any:
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        if math.isfinite(value):
            return float(value)
        not_finite.append(key)
        return None
    if isinstance(value, Mapping):
        return {str(name): _plain(part, f"{key}.{name}", not_finite) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(part, f"{key}[{index}]", not_finite) for index, part in enumerate(value)]
    raise TypeError(f"event key {key}: found a {type(value).__name__}, expected a number, text, list or mapping")


class MemoryTracker:
    """Keeps events in a list, for tests and for notebooks.

    Attributes:
        events: plain copies, oldest first.
    """

    def __init__(self, *, clock: Clock = time.time) -> None:
        self.events: list[dict[str, Any]] = []
        self._clock = clock

    def emit(self, event: Event) -> None:
        """Append a plain copy."""
        self.events.append(plain_event(event, clock=self._clock))

    def close(self) -> None:
        """Do nothing: the events stay."""

    def of(self, name: str) -> list[dict[str, Any]]:
        """The events of one kind, oldest first."""
        return [event for event in self.events if event.get("event") == name]


class JsonlTracker:
    """Appends one line of JSON per event to a file; a line is on its way to the disk before `emit` returns.

    What was there is kept (a resumed run goes on in the same file), except half a line at the end, which only a
    killed process leaves behind.

    Args:
        path: the file; its folder is made.
        clock: seconds since the epoch, for events without ``"time"``.
    """

    def __init__(self, path: str | Path, *, clock: Clock = time.time) -> None:
        self.path = Path(path)
        self._clock = clock
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)  # unbuffered: a fork cannot write a line twice
        _drop_torn_tail(self.path)

    def emit(self, event: Event) -> None:
        """Append one line.

        Raises:
            StorageFull: when the disk is full; the file then ends with the last whole event.
            TypeError: see `plain_event`.
        """
        line = json.dumps(plain_event(event, clock=self._clock), ensure_ascii=False, allow_nan=False) + "\n"
        self._append(line.encode("utf-8", errors="replace"))

    def _append(self, data: bytes) -> None:
        start = self._file.seek(0, 2)
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(start)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull(
                    f"no space left to write {self.path}; rounds that had finished are safe: free some space, "
                    "then resume the run"
                ) from error
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _drop_torn_tail(path: Path) -> None:
    with path.open("r+b") as file:
        end = 0
        for line in file:
            if line.endswith(b"\n"):
                end += len(line)
        file.truncate(end)


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """Read what `JsonlTracker` wrote, oldest first; half a line at the end (a killed process) is left out.

    Raises:
        DataError: if the file is missing, or a whole line in it is not a JSON object.
    """
    try:
        lines = Path(path).read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; expected the JSON lines of a run") from error
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.endswith(b"\n")]


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON; expected one event per line") from error
    if not isinstance(event, dict):
        raise DataError(f"{where} holds a {type(event).__name__}; expected one JSON object per line")
    return event


class MultiTracker:
    """Hands every event, stamped once, to several trackers in order.

    Args:
        trackers: put the one that must not miss anything (`JsonlTracker`) first.
        clock: seconds since the epoch.
    """

    def __init__(self, trackers: Sequence[Tracker], *, clock: Clock = time.time) -> None:
        self.trackers = tuple(trackers)
        self._clock = clock

    def emit(self, event: Event) -> None:
        """Give all trackers the same event with the same ``"time"``."""
        stamped = {"time": self._clock(), **event}
        for tracker in self.trackers:
            tracker.emit(stamped)

    def close(self) -> None:
        """Close all; the first failure is raised after every tracker had its turn."""
        failures: list[Exception] = []
        for tracker in self.trackers:
            try:
                tracker.close()
            except Exception as error:  # noqa: BLE001 - the other trackers must be closed too
                failures.append(error)
        if failures:
            raise failures[0]


class Scalars:
    """The numbers of rounds, the final evaluation, baselines and what was spent of privacy, as ``(tag, value, step)``.

    A round's evaluation is of the adapter that the round *started* from, so it stands at the step before.
    """

    def __init__(self) -> None:
        self._last_round = 0

    def of(self, event: Event) -> Iterator[tuple[str, float, int]]:
        """Those of one event; events come in their order."""
        kind = event.get("event")
        if kind == "round":
            self._last_round = step = int(event["round_number"])
            yield from _numbers("round", {key: event.get(key) for key in _ROUND_NUMBERS}, step)
            yield from _numbers("held_out", event.get("evaluation"), step - 1)
            accounts = (event.get("privacy") or {}).get("accounts") or ()
            yield from _numbers("epsilon", {f"each_{one['unit']}": one.get("epsilon") for one in accounts}, step)
        elif kind == "final":
            yield from _numbers("held_out", event.get("evaluation"), self._last_round)
        elif kind == "baseline":
            yield from _numbers(f"baseline_{event.get('name')}", event.get("evaluation"), self._last_round)


class TensorBoardTracker:
    """Writes `Scalars` as TensorBoard scalars.

    Args:
        directory: folder for the event files.

    Raises:
        ConfigError: if the ``tensorboard`` extra is not installed.
    """

    def __init__(self, directory: str | Path) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ConfigError(
                "tracking.tensorboard = true: the tensorboard package is not installed; "
                "run pip install 'federated-peft[tensorboard]' or set tracking.tensorboard=false"
            )
        self.directory = Path(directory)
        self._writer: Any = None
        self._scalars = Scalars()

    def emit(self, event: Event) -> None:
        """Write the event's numbers; the writer and its thread start with the first of them, after workers forked."""
        for tag, value, step in self._scalars.of(event):
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self.directory))
            self._writer.add_scalar(tag, value, step, walltime=event.get("time"))

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


_ROUND_NUMBERS = ("train_loss", "update_norm", "participants", "bytes_up", "bytes_down", "seconds")


def _numbers(prefix: str, values: Event | None, step: int) -> Iterator[tuple[str, float, int]]:
    for key, value in (values or {}).items():
        if isinstance(value, numbers.Real):
            yield f"{prefix}/{key}", float(value), step
