"""``fedpeft device personal``: what is kept of personal adapters on a device, and one step back.

It changes a pointer on the disk, for the server of that device to find (`fedpeft serve --device` looks twice a second);
no model is loaded. Training is done in Python, or by a federation's client.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from federated.cli.device_agent import CONFIG, ConfigOption
from federated.cli.tables import console, fill, say
from federated.errors import DeviceError

if TYPE_CHECKING:
    from federated.device.personal_store import PersonalStore

__all__ = ["app"]

app = typer.Typer(help="Personal adapters of this device: what is kept, and one step back.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Whose.")]


@app.command("list")
def list_(config: ConfigOption = CONFIG) -> None:
    """Show whose personal adapters are here: all kept versions, the one in use, and what each was trained from."""
    store = _store(config)
    table = Table("name", "version", "in use", "before it", "from version id", "kind")
    for name in store.names():
        standing = store.known(name)
        for number in store.numbers(name):
            one, _ = store.get(name, number)
            use = "" if number != standing.number else "stale" if standing.stale else "yes"
            kind = "whole" if one.is_whole else "stacked"
            fill(table, [[name, number, use, one.previous or "none", one.onto_version[:12] or "a fresh one", kind]])
    console().print(table)


@app.command()
def rollback(name: NameArgument, config: ConfigOption = CONFIG) -> None:
    """Go back to the version before; before the first, the device's own version answers alone."""
    store = _store(config)
    if not store.known(name).number:
        raise DeviceError(f"nothing of {name!r} is in use on this device; there is nothing to go back to")
    moved = store.before(name)
    store.stand(name, moved)
    say(f"{name}: version {moved.number} answers again" if moved.number else f"{name}: nothing of its own answers now")


@app.command()
def forget(name: NameArgument, config: ConfigOption = CONFIG) -> None:
    """Delete everything of a name."""
    store = _store(config)
    store.known(name)
    store.forget(name)
    say(f"{name}: deleted")


def _store(config: Path) -> PersonalStore:
    from federated.device import device_config
    from federated.device.personal_store import PersonalStore

    return PersonalStore(device_config(config).state / "personal")
