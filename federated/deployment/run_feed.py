"""What a run's events add up to so far, read as they are written: each line once, however often one looks.

A run of weeks has a long file, and whoever watches it asks every two seconds. Nothing is kept of an event but numbers,
and of those no more than a page shows. Reason codes come from clients, who may make them up: beyond twenty they are
counted together. Called by `federated.deployment.overview`.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from federated.deployment.overview_records import Account, RoundView, RunView
from federated.deployment.runs import Submission

__all__ = ["RunFeed", "Tally"]

Event = Mapping[str, Any]
_MOST_KEYS = 20
_MOST_CLIENTS = 2_000
_HISTORY = 200
_LONGEST = 200
OTHERS = "others"
"""What is counted together when there is too much of it."""


class Tally(dict[str, int]):
    """Counts by a name of which there are at most so many; the rest has one name.

    >>> tally = Tally(1)
    >>> for code in ("late", "late", "made up", "made up too"):
    ...     tally.add(code)
    >>> tally
    {'late': 2, 'others': 2}
    """

    def __init__(self, most: int = _MOST_KEYS) -> None:
        super().__init__()
        self._most = most

    def add(self, name: object) -> None:
        """Count one."""
        key = str(name)[:64] or "unnamed"
        if key not in self and len(self) >= self._most:
            key = OTHERS
        self[key] = self.get(key, 0) + 1


class RunFeed:
    """One run's events.

    Args:
        path: its ``metrics.jsonl``, which need not be there yet.

    Attributes:
        updates: good updates by client.
        last_rounds: the newest round that each client gave a good update to.
        apps: by client, the digest of the app bundle that its device has pinned, or ``unpinned``, by its own word.
        refusals: by client and reason code.
        not_now: by client and condition.
        damaged: whole lines that are no JSON, and were passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin()

    def _begin(self) -> None:
        self._position = self.damaged = 0
        self._run: Event = {}
        self._end: Event = {}
        self._last: Event = {}
        self._current, self._cohort, self._answered = 0, list[str](), set[str]()
        self._done, self._warning, self._time = 0, "", 0.0
        self._losses = deque[tuple[int, float | None, float | None]](maxlen=_HISTORY)
        self._by_reason, self._problems = Tally(), Tally()
        self.updates: dict[str, int] = {}
        self.last_rounds: dict[str, int] = {}
        self.apps: dict[str, str] = {}
        self.refusals: dict[str, Tally] = {}
        self.not_now: dict[str, Tally] = {}

    def read(self) -> None:
        """Take up the whole lines that came since the last call; a file that is shorter than before begins anew.

        Raises:
            OSError: if the file is there and cannot be read.
        """
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            if file.seek(0, 2) < self._position:
                self._begin()
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # the rest of it comes
                self._position += len(line)
                try:
                    self._take(_mapping(json.loads(line)))
                except ValueError:
                    self.damaged += 1

    def _take(self, event: Event) -> None:
        self._time = _number(event.get("time")) or self._time
        match event.get("event"):
            case "run":
                self._run, self._end = event, {}
            case "round_start":
                self._current, self._answered = _count(event.get("round_number")), set()
                self._cohort = [str(one) for one in _list(event.get("cohort"))]
            case "client":
                self._client(event)
            case "round":
                self._round(event)
            case "joined":
                self._joined(str(event.get("client_id")), str(event.get("app") or ""))
            case "not_now":
                self._add(self.not_now, event.get("client_id"), event.get("condition"))
            case "node_problem":
                self._problems.add(event.get("reason"))
            case "warning":
                self._warning = str(event.get("message"))[:_LONGEST]
            case "end":
                self._end, self._current = event, 0

    def _joined(self, name: str, app: str) -> None:
        if name in self.apps or len(self.apps) < _MOST_CLIENTS:
            self.apps[name] = app[:64]

    def _client(self, event: Event) -> None:
        name, status = str(event.get("client_id")), event.get("status")
        if _count(event.get("round_number")) == self._current:
            self._answered.add(name)
        if status == "ok":
            if name in self.updates or len(self.updates) < _MOST_CLIENTS:
                self.updates[name] = self.updates.get(name, 0) + 1
                self.last_rounds[name] = _count(event.get("round_number"))
        elif status != "not_now":
            reason = event.get("reason") or status
            self._by_reason.add(reason)
            self._add(self.refusals, name, reason)

    def _round(self, event: Event) -> None:
        number = _count(event.get("round_number"))
        self._last, self._current = event, 0
        if event.get("published"):
            self._done = max(self._done, number)
        for name, condition in _mapping(event.get("not_now")).items():
            self._add(self.not_now, name, condition)
        held_out = _mapping(event.get("evaluation")).get("loss")
        self._losses.append((number, _number(event.get("train_loss")), _number(held_out)))

    @staticmethod
    def _add(into: dict[str, Tally], name: object, key: object) -> None:
        known = str(name) if str(name) in into or len(into) < _MOST_CLIENTS else OTHERS
        into.setdefault(known, Tally()).add(key)

    def view(self, submission: Submission, *, up: bool) -> RunView:
        """The run as it stands.

        Args:
            submission: what was submitted.
            up: whether the deployment's processes run.
        """
        end = self._end if (_number(self._end.get("time")) or 0.0) >= submission.attempted else {}
        message = submission.gave_up or str(end.get("message") or "")[:_LONGEST] or self._warning
        return RunView(
            name=submission.name,
            run_id=str(self._run.get("run_id") or ""),
            state=self._state(submission, end, up=up),
            message=message,
            method=str(self._run.get("method") or ""),
            attempts=len(submission.flower_runs),
            submitted=submission.submitted,
            last_event=self._time or None,
            rounds=_count(self._run.get("rounds")),
            rounds_done=self._done,
            current_round=0 if end or submission.stopped else self._current,
            cohort=tuple(self._cohort),
            answered=len(self._answered.intersection(self._cohort)),
            last_round=_round_view(self._last) if self._last else None,
            history=tuple(self._losses),
            accounts=tuple(map(_account, self._accounts())),
            not_protected=tuple(dict.fromkeys(str(w) for a in self._accounts() for w in _list(a.get("not_protected")))),
            refusals=dict(self._by_reason),
            refusals_by_client={name: dict(tally) for name, tally in sorted(self.refusals.items())},
            not_now={name: dict(tally) for name, tally in sorted(self.not_now.items())},
            problems=dict(self._problems),
        )

    def _accounts(self) -> list[Event]:
        found = _list(_mapping(self._last.get("privacy")).get("accounts"))
        return [one for one in found if isinstance(one, dict)]

    def _state(self, submission: Submission, end: Event, *, up: bool) -> str:
        status = str(end.get("status") or "")
        if submission.stopped and status != "completed":
            return "stopped"
        if submission.gave_up:
            return "gave up"
        if status:
            return status
        if not up:
            return "down"
        return "running" if self._time >= submission.attempted and self._run else "waiting"


def _round_view(event: Event) -> RoundView:
    evaluation = _mapping(event.get("evaluation"))
    return RoundView(
        round_number=_count(event.get("round_number")),
        published=bool(event.get("published")),
        version_id=str(event.get("version_id") or ""),
        participants=_count(event.get("participants")),
        cohort=_count(event.get("cohort")),
        seconds=_number(event.get("seconds")) or 0.0,
        bytes_up=_count(event.get("bytes_up")),
        bytes_down=_count(event.get("bytes_down")),
        train_loss=_number(event.get("train_loss")),
        evaluation={str(key): found for key, value in evaluation.items() if (found := _number(value)) is not None},
    )


def _account(record: Event) -> Account:
    return Account(
        unit=str(record.get("unit")),
        epsilon=_number(record.get("epsilon")),
        target_delta=_number(record.get("target_delta")) or 0.0,
        target_epsilon=_number(record.get("target_epsilon")),
        private=record.get("private") is not False,
    )


def _number(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None


def _count(value: Any) -> int:
    return int(_number(value) or 0)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
