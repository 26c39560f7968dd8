"""Shows a run that goes on in other processes: its events as they are written down, on a simulation's display."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from federated.tracking import Tracker

__all__ = ["follow"]

_LOOK = 0.25


def follow(path: Path, tracker: Tracker, *, going_on: Callable[[], bool], since: float = 0.0) -> dict[str, Any]:
    """Emit each event of a ``metrics.jsonl`` once, until the run says that it ended or is no longer going on.

    Args:
        path: the file; it may not be there yet.
        tracker: takes the events.
        going_on: asked now and then; False ends it.
        since: seconds since the epoch; an ``end`` from before is of an earlier attempt.

    Returns:
        The ``end`` event; empty if there was none. An ``interrupted`` one is none as long as the run is going on.
    """
    last: dict[str, Any] = {}
    for event in _events(path, going_on):
        tracker.emit(event)
        if event.get("event") == "end" and float(event.get("time", 0.0)) >= since:
            last = event
            if event.get("status") != "interrupted":
                break
    return last


def _events(path: Path, going_on: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """Whole lines, as they come; the last half of one is left until it is whole."""
    position, looks = 0, 0
    while True:
        last = looks % 20 == 19 and not going_on()
        if path.is_file():
            with path.open("rb") as file:
                file.seek(position)
                whole = file.read().rpartition(b"\n")[0]
            position += len(whole) + 1 if whole else 0
            yield from (json.loads(line) for line in whole.splitlines() if line)
        if last:
            return
        looks += 1
        time.sleep(_LOOK)
