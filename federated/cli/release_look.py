"""``fedpeft release status`` and ``verify``: what is signed, and what a device makes of it. They only read."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from federated.cli.release import RELEASES, ChannelArgument, KeysOption, ReleasesOption, publisher_of, told
from federated.cli.tables import console, fill, say
from federated.errors import ReleaseError

if TYPE_CHECKING:
    from federated.release import RoleStatus

__all__ = ["COMMANDS"]


def status(releases: ReleasesOption = RELEASES, keys: KeysOption = None) -> None:
    """Show roles, until when they last, whose keys count and are at hand, and where channels point.

    Example: fedpeft release status
    """
    found = publisher_of(releases, keys).status()
    roles = Table("role", "version", "valid until (UTC)", "signatures", "keys (* at hand)")
    fill(roles, map(_role, found.roles))
    console().print(roles)
    channels = Table("channel", "version id", "adapter", "counter", "audit log at")
    for one in found.channels:
        at = one.current
        where = ["nothing yet", "", "", ""]
        if at is not None:
            counter = f"{at.release_counter}{' REVOKED' if one.revoked else ''}"
            where = [at.version_id, at.adapter_id, counter, at.audit_head[:24]]
        fill(channels, [[one.name, *where]])
    console().print(channels)
    floors = ", ".join(f"{adapter or 'unnamed'} {least}" for adapter, least in sorted(found.floors.items()))
    say(f"security floors: {floors or 'none'}")


def verify(
    channel: ChannelArgument,
    source: Annotated[str, typer.Option("--source", metavar="DIR_OR_URL", help="Where a device would look.")],
    root: Annotated[Path, typer.Option("--root", metavar="FILE", help="The root.json that devices were given.")],
    version: Annotated[
        str | None, typer.Option("--version", metavar="VERSION_ID", help="Another version than the current one.")
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option("--state", metavar="DIR", help="Remember what was seen; default: a device's first look."),
    ] = None,
) -> None:
    """Say what a device would say: fetch a channel's version and check all of it.

    Example: fedpeft release verify stable --source https://releases.example.org --root root.json
    """
    from federated.release import ReleaseClient

    kept = tempfile.TemporaryDirectory() if state is None else nullcontext(str(state))
    with kept as folder:
        client = ReleaseClient(root, source, Path(folder))
        try:
            found = client.resolve(channel, version)
            for one in found.sizes:  # the full weights too, which a device may not need
                client.fetch(found, one)
            client.download(found)
        except ReleaseError as error:
            raise type(error)(f"refused, {type(error).__name__}: {error}") from error
    files = ", ".join(f"{name} ({size} bytes)" for name, size in found.sizes.items())
    say(f"a device takes {told(found.record)}, until {found.valid_until:%F %H:%M} UTC: {files}")


COMMANDS: dict[str, Callable[..., None]] = {"status": status, "verify": verify}
"""Of ``fedpeft release``."""


def _role(one: RoleStatus) -> Sequence[object]:
    keys = ", ".join(f"{label}{'*' if label in one.held else ''}" for label in one.keys)
    until = f"{one.expires:%F %H:%M}{' EXPIRED' if one.expired else ''}"
    return [one.name, one.version, until, f"{one.threshold} of {len(one.keys)}", keys]
