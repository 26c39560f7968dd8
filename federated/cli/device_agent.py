"""``fedpeft device``: the agent, and the commands that speak to one through its state folder.

What changes a device is left as a command file; a running agent carries it out at once, else the next one that starts.
`federated.cli.device` has ``try``, which needs no agent.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from federated.cli.tables import as_json, console, fill, say
from federated.errors import DeviceError

if TYPE_CHECKING:
    from federated.device import AdapterRuntime, DeviceConfig
    from federated.device.agent_commands import Verb
    from federated.device.agent_status import DeviceStatus
    from federated.device.journal import Reply
    from federated.manifest import VersionManifest

__all__ = ["COMMANDS"]

ConfigOption = Annotated[Path, typer.Option("--config", metavar="FILE", help="The device's configuration.")]
WaitOption = Annotated[
    float, typer.Option("--wait", min=0, metavar="SECONDS", help="For the running agent's answer, at most.")
]
CONFIG = Path("device.yaml")
_STEP = 0.05


def run(
    config: ConfigOption = CONFIG,
    once: Annotated[bool, typer.Option("--once", help="Look once, finish what that begins, and leave.")] = False,
    app_dir: Annotated[
        Path, typer.Option("--app", metavar="DIR", help="Where a relative path of the base model is looked up.")
    ] = Path(),
) -> None:
    """Follow a channel: fetch, verify, probe and activate what is released, and go back from what fails.

    Ends in order on SIGTERM or Ctrl-C. Example: fedpeft device run --config device.yaml
    """
    settings = _settings(config)
    from federated.device import Agent
    from federated.device import run as work
    from federated.device.agent_status import status_of

    agent = Agent(settings, _opener(settings, app_dir))
    with _heard(agent.stop), _logged():
        well = work(agent, once=once)
    if once and not well:
        raise DeviceError(f"nothing new could be looked for: {status_of(settings, datetime.now(UTC)).book.trouble}")


def status(config: ConfigOption = CONFIG) -> None:
    """Show what answers, which versions are here and in which state, and what is wrong."""
    settings = _settings(config)
    from federated.device.agent_status import status_of

    found = status_of(settings, datetime.now(UTC))
    book = found.book
    say(f"{settings.device_id}: {_short(book.active)} answers ({book.state(book.active) or 'the base alone'})")
    say(f"channel {settings.channel}: {_follows(found)}")
    say(f"agent: {'running' if found.running else 'not running'}, last look at the source: {book.polled_at or 'never'}")
    if found.stale:
        say("stale: the release's metadata have ended; what is installed goes on, nothing new is taken")
    if book.trouble:
        say(f"trouble: {book.trouble}")
    table = Table("version id", "state", "since (UTC)", "counter", "here", "reason")
    for one in sorted(book.versions.values(), key=lambda entry: max(entry.times.values(), default="")):
        counter, since = one.record.get("release_counter", ""), one.times.get(one.state, "")
        here = "active" if one.version_id == book.active else "yes" if one.version_id in found.held else ""
        fill(table, [[one.version_id, one.state, since, counter, here, one.reason]])
    console().print(table)


def install(
    version: Annotated[
        str, typer.Argument(metavar="[VERSION_ID]", help="In full; default: the channel's current one.")
    ] = "",
    config: ConfigOption = CONFIG,
    wait: WaitOption = 60.0,
) -> None:
    """Fetch and activate a version now, also one that failed before; it answers on probation."""
    _command(config, wait, "install", version)


def activate(
    version: Annotated[str, typer.Argument(metavar="VERSION", help="One that is here, by its beginning; or null.")],
    config: ConfigOption = CONFIG,
    wait: WaitOption = 30.0,
) -> None:
    """Let a version that is here answer, or the base alone, until the channel moves."""
    _command(config, wait, "activate", version)


def rollback(config: ConfigOption = CONFIG, wait: WaitOption = 30.0) -> None:
    """Go back to what answered before, at last to the base alone, until the channel moves."""
    from federated.device.journal import read_book

    book = read_book(_settings(config).state)
    _command(config, wait, "rollback", "" if book is None else book.active)


def pin(
    version: Annotated[
        str, typer.Argument(metavar="[VERSION]", help="One that is here, or null; default: what answers now.")
    ] = "",
    off: Annotated[bool, typer.Option("--off", help="Follow the channel again.")] = False,
    config: ConfigOption = CONFIG,
    wait: WaitOption = 30.0,
) -> None:
    """Hold the device at a version, whatever is released; only a revoked or failing one is left."""
    if off and version:
        raise DeviceError(f"pin --off follows the channel, and {version} is a version to stay at; choose one of them")
    _command(config, wait, "unpin" if off else "pin", version)


def history(
    config: ConfigOption = CONFIG,
    newest: Annotated[int, typer.Option("--newest", min=1, metavar="N", help="Only so many.")] = 40,
) -> None:
    """Show the device's own log, the newest event last."""
    from federated.device.agent_events import read_events

    table = Table("at (UTC)", "event", "version id", "details")
    for one in read_events(_settings(config).state)[-newest:]:
        details = {key: value for key, value in one.items() if key not in ("at", "event", "version_id")}
        told = ", ".join(f"{key}: {value}" for key, value in details.items() if value not in ("", None))
        fill(table, [[str(one["at"])[:19], one["event"], str(one["version_id"])[:12], told]])
    console().print(table)


def report(
    to: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")], config: ConfigOption = CONFIG
) -> None:
    """Write what this device held and what failed, for 'fedpeft registry devices'; no inputs are in it."""
    from federated.device.agent_status import report_of

    told = report_of(_settings(config), datetime.now(UTC))
    try:
        to.write_text(as_json(told) + "\n", encoding="utf-8")
    except OSError as error:
        raise DeviceError(f"cannot write {to}: {error.strerror}") from error
    say(f"{to}: {told['device_id']} with {len(told['versions'])} versions")


COMMANDS: dict[str, Callable[..., None]] = {
    "run": run,
    "status": status,
    "install": install,
    "activate": activate,
    "rollback": rollback,
    "pin": pin,
    "history": history,
    "report": report,
}
"""By name, for the group of `federated.cli.device`."""


@contextmanager
def _heard(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and Ctrl-C mean an orderly end."""
    before = {name: signal.signal(name, lambda *_: stop()) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


@contextmanager
def _logged() -> Iterator[None]:
    """What the agent does, one line each, on stderr."""
    logger, handler = logging.getLogger("federated.device"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _settings(path: Path) -> DeviceConfig:
    from federated.device import device_config

    return device_config(path)


def _opener(settings: DeviceConfig, app_dir: Path) -> Callable[[VersionManifest], AdapterRuntime]:
    def opened(manifest: VersionManifest) -> AdapterRuntime:
        from federated.device import open_runtime

        return open_runtime(manifest, app_dir=app_dir, model=settings.base, capacity=settings.capacity)

    return opened


def _command(config: Path, wait: float, verb: Verb, version: str) -> None:
    """Leave a command; show the reply, if an agent is there to give one.

    Raises:
        DeviceError: if the agent could not do it, or gave no answer.
    """
    settings = _settings(config)
    from federated.device.agent_commands import Mailbox
    from federated.device.agent_lock import StateLock

    name = Mailbox(settings.state / "commands").send(verb, version)
    if not StateLock(settings.state).is_held():
        say(f"{verb}: no agent runs on {settings.state}; the next one that starts does it", stderr=True)
        return
    until = time.monotonic() + wait
    while time.monotonic() < until:
        reply = _reply(settings.state, name)
        if reply is not None:
            if not reply.done:
                raise DeviceError(reply.message)
            say(reply.message)
            return
        time.sleep(_STEP)
    raise DeviceError(f"the agent did not answer within {wait:g} s; the command stays, see 'fedpeft device status'")


def _reply(state: Path, name: str) -> Reply | None:
    from federated.device.journal import read_book

    book = read_book(state)
    return next((one for one in book.replies if one.name == name), None) if book else None


def _follows(found: DeviceStatus) -> str:
    book = found.book
    if book.pinned:
        return f"pinned at {_short(book.pinned)}, new releases are not taken"
    if book.declined:
        return f"its version {_short(book.declined)} was overridden by hand; followed again once it moves"
    return f"followed, now at {_short(book.offered) or 'nothing yet'}"


def _short(version_id: str) -> str:
    return version_id[:12]
