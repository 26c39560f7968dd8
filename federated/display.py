"""A run on the terminal: a live table of the round in progress and of finished rounds.

A tracker like the others: it sees events and changes nothing. Where standard output is no terminal it prints one
plain line per round, per client without a good update, per warning and per baseline. Its refresh thread starts with
the first ``round_start``, when an engine has forked its workers, and never before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from federated.run_history import mean_detail

__all__ = ["LiveDisplay"]

Event = Mapping[str, Any]
_PERIOD = 0.25  # seconds between looks
_STYLES = {
    "ok": "green",
    "refused": "bold red",
    "failed": "bold red",
    "late": "yellow",
    "not_now": "dim",
    "waiting": "dim",
}


class LiveDisplay:
    """Shows a run's events with rich.

    Args:
        console: where to; standard output when None.
        client_rows: at most this many clients of the round are listed; refused ones come first.
        round_rows: at most this many finished rounds are listed, the last ones.
    """

    def __init__(self, console: Console | None = None, *, client_rows: int = 10, round_rows: int = 12) -> None:
        self._console = console or Console()
        self._client_rows = client_rows
        self._round_rows = round_rows
        self._live: Live | None = None
        self._lock = threading.RLock()  # reentrant: a signal handler may close the display within emit
        self._closed = threading.Event()
        self._ticker: threading.Thread | None = None
        self._run: Event = {}
        self._current: Event | None = None
        self._clients: dict[str, Event] = {}
        self._rounds: dict[int, Event] = {}
        self._held_out: dict[int, Event] = {}
        self._baselines: dict[str, Event] = {}
        self._warnings: list[str] = []

    def emit(self, event: Event) -> None:
        """Take one event and show what it changes; after `close` events are ignored."""
        if self._closed.is_set():
            return
        with self._lock:
            self._take(event)
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            for line in _plain_lines({"rounds": self._run.get("rounds"), **event}):
                self._console.print(line, soft_wrap=True)
        elif event.get("event") == "end":
            self.close()
        elif event.get("event") == "round_start" and self._live is None:
            self._start()

    def close(self) -> None:
        """Stop the display and leave its last state on the screen; may be called at any moment, also twice."""
        self._closed.set()
        ticker, self._ticker = self._ticker, None
        if ticker is not None:
            ticker.join(timeout=1.0)
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _start(self) -> None:
        live = self._live = Live(self, console=self._console, auto_refresh=False)
        live.start(refresh=True)
        self._ticker = threading.Thread(target=self._tick, args=(live,), name="display", daemon=True)
        self._ticker.start()

    def _tick(self, live: Live) -> None:
        while not self._closed.wait(_PERIOD):
            live.refresh()

    def _take(self, event: Event) -> None:
        match event.get("event"):
            case "run":
                self._run = event
            case "round_start":
                self._current, self._clients = event, {}
            case "client":
                self._clients[str(event["client_id"])] = event
            case "round":
                number = int(event["round_number"])
                self._rounds[number] = event
                self._current = None
                if event.get("evaluation"):
                    self._held_out[number - 1] = event["evaluation"]
            case "final" if event.get("evaluation"):
                self._held_out[max(self._rounds, default=0)] = event["evaluation"]
            case "baseline":
                self._baselines[str(event["name"])] = _mean(event)
            case "warning" | "waiting":
                self._warnings.append(_PLAIN[str(event["event"])](event))

    def __rich__(self) -> RenderableType:
        """Everything on the screen; called by rich's refresh thread."""
        with self._lock:
            parts = [self._headline()]
            if self._clients or self._current:
                parts.append(self._client_table())
            if self._rounds:
                parts.append(self._round_table())
            parts += [Text(warning, style="bold yellow") for warning in self._warnings]
        return Group(*parts)

    def _headline(self) -> RenderableType:
        done, total = len(self._rounds), int(self._run.get("rounds") or len(self._rounds) or 1)
        here, needed, unit = self._progress()
        share = here / needed if needed else 0.0
        line = Table.grid(padding=(0, 1))
        if self._current is None:
            words = f"{done} of {total} rounds"
        else:
            words = f"round {self._current['round_number']} of {total}, {here} of {needed} {unit}"
        name = Text(str(self._run.get("name") or "run"), style="bold")
        line.add_row(name, ProgressBar(total=total, completed=min(total, done + share), width=24), Text(words))
        return line

    def _progress(self) -> tuple[int, int, str]:
        """How far the round in progress is: answers of its cohort, or good updates in its buffer."""
        started = self._current or {}
        if buffer := started.get("buffer"):
            return sum(event.get("status") == "ok" for event in self._clients.values()), int(buffer), "updates"
        return len(self._clients), len(started.get("cohort") or ()), "clients"

    def _client_table(self) -> Table:
        table = _table("client", "status", "loss", "seconds", "reason", left=(0, 1, 4))
        cohort = [str(name) for name in (self._current or {}).get("cohort") or ()]
        waiting = [{"client_id": name, "status": "waiting"} for name in cohort if name not in self._clients]
        rows: Sequence[Event] = [*sorted(self._clients.values(), key=_trouble_first), *waiting]
        for event in rows[: self._client_rows]:
            style = _STYLES.get(str(event.get("status")), "")
            table.add_row(
                Text(str(event["client_id"])),
                Text(str(event.get("status")), style=style),
                _number(event.get("train_loss"), ".3f"),
                _number(event.get("seconds"), ".1f"),
                Text(_reason(event), style=style, overflow="fold"),
            )
        if (hidden := len(rows) - self._client_rows) > 0:
            table.add_row(Text(f"and {hidden} more", style="dim"))
        return table

    def _round_table(self) -> Table:
        metric = "accuracy" if any("accuracy" in values for values in self._held_out.values()) else "perplexity"
        table = _table("round", "clients", "train loss", "held-out loss", f"held-out {metric}", "seconds", "refused")
        if 0 in self._held_out:
            start = self._held_out[0]
            table.add_row("start", "", "", _number(start.get("loss"), ".3f"), _metric(start, metric), "", "")
        for number in sorted(self._rounds)[-self._round_rows :]:
            event, measured = self._rounds[number], self._held_out.get(number, {})
            refused = len(event.get("refused") or ())
            table.add_row(
                str(number),
                f"{event.get('participants')}/{event.get('cohort')}" + ("" if event.get("published", True) else " *"),
                _number(event.get("train_loss"), ".3f"),
                _number(measured.get("loss"), ".3f"),
                _metric(measured, metric),
                _number(event.get("seconds"), ".1f"),
                Text(str(refused) if refused else "", style="red"),
            )
        for name, values in self._baselines.items():
            loss, score = _number(values.get("loss"), ".3f"), _metric(values, metric)
            table.add_row(Text(name.replace("_", " ")), "", "", loss, score, "", "", style="cyan")
        if not all(event.get("published", True) for event in self._rounds.values()):
            table.caption = "* too few good updates: the global adapter stayed as it was"
        return table


def _mean(baseline: Event) -> Event:
    return {name: mean_detail(baseline, name) for name in ("loss", "accuracy", "perplexity")}


def _trouble_first(event: Event) -> bool:
    return event.get("status") == "ok"


def _table(*headers: str, left: Sequence[int] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0), caption_justify="left")
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index in left else "right")
    return table


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(float(value), form)


def _metric(values: Event, metric: str) -> str:
    return _number(values.get(metric), ".1%" if metric == "accuracy" else ".3f")


def _reason(event: Event) -> str:
    if event.get("status") in (None, "ok", "waiting"):
        return ""
    reason, message = str(event.get("reason") or ""), str(event.get("message") or "")
    if message.startswith(reason):  # str(UpdateRejected) already begins with its code
        return message
    return f"{reason}: {message}" if message else reason


def _plain_lines(event: Event) -> Iterator[Text]:
    """What a log shows of one event; `Text`, so that nothing in a client's name is taken for markup."""
    yield from (Text(str(note)) for note in event.get("notes") or ())
    words = _PLAIN.get(str(event.get("event")))
    if words and (line := words(event)):
        yield Text(line)


def _plain_client(event: Event) -> str:
    if event.get("status") == "ok":
        return ""
    return f"round {event['round_number']}: {event['client_id']} {event.get('status')}: {_reason(event)}"


def _plain_round(event: Event) -> str:
    of = f"/{event['rounds']}" if event.get("rounds") else ""
    parts = [f"round {event['round_number']}{of}: {event.get('participants')} of {event.get('cohort')} clients"]
    parts = parts if event.get("cohort") else ["trained centrally"]
    parts += [f"train loss {_number(event['train_loss'], '.4f')}"] if event.get("train_loss") is not None else []
    parts += [f"before it held-out {_words(event['evaluation'])}"] if event.get("evaluation") else []
    parts += [f"{_number(event['seconds'], '.1f')} s"] if event.get("seconds") is not None else []
    parts += [] if event.get("published", True) else ["too few good updates: the global adapter stayed as it was"]
    return ", ".join(parts)


def _plain_final(event: Event) -> str:
    return f"final: held-out {_words(event['evaluation'])}" if event.get("evaluation") else ""


def _plain_warning(event: Event) -> str:
    return f"warning: {event.get('message')}"


def _plain_waiting(event: Event) -> str:
    return f"waiting: {event.get('message')}"


def _plain_baseline(event: Event) -> str:
    return f"baseline {event.get('name')}: {_words(_mean(event))}"


def _plain_end(event: Event) -> str:
    return str(event.get("status"))  # why is said by whoever started the run


def _words(evaluation: Event) -> str:
    known = [
        (name, evaluation[name]) for name in ("loss", "accuracy", "perplexity") if evaluation.get(name) is not None
    ]
    return ", ".join(f"{name} {value:.1%}" if name == "accuracy" else f"{name} {value:.4f}" for name, value in known)


_PLAIN: Mapping[str, Callable[[Event], str]] = {
    "client": _plain_client,
    "round": _plain_round,
    "final": _plain_final,
    "warning": _plain_warning,
    "waiting": _plain_waiting,
    "baseline": _plain_baseline,
    "end": _plain_end,
}
