"""``fedpeft audit``: read the registry's audit log, and check that nobody tampered with it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from federated.cli.registry import BlobsOption, RegistryOption, open_registry
from federated.cli.tables import console, fill, say
from federated.errors import RegistryError

if TYPE_CHECKING:
    from federated.registry import AuditEntry

__all__ = ["app"]

app = typer.Typer(help="Who did what to which version, and whether the log is whole.", no_args_is_help=True)

_SHOWN = 160  # characters of the details


@app.command()
def log(
    registry: RegistryOption = None,
    blobs: BlobsOption = None,
    newest: Annotated[int, typer.Option("--newest", min=1, metavar="N", help="So many rows.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="All rows, oldest first, one object a line.")] = False,
) -> None:
    """Show the newest rows, and the log's head: keep it elsewhere, to check the log against it later."""
    with open_registry(registry, blobs) as store:
        entries, head = store.audit.entries(None if as_json else newest), store.audit.head()
    if as_json:
        for entry in entries:
            print(json.dumps(vars(entry)))
        return
    table = Table("row", "at (UTC)", "by", "action", "what", "details")
    fill(table, map(_row, reversed(entries)))
    console().print(table)
    say(f"head {head}")


@app.command()
def verify(
    registry: RegistryOption = None,
    blobs: BlobsOption = None,
    head: Annotated[
        str | None,
        typer.Option("--head", metavar="NUMBER:DIGEST", help="A head that was kept elsewhere."),
    ] = None,
) -> None:
    """Check every row of the log against its digest and the row before."""
    from federated.registry import AuditHead

    kept = None if head is None else AuditHead.parse(head)
    with open_registry(registry, blobs) as store:
        faults, own = store.audit.verify(kept), store.audit.head()
    for fault in faults:
        say(fault.message)
    if faults:
        raise RegistryError(f"the audit log was tampered with at row {faults[0].number} ({len(faults)} faults)")
    against = "" if kept is None else f", and holds the head that was kept at row {kept.number}"
    say(f"{own.number} rows are whole{against}; head {own}")


def _row(entry: AuditEntry) -> list[object]:
    details = entry.details if len(entry.details) <= _SHOWN else f"{entry.details[:_SHOWN]}..."
    return [entry.number, entry.at[:19].replace("T", " "), entry.actor, entry.action, entry.subject[:24], details]
