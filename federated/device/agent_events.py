"""The device's own log: one line of JSON for each event, appended, rotated, and bounded.

It says what was done with which version, when and why; never what a device was asked. A line that a kill cut off is
passed over by readers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from federated.device.agent_config import ReportConfig
from federated.manifest import canonical_json
from federated.release.disk import translated

__all__ = ["EventLog", "read_events"]

_NAME = "events"


class EventLog:
    """Appends to ``events.jsonl`` of a state folder.

    Args:
        folder: is there.
        limits: size and number of files.
        clock: the time, with its zone.
    """

    def __init__(self, folder: Path, limits: ReportConfig, clock: Callable[[], datetime]) -> None:
        self._folder = folder
        self._limits = limits
        self._clock = clock

    def add(self, event: str, version_id: str = "", **details: Any) -> None:
        """Append an event.

        Raises:
            ReleaseError: if the disk refuses.
        """
        at = self._clock().isoformat(timespec="milliseconds")
        told = {key: value[:1000] if isinstance(value, str) else value for key, value in details.items()}
        line = canonical_json({"at": at, "event": event, "version_id": version_id, **told}) + b"\n"
        path = self._folder / f"{_NAME}.jsonl"
        with translated("write the device's log"):
            if path.exists() and path.stat().st_size + len(line) > self._limits.max_bytes:
                self._rotate(path)
            with path.open("ab") as file:
                if file.tell() and not _ends_whole(path):
                    file.write(b"\n")
                file.write(line)

    def _rotate(self, path: Path) -> None:
        for number in range(self._limits.files - 1, 0, -1):
            older = self._folder / f"{_NAME}.{number - 1}.jsonl" if number > 1 else path
            if older.exists():
                older.replace(self._folder / f"{_NAME}.{number}.jsonl")
        path.unlink(missing_ok=True)


def read_events(folder: Path) -> list[dict[str, Any]]:
    """All events that are kept, the oldest first; lines that are none are passed over.

    Raises:
        ReleaseError: if a file cannot be read.
    """
    older = sorted(folder.glob(f"{_NAME}.*.jsonl"), key=lambda path: -int(path.stem.partition(".")[2]))
    found: list[dict[str, Any]] = []
    with translated("read the device's log"):
        for path in (*older, folder / f"{_NAME}.jsonl"):
            lines = path.read_bytes().splitlines() if path.exists() else []
            found += [event for event in map(_event, lines) if event is not None]
    return found


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and {"at", "event", "version_id"} <= event.keys() else None


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
