"""Lines of JSON about what happened on a device, kept on it for its owner's metrics, and never sent.

    {"at": 1800000000.0, "event": "answer", "kind": "train", "outcome": "ok", "run": "tiny-ab", "round": 3, ...}
    {"at": 1800000000.0, "event": "trained", "run": "tiny-ab", "round": 3, "seconds": 4.2, "steps": 12, ...}

`EVENTS` names the file; ``fedpeft device join`` sets it for its children and reads the lines
(`federated.deployment.device_metrics`). Where nobody set it, nothing is written: a simulation's clients are no devices.
A file that has grown is set aside once, so that both together stay near two megabytes. Several processes may append.
Written by `federated.flower.client_events` and the device's launcher.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["EVENTS", "LARGEST", "PINNED", "note_event", "noted", "set_aside"]

_LOG = logging.getLogger(__name__)

PINNED = "FEDPEFT_PINNED_APP"
"""Environment variable by which a device's launcher says which bundle it checked, or that it checks none."""
EVENTS = "FEDPEFT_EVENTS"
"""Environment variable: path of the file."""

LARGEST = 1_000_000
"""Bytes at which a file is set aside."""


def set_aside(path: Path) -> Path:
    """Where a file that has grown goes."""
    return path.with_name(f"{path.name}.1")


def noted() -> bool:
    """Whether somebody reads what is noted."""
    return bool(os.environ.get(EVENTS))


def note_event(event: Mapping[str, Any], *, clock: Callable[[], float] = time.time) -> None:
    """Append a line, where somebody reads it. A disk that refuses does not end a task: it is said in the log.

    Args:
        event: plain values; no more than fits a page of memory, so that lines of several processes do not mix.
        clock: seconds since the epoch.
    """
    where = os.environ.get(EVENTS)
    if not where:
        return
    path, line = Path(where), json.dumps({"at": clock(), **event}).encode() + b"\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, line)
            grown = os.fstat(descriptor).st_size >= LARGEST
        finally:
            os.close(descriptor)
        if grown:
            path.replace(set_aside(path))
    except OSError as error:
        _LOG.warning("%s cannot be written: %s", path, error.strerror)
