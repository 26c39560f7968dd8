"""``fedpeft channel`` and ``fedpeft approve``: which version a channel points at, and who agreed."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from federated.cli.registry import AsOption, BlobsOption, RegistryOption, VersionArgument, open_registry
from federated.cli.tables import console, fill, say

__all__ = ["app", "approve"]

app = typer.Typer(help="Promote versions to channels, and roll channels back.", no_args_is_help=True)

ChannelArgument = Annotated[str, typer.Argument(metavar="CHANNEL", help="Such as dev, canary or stable.")]
ExpectOption = Annotated[
    str | None,
    typer.Option(
        "--expect", metavar="VERSION", help="Only if the channel points there now; 'nothing' makes a new channel."
    ),
]


@app.command("list")
def list_channels(registry: RegistryOption = None, blobs: BlobsOption = None) -> None:
    """Show where each channel points, since when, and what it requires."""
    with open_registry(registry, blobs) as store:
        states = store.channel_states()
        records = {one.name: store.get(one.version_id) for one in states if one.version_id is not None}
    table = Table("channel", "version", "id", "run", "since (UTC)", "requires")
    for state in states:
        record, needs = records.get(state.name), f"{state.approvals} approvals" if state.approvals else ""
        where = ["", "nothing yet", "", ""]
        if record is not None:
            where = [f"v{record.number}", record.version_id[:12], record.manifest.run_id, f"{state.moved_at:%F %T}"]
        fill(table, [[state.name, *where, needs]])
    console().print(table)


@app.command()
def promote(
    version: VersionArgument,
    to: Annotated[str, typer.Option("--to", metavar="CHANNEL", help="The channel that moves.")],
    expect: ExpectOption = None,
    registry: RegistryOption = None,
    blobs: BlobsOption = None,
    name: AsOption = None,
) -> None:
    """Make a channel point at a version."""
    from federated.registry import ANYWHERE

    with open_registry(registry, blobs, name) as store:
        seen = None if expect == "nothing" else ANYWHERE if expect is None else store.get(expect).version_id
        record = store.channel(to).promote(version, expected=seen)
    say(f"{to} points at v{record.number} ({record.version_id[:12]})")


@app.command()
def rollback(
    channel: ChannelArgument,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="VERSION", help="An earlier one; default: the one before."),
    ] = None,
    expect: ExpectOption = None,
    registry: RegistryOption = None,
    blobs: BlobsOption = None,
    name: AsOption = None,
) -> None:
    """Make a channel point at what it pointed at before."""
    from federated.registry import ANYWHERE

    with open_registry(registry, blobs, name) as store:
        seen = ANYWHERE if expect is None else store.get(expect).version_id
        record = store.channel(channel).rollback(to, expected=seen)
    say(f"{channel} points at v{record.number} ({record.version_id[:12]}) again")


@app.command()
def require(
    channel: ChannelArgument,
    approvals: Annotated[int, typer.Option("--approvals", metavar="N", help="Different people; 0 lifts it.")],
    registry: RegistryOption = None,
    blobs: BlobsOption = None,
    name: AsOption = None,
) -> None:
    """Let a channel move only to versions that N different people approved."""
    with open_registry(registry, blobs, name) as store:
        store.channel(channel).require(approvals)
    say(f"{channel} requires {approvals} approvals")


@app.command()
def history(channel: ChannelArgument, registry: RegistryOption = None, blobs: BlobsOption = None) -> None:
    """Show all moves of a channel, newest first."""
    with open_registry(registry, blobs) as store:
        moves = store.channel(channel).history()
    table = Table("moved (UTC)", "action", "id", "by")
    fill(table, [[f"{one.moved_at:%F %T}", one.action, one.version_id[:12], one.actor] for one in moves])
    console().print(table)


def approve(
    version: VersionArgument,
    channel: Annotated[str, typer.Option("--for", metavar="CHANNEL", help="The channel that it may move to.")],
    name: Annotated[str, typer.Option("--as", metavar="NAME", help="Who approves.")],
    registry: RegistryOption = None,
    blobs: BlobsOption = None,
) -> None:
    """Approve a version for a channel that requires approvals."""
    with open_registry(registry, blobs, name) as store:
        record = store.get(version)
        people = store.channel(channel).approve(record.version_id, name=name)
    say(f"v{record.number} ({record.version_id[:12]}) is approved for {channel} by {', '.join(people)}")
