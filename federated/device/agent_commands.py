"""How the command line speaks to an agent: one small file per command in the state folder, carried out in their order.

A file appears whole (written beside, renamed) and goes when the command is done; the answer is in the journal. So a
command outlives kills on both sides, and waits while no agent runs. Each can be carried out twice without harm: a
rollback names the version that it is to leave. Who can write to the state folder commands the device.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from federated.errors import DeviceError, FederatedError
from federated.manifest import canonical_json
from federated.release.disk import translated, write_file

__all__ = ["Command", "Mailbox", "Verb"]

Verb = Literal["install", "activate", "rollback", "pin", "unpin"]
_NAME = re.compile(r"\d{20}-[0-9a-f]{8}")
_MOST_BYTES = 4096


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        name: sorts by the time at which it was given.
        verb: what to do.
        version: with which version: an id, its beginning, ``"null"`` or ``""``; of a rollback the one to leave.
    """

    name: str
    verb: Verb
    version: str


class Mailbox:
    """Commands in a folder.

    Args:
        folder: made when the first one is sent.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def send(self, verb: Verb, version: str = "", *, now: Callable[[], int] = time.time_ns) -> str:
        """Leave a command for the agent.

        Returns:
            Its name, under which the journal has the reply.

        Raises:
            ReleaseError: if the disk refuses.
        """
        name = f"{self.now(now)}-{secrets.token_hex(4)}"
        with translated("leave a command for the agent"):
            write_file(self._folder / f"{name}.json", canonical_json({"verb": verb, "version": version}))
        return name

    @staticmethod
    def now(now: Callable[[], int] = time.time_ns) -> str:
        """What the names of commands that are sent from now on sort after."""
        return f"{now():020d}"

    def waiting(self) -> list[str]:
        """Names of the commands that are to be carried out, the oldest first."""
        if not self._folder.is_dir():
            return []
        names = [path.stem for path in self._folder.glob("*.json")]
        return sorted(name for name in names if _NAME.fullmatch(name))

    def read(self, name: str) -> Command:
        """One command.

        Raises:
            DeviceError: if the file is none.
            ReleaseError: if it cannot be read.
        """
        with translated("read a command"), (self._folder / f"{name}.json").open("rb") as file:
            data = file.read(_MOST_BYTES)
        try:
            told = json.loads(data)
            verb, version = told["verb"], told["version"]
        except (ValueError, TypeError, KeyError, RecursionError):
            verb = version = None
        if verb not in get_args(Verb) or not isinstance(version, str):
            raise DeviceError(f"command {name} is none; expected one of {', '.join(get_args(Verb))} and a version")
        return Command(name, verb, version)

    def is_install(self, name: str) -> bool:
        """Whether a command needs the source."""
        try:
            return self.read(name).verb == "install"
        except FederatedError:
            return False

    def done(self, name: str) -> None:
        """Take a command away.

        Raises:
            ReleaseError: if the disk refuses.
        """
        with translated("take a command away"):
            (self._folder / f"{name}.json").unlink(missing_ok=True)
