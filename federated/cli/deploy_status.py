"""``fedpeft deploy status``: processes, devices, runs and versions of a deployment, once or again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from federated.cli.tables import as_json, cell, console, fill, say
from federated.errors import ConfigError
from federated.formats import byte_size, moment, number, short_digest

if TYPE_CHECKING:
    from federated.deployment.overview import Gatherer
    from federated.deployment.overview_records import Overview, RunView

__all__ = ["COMMANDS", "picture"]

_EVERY = 2.0  # seconds
_MOST_RUNS, _MOST_DEVICES, _MOST_VERSIONS = 5, 30, 5
_ALWAYS = 3  # columns that a table has even when they are empty


def status(
    folder: Annotated[Path, typer.Option("--folder", metavar="DIR", help="The deployment's folder.")] = Path(
        "deployment"
    ),
    watch: Annotated[bool, typer.Option("--watch", help="Look again every 2 seconds, until Ctrl-C.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print everything once, as JSON.")] = False,
) -> None:
    """Show processes, devices, runs and versions, also of a deployment that is down.

    Example: fedpeft deploy status --watch
    """
    from federated.deployment.layout import Layout
    from federated.deployment.overview import Gatherer
    from federated.deployment.server_config import read_server_config

    place = folder.resolve()
    config = read_server_config(place)
    out = console()
    if watch and json:
        raise ConfigError("--watch, --json: choose one; /api/status on the status page gives JSON as often as you ask")
    if watch and not out.is_terminal:
        raise ConfigError("--watch needs a terminal; --json prints everything once")
    gatherer = Gatherer(Layout(place), config)
    try:
        if watch:
            _watch(gatherer, out)
        elif json:
            say(as_json(gatherer.overview().to_dict()))
        else:
            out.print(picture(gatherer.overview()))
            say(f"page: http://127.0.0.1:{config.status_port}/ while the deployment is up")
    finally:
        gatherer.close()


COMMANDS: dict[str, Callable[..., None]] = {"status": status}
"""By name, for the group of `federated.cli.deploy`."""


def _watch(gatherer: Gatherer, out: Console) -> None:
    from rich.live import Live

    with Live(console=out, auto_refresh=False, screen=True) as live:
        while True:
            try:
                live.update(picture(gatherer.overview()), refresh=True)
                time.sleep(_EVERY)
            except KeyboardInterrupt:
                return


def picture(view: Overview) -> RenderableType:
    """An overview for the terminal; control characters of whatever was recorded are made visible."""
    head = Text.assemble((view.federation, "bold"), "  ", view.door, "  ", _standing(view), f"  {moment(view.at)}")
    parts: list[RenderableType] = [head]
    parts += [Text.assemble(("could not be read: ", "yellow"), cell(fault)) for fault in view.faults]
    parts += [_runs(view), _devices(view), _versions(view)]
    if view.processes:
        rows = [[one.name, one.state, one.pid or "", f"{one.seconds:.0f}"] for one in view.processes]
        parts.append(_table("Processes", ("process", "state", "pid", "seconds"), rows))
    return Group(*parts)


def _standing(view: Overview) -> Text:
    secured = "" if view.secured else ", insecure"
    if view.up:
        return Text(f"up{secured}", style="green" if view.secured else "red")
    return Text(f"not up, or not kept by 'fedpeft deploy up'{secured}", style="yellow")


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], caption: str | None = None) -> Table:
    """A table without the columns that nobody fills: most terminals are narrow."""
    kept = [at for at in range(len(columns)) if at < _ALWAYS or any(str(row[at]) for row in rows)]
    table = Table(title=title, title_justify="left", caption=caption)
    for at in kept:
        table.add_column(columns[at], no_wrap=at == 0, overflow="fold")
    fill(table, [[row[at] for at in kept] for row in rows])
    return table


def _runs(view: Overview) -> Table:
    columns = ("run", "state", "rounds", "now", "last round", "epsilon", "refused", "not now", "message")
    rows = [_run(one) for one in view.runs[:_MOST_RUNS]]
    return _table("Runs", columns, rows, _left(view.runs, _MOST_RUNS, view.runs_left_out))


def _run(run: RunView) -> list[object]:
    now = f"round {run.current_round}: {run.answered} of {len(run.cohort)} answered" if run.current_round else ""
    last = run.last_round
    loss = "" if last is None or "loss" not in last.evaluation else f", held-out loss {last.evaluation['loss']:.4g}"
    told = "" if last is None else f"{last.participants} of {last.cohort} clients, {last.seconds:.1f} s{loss}"
    spent = [
        f"{number(one.epsilon) if one.epsilon is not None else 'no bound'} each {one.unit} at {one.target_delta:g}"
        for one in run.accounts
    ]
    away = sum(sum(counts.values()) for counts in run.not_now.values())
    rounds = f"{run.rounds_done} of {run.rounds or '?'}"
    return [run.name, run.state, rounds, now, told, "; ".join(spent), _counts(run.refusals), away or "", run.message]


def _devices(view: Overview) -> Table:
    columns = ("device", "state", "app", "last seen", "up", "down", "updates", "refused", "not now")
    rows = []
    for one in view.devices[:_MOST_DEVICES]:
        seen = "never" if one.last_seen is None else f"{max(0.0, view.at - one.last_seen):.0f} s ago"
        up, down = byte_size(one.bytes_up), byte_size(one.bytes_down)
        counts = _counts(one.refusals), _counts(one.not_now)
        rows.append([one.client_id, one.state, one.app[:12], seen, up, down, one.updates, *counts])
    return _table("Devices", columns, rows, _left(view.devices, _MOST_DEVICES, view.devices_left_out))


def _versions(view: Overview) -> Table:
    rows = [
        [one.name, short_digest(one.version_id), ", ".join(one.channels), one.participants, moment(one.created_at)]
        for one in view.versions[:_MOST_VERSIONS]
    ]
    return _table("Versions", ("version", "id", "channels", "clients", "made"), rows)


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in found.items())


def _left(found: Sequence[object], most: int, left: int) -> str | None:
    """How many rows a table leaves out."""
    more = max(0, len(found) - most) + left
    return f"{more} more: --json, or the status page" if more else None
