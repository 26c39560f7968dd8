"""What may be asked of a running agent, and what each command does to the journal.

Each can be carried out twice without harm. What somebody decides by hand is kept against the channel until that moves:
`Book.declined`; a pin, until it is taken off.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from federated.device.agent_commands import Command, Mailbox
from federated.device.agent_fetch import Releases
from federated.device.agent_steps import Steps
from federated.device.journal import FAILED, Entry, Journal, Reply
from federated.device.shelf import Shelf
from federated.device.slots import NULL
from federated.errors import DeviceError, FederatedError, ReleaseError
from federated.release import ReleasedVersion

__all__ = ["Verbs"]

_LOG = logging.getLogger(__name__)


class Verbs:
    """Carries out the commands in a mailbox.

    Args:
        mailbox, journal, shelf, releases: of the state folder.
        steps: loads, proves and routes.
        take: brings a released version to probation; says whether source and disk did their part.

    Attributes:
        decisions: how often somebody decided by hand what answers.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        *,
        journal: Journal,
        shelf: Shelf,
        releases: Releases,
        steps: Steps,
        take: Callable[[ReleasedVersion], bool],
    ) -> None:
        self._mailbox = mailbox
        self._journal = journal
        self._shelf = shelf
        self._releases = releases
        self._steps = steps
        self._take = take
        self._under_way = self._begun = ""
        self.decisions = 0

    def obey(self, *, offline: bool = False) -> None:
        """Carry out what waits.

        Args:
            offline: only up to the first command that needs the source: before anything serves, and while the source
                sends something. Where that is for an install, only what was asked after it began goes before it.

        Raises:
            ReleaseError: if the disk refuses.
        """
        for name in self._mailbox.waiting():
            if name == self._under_way:
                continue
            if offline and (name < self._begun or self._mailbox.is_install(name)):
                return
            if name not in {reply.name for reply in self._journal.book.replies}:
                reply = self._answer(name)
                self._journal.change(replies=(*self._journal.book.replies, reply))
            self._mailbox.done(name)

    def _answer(self, name: str) -> Reply:
        try:
            command = self._mailbox.read(name)
            self._steps.tell("command", verb=command.verb, version=command.version)
            self.decisions += command.verb != "unpin"
            return Reply(name, True, self._carry_out(command))
        except FederatedError as error:
            return Reply(name, False, str(error))
        except Exception as error:  # noqa: BLE001 - whoever asked is told, and the agent goes on
            _LOG.exception("unforeseen; what is installed goes on")
            return Reply(name, False, f"unforeseen: {type(error).__name__}, see the agent's log")

    def _carry_out(self, command: Command) -> str:
        match command.verb:
            case "install":
                self._under_way, self._begun = command.name, self._mailbox.now()
                try:
                    return self._install(command.version)
                finally:
                    self._under_way = self._begun = ""
            case "activate":
                return self._activate(self._named(command.version))
            case "rollback":
                return self._rollback(command.version)
            case "pin":
                return self._pin(self._named(command.version) if command.version else self._journal.book.active)
            case "unpin":
                self._journal.change(pinned="", declined="")
                return "the device follows its channel"

    def _install(self, version_id: str) -> str:
        self._refuse_while_pinned()
        self._releases.refresh()
        released = self._releases.resolve(version_id or None)
        current = self._releases.resolve().record.version_id
        found = released.record.version_id
        declined = "" if found == current else current
        if self._journal.book.state(found) == FAILED:
            self._journal.enter(found, "discovered")  # asked for by hand: what it did before is forgiven
        self._journal.change(offered=current, declined=declined)
        if found != self._journal.book.active and not self._take(released):
            raise ReleaseError(self._journal.book.trouble)
        return self._outcome(found)

    def _activate(self, version_id: str) -> str:
        self._refuse_while_pinned()
        self._bring(version_id, declined="" if version_id == self._journal.book.offered else self._journal.book.offered)
        return self._outcome(version_id)

    def _rollback(self, leaving: str) -> str:
        book = self._journal.book
        if leaving and leaving != book.active:
            return f"{_short(leaving)} does not answer any more; {_short(book.active)} does"
        if book.active == NULL:
            return "the null adapter answers; there is nothing to go back to"
        return f"{_short(self._steps.leave(declined=book.offered, pinned=''))} answers again"

    def _pin(self, version_id: str) -> str:
        if version_id != self._journal.book.active:
            self._bring(version_id)
        self._outcome(version_id)
        self._journal.change(pinned=version_id)
        return f"the device stays at {_short(version_id)}, whatever is released"

    def _bring(self, version_id: str, **fields: str) -> None:
        """Activate something that is here: at once if it has shown before that it works, else by way of its probes."""
        state = self._journal.book.state(version_id)
        if version_id == self._journal.book.active:
            self._journal.change(**fields)
        elif version_id == NULL or state == "committed":
            self._steps.switch(version_id, **fields)
        else:
            self._journal.enter(version_id, "staged", entry={"attempts": 0})
            self._steps.bring_up(version_id, **fields)

    def _outcome(self, version_id: str) -> str:
        entry = self._journal.book.versions.get(version_id) or Entry(version_id, "committed")
        if self._journal.book.active != version_id:
            raise DeviceError(f"{_short(version_id)} was not activated: {entry.reason or entry.state}")
        return f"{_short(version_id)} answers{' on probation' if entry.state == 'probation' else ''}"

    def _refuse_while_pinned(self) -> None:
        pinned = self._journal.book.pinned
        if pinned:
            raise DeviceError(f"the device is pinned at {_short(pinned)}; first: fedpeft device pin --off")

    def _named(self, name: str) -> str:
        """The one version on the shelf that a name means."""
        if name == NULL:
            return NULL
        found = [one for one in self._shelf.ids() if name and one.startswith(name)]
        if len(found) != 1:
            here = ", ".join(map(_short, self._shelf.ids())) or "none"
            raise DeviceError(f"{len(found)} versions on this device begin with {name!r}; found {here}")
        return found[0]


def _short(version_id: str) -> str:
    return version_id if version_id == NULL else version_id[:12]
