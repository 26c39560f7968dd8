"""``fedpeft deploy``, the part about devices: invite, look, approve, revoke. Given on the server, in its folder.

The door enters devices into the same book. Approval and revocation count for the strategy at once, from its next round
on; Flower is told too, and if its SuperLink is not up, it is told when it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.table import Table

from federated.cli.registry import actor
from federated.cli.tables import console, fill, say
from federated.errors import ConfigError, DeploymentError

if TYPE_CHECKING:
    from federated.deployment.devices import Device, DeviceBook

__all__ = ["COMMANDS"]


FolderOption = Annotated[Path, typer.Option("--folder", metavar="DIR", help="The server's folder.")]
ActorOption = Annotated[
    str | None, typer.Option("--as", metavar="NAME", help="Who the book says that it was; default: the user.")
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The device's name.")]
FOLDER = Path("deployment")
_SPAN = re.compile(r"([1-9][0-9]{0,4})([mhd])")
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def invite(
    client_id: Annotated[str, typer.Argument(metavar="NAME", help="What the device is called from now on.")],
    approve_at_once: Annotated[
        bool, typer.Option("--approve", help="Whoever uses the invitation is in, without another word of yours.")
    ] = False,
    valid: Annotated[str, typer.Option("--valid", metavar="TIME", help="Such as 30m, 24h or 7d.")] = "24h",
    folder: FolderOption = FOLDER,
    name: ActorOption = None,
) -> None:
    """Print an invitation for one device: one line, good for one use. Whoever has it can enrol in its place.

    Example: fedpeft deploy invite clinic-north --valid 2h
    """
    span, door, book = _span(valid), _door(folder), _book(folder)
    from federated.deployment.certificates import ca_fingerprint

    made = book.invite(
        client_id,
        door=door,
        ca_sha256=ca_fingerprint(_read(folder / "tls" / "ca.crt")),
        valid=span,
        auto_approve=approve_at_once,
        actor=actor(name),
    )
    typer.echo(made.text)
    how = "it is in at once" if approve_at_once else f"then: fedpeft deploy approve {client_id}"
    say(f"for {client_id}, until {made.expires_at:%F %T} UTC; on the device: fedpeft device enroll -", stderr=True)
    say(f"hand it over on a way that you trust; {how}", stderr=True)


def devices(folder: FolderOption = FOLDER) -> None:
    """Show who is invited, waits, takes part or was revoked, with the fingerprints of their keys."""
    book = _book(folder)
    from federated.deployment.keys import fingerprint

    table = Table("name", "state", "node key", "update key", "since (UTC)", "Flower", "remark")
    for one in book.devices():
        since = one.revoked_at or one.approved_at or one.enrolled_at
        flower = one.node_id or ("not registered" if one.state == "approved" else "")
        keys = [fingerprint(one.node_key), fingerprint(one.update_key)]
        fill(table, [[one.client_id, one.state, *keys, _time(since), flower, one.remark]])
    for waiting in book.open_invitations():
        remark = f"until {_time(waiting.expires_at)}" + (", approves itself" if waiting.auto_approve else "")
        fill(table, [[waiting.client_id, "invited", "", "", _time(waiting.made_at), "", remark]])
    console().print(table)


def approve(client_id: NameArgument, folder: FolderOption = FOLDER, name: ActorOption = None) -> None:
    """Let a device take part that asked. Compare its fingerprints with what its owner reads out, first."""
    book = _book(folder)
    done = book.approve(client_id, actor=actor(name))
    _show(done)
    _tell_flower(book, folder, actor(name), f"{done.client_id} is approved, and Flower does not know it yet")


def revoke(
    client_id: NameArgument,
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; kept in the book.")],
    folder: FolderOption = FOLDER,
    name: ActorOption = None,
) -> None:
    """End a device's part from the next round on, or withdraw its invitation. Its keys are never taken again."""
    book = _book(folder)
    done = book.revoke(client_id, actor=actor(name), reason=reason)
    if done is None:
        say(f"{client_id}: the invitation is withdrawn")
        return
    _show(done)
    if done.node_id or done.registering is not None:
        _tell_flower(book, folder, actor(name), f"{done.client_id} is revoked, and Flower still lets it connect")


def history(
    folder: FolderOption = FOLDER,
    newest: Annotated[int, typer.Option("--newest", min=1, metavar="N", help="Only so many.")] = 40,
) -> None:
    """Show who did what to which device, the newest last."""
    table = Table("number", "at (UTC)", "who", "did", "device", "details")
    for one in _book(folder).log()[-newest:]:
        fill(table, [[one.number, _time(one.at), one.actor, one.action, one.client_id, one.detail]])
    console().print(table)


COMMANDS: dict[str, Callable[..., None]] = {
    "invite": invite,
    "devices": devices,
    "approve": approve,
    "revoke": revoke,
    "history": history,
}
"""By name, for the group ``deploy``."""


def _tell_flower(book: DeviceBook, folder: Path, who: str, otherwise: str) -> None:
    """Bring Flower in step.

    Raises:
        DeploymentError: beginning with what holds meanwhile.
    """
    from federated.deployment.nodes import FlowerLink, sync_nodes

    try:
        done = sync_nodes(book, FlowerLink(folder / "flwr"), actor=who)
    except DeploymentError as error:
        raise DeploymentError(f"{otherwise}: {error}") from error
    for told, names in (("registered with", done.registered), ("unregistered from", done.unregistered)):
        if names:
            say(f"{told} Flower: {', '.join(names)}")
    if done.strangers:
        say(f"Flower also lets in nodes that are not in the book: {', '.join(done.strangers)}", stderr=True)


def _show(device: Device) -> None:
    from federated.deployment.keys import fingerprint

    say(f"{device.client_id} is {device.state}")
    say(f"node key {fingerprint(device.node_key)}, update key {fingerprint(device.update_key)}")


def _book(folder: Path) -> DeviceBook:
    from federated.deployment.devices import DeviceBook

    _settings(folder)  # a wrong folder is said so before anything is made there
    return DeviceBook(folder, clock=lambda: datetime.now(UTC))


def _door(folder: Path) -> str:
    door = _settings(folder).get("door_url")
    if not isinstance(door, str):
        raise ConfigError(
            f"{folder / 'server.yaml'}: door_url is {door!r}; expected the address of the door for devices"
        )
    from federated.deployment.invitations import check_door

    return check_door(door)


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "server.yaml"
    try:
        found = yaml.safe_load(_read(path))
    except yaml.YAMLError:
        raise ConfigError(f"{path} is not YAML; correct it") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no keys; expected door_url and others")
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DeploymentError(
            f"cannot read {path}: {error.strerror}; give the server's folder with --folder, or make one with "
            "'fedpeft deploy up'"
        ) from None


def _span(text: str) -> timedelta:
    found = _SPAN.fullmatch(text)
    if found is None:
        raise ConfigError(f"--valid {text[:40]!a}; expected a number and m, h or d, such as 30m, 24h or 7d")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


def _time(text: str) -> str:
    return text[:19].replace("T", " ")
