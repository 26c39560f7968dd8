"""Log lines of this library's own processes: as text for people, or one JSON object a line for programs.

    {"time": "2026-11-27T18:07:45.691Z", "level": "info", "process": "door", "message": "...", "client": "north"}

A line may have ``run``, ``round`` and ``client`` (``extra={"client": ...}`` at the call). In JSON an exception is
told by its type and the places that it went through, never by its text, which may quote data. What Flower's own
processes print stays as Flower prints it. Called by whatever has a process: `federated.deployment`, `federated.cli`,
and a deployment's ServerApp.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

__all__ = ["JsonLines", "LogFormat", "LogTracker", "set_up_logs"]

LogFormat = Literal["text", "json"]

_CONTEXT = ("run", "round", "client")
_PLACES = 5
_LONGEST = 4_000


class JsonLines(logging.Formatter):
    """Formats a record as one line of JSON.

    Args:
        process: name of the process.
    """

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line: dict[str, Any] = {"time": at, "level": record.levelname.lower(), "process": self._process}
        line["message"] = record.getMessage()[:_LONGEST]
        line |= {key: getattr(record, key) for key in _CONTEXT if getattr(record, key, None) is not None}
        if record.exc_info and record.exc_info[0] is not None:
            line |= {"error": record.exc_info[0].__name__, "at": _places(record.exc_info[2])}
        return json.dumps(line, ensure_ascii=True, default=str)


def _places(trace: Any) -> list[str]:
    """The innermost calls, by file and line."""
    return [f"{one.filename}:{one.lineno}" for one in traceback.extract_tb(trace)[: -_PLACES - 1 : -1]]


def set_up_logs(
    process: str, form: LogFormat, *, level: int = logging.INFO, whole: bool = True, stream: TextIO | None = None
) -> None:
    """Make this process's lines come in one form, in place of what was set up before.

    Args:
        process: its name in each line.
        form: ``text`` or ``json``.
        level: least level of our own lines; of other libraries, warnings.
        whole: whether the process is ours. Within one of Flower's, our own lines alone are taken.
        stream: default: standard error.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    text = logging.Formatter(f"%(asctime)s {process}: %(message)s")
    handler.setFormatter(JsonLines(process) if form == "json" else text)
    ours = logging.getLogger("federated")
    ours.setLevel(level)
    ours.propagate = whole
    target = logging.getLogger() if whole else ours
    target.handlers[:] = [handler]
    if whole:
        target.setLevel(logging.WARNING)
        logging.getLogger("__main__").setLevel(level)  # a module of ours that was started as a program
        logging.captureWarnings(True)


class LogTracker:
    """Says a run's events as log lines, with run and round: what a server without a display leaves in its log.

    Args:
        run: name of the run.
        logger: says them.
    """

    def __init__(self, run: str, logger: logging.Logger | None = None) -> None:
        self._run = run
        self._log = logger or logging.getLogger(__name__)

    def emit(self, event: Mapping[str, Any]) -> None:
        """One line for what an operator wants to know; nothing for the rest, and no client's own words."""
        about: dict[str, Any] = {"run": self._run, "round": event.get("round_number"), "client": event.get("client_id")}
        match event.get("event"):
            case "run":
                self._log.info("%s: %s rounds of %s", self._run, event.get("rounds"), event.get("method"), extra=about)
            case "round_start":
                cohort = len(event.get("cohort") or ())
                self._log.info("round %s asks %d clients", event.get("round_number"), cohort, extra=about)
            case "client" if event.get("status") != "ok":
                reason = event.get("reason") or event.get("status")
                self._log.warning("%s: %s", event.get("client_id"), reason, extra=about)
            case "not_now":
                self._log.info("%s: not now (%s)", event.get("client_id"), event.get("condition"), extra=about)
            case "round":
                self._log.info(_told(event), extra=about)
            case "warning":
                self._log.warning("%s", event.get("message"), extra=about)
            case "end":
                message = f": {event['message']}" if event.get("message") else ""
                self._log.info("%s%s", event.get("status"), message, extra=about)

    def close(self) -> None:
        """Nothing is held."""


def _told(event: Mapping[str, Any]) -> str:
    version = str(event.get("version_id") or "")[:12] if event.get("published") else "no new version"
    took_part = f"{event.get('participants')} of {event.get('cohort')} clients"
    return f"round {event.get('round_number')}: {took_part}, {event.get('seconds')} s, {version}"
