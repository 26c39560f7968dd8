"""The device's agent: follows a channel, and keeps a version serving whatever happens.

    with Agent(config, lambda manifest: runtime) as agent:
        agent.poll()   # is there something new? fetch, verify, stage, probe, activate on probation
        agent.tick()   # carry out commands; commit what has passed its probation, or go back

`federated.device.agent_loop.run` does both, at the right times, until it is told to stop. A server and its agent share
the runtime, and a `HealthReport` that the server writes into. The agent never fetches on behalf of a request. Imports
neither torch nor SQLAlchemy; needs the release extra.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from federated.device.agent_bench import Bench, RuntimeOf, is_blameless
from federated.device.agent_commands import Mailbox
from federated.device.agent_config import DeviceConfig
from federated.device.agent_events import EventLog
from federated.device.agent_fetch import Releases
from federated.device.agent_lock import StateLock
from federated.device.agent_steps import Steps
from federated.device.agent_verbs import Verbs
from federated.device.health import HealthReport
from federated.device.journal import FAILED, Journal, State
from federated.device.shelf import Shelf
from federated.device.slots import NULL, AdapterRuntime
from federated.errors import BaseMismatch, BelowSecurityFloor, ExpiredMetadata, FederatedError, ReleaseError
from federated.files import remove_left
from federated.release import ReleasedVersion, Source
from federated.release.disk import translated

__all__ = ["TICK", "Agent"]

TICK = 0.25
"""Seconds between two looks at commands and health."""


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Agent:
    """Holds a state folder while it is entered; used by one thread, but for `health` and `stop`.

    Args:
        config: the device's.
        runtime_of: gives the runtime, see `RuntimeOf`; a server that has one hands it out.
        source: in place of the config's.
        clock: the time, with its zone.
        monotonic: seconds that never go back.

    Attributes:
        health: for whoever serves.
        config, monotonic: as given.

    Raises:
        ReleaseError: if root or source cannot be used.
    """

    def __init__(
        self,
        config: DeviceConfig,
        runtime_of: RuntimeOf,
        *,
        source: Source | None = None,
        clock: Callable[[], datetime] = _utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.health = HealthReport()
        self.config = config
        self._clock = clock
        self.monotonic = monotonic
        self._stop = threading.Event()
        self._lock = StateLock(config.state)
        self._shelf = Shelf(config.state / "versions")
        self._releases = Releases(config, source=source, clock=clock, monotonic=monotonic, wait=self._between)
        self._bench = Bench(config, self._shelf, self._releases, runtime_of)

    def __enter__(self) -> Self:
        """Take the state folder, mend what a kill left, and serve what served before.

        Raises:
            DeviceError: if another agent holds the folder, or its journal is damaged.
            NoRuntime: if the base model cannot be opened.
            ReleaseError: if the folder cannot be made or read; one that takes no more bytes serves.
        """
        self._lock.take()
        try:
            self._begin()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Let the folder go; without an error this was an orderly end, which no boot counter counts."""
        try:
            if kind is None:
                self._journal.change(boots=0)
                self._steps.tell("stopped")
        finally:
            self._lock.release()

    @property
    def runtime(self) -> AdapterRuntime | None:
        """What serves; None until a first version was loaded."""
        return self._bench.runtime

    @property
    def active(self) -> str:
        """The version that answers, or ``"null"``."""
        return self._journal.book.active

    @property
    def undecided(self) -> bool:
        """Whether the active version is on probation."""
        return self._journal.book.state(self.active) == "probation"

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stop.is_set()

    def stop(self) -> None:
        """End soon, from any thread or a signal: a transfer breaks off, and goes on at the next start."""
        self._stop.set()

    def wait(self, seconds: float) -> bool:
        """Wait, and say whether to stop."""
        return self._stop.wait(seconds)

    def _between(self, seconds: float) -> bool:
        """Wait between two pieces of a transfer, and say whether to stop.

        A transfer may take hours: commands that need no source, and the health of what answers, do not wait for it.
        """
        while not self.stopping:
            with suppress(FederatedError):  # the next tick says it
                self._verbs.obey(offline=True)
                self._steps.judge()
            if seconds <= 0:
                return False
            self.wait(min(seconds, TICK))
            seconds -= TICK
        return True

    def tell(self, event: str, **details: str) -> None:
        """Log an event."""
        self._steps.tell(event, **details)

    def poll(self) -> bool:
        """Look at the channel, and take what is new.

        Returns:
            Whether source and disk did their part; if not, look again soon. The reason is in the journal.
        """
        try:
            self._releases.refresh()
            self._leave_revoked()
            released = self._releases.resolve()
        except ReleaseError as error:
            self._note_trouble(error)
            return False
        version_id = released.record.version_id
        declined = self._journal.book.declined
        self._journal.change(
            polled_at=self._now(),
            fresh_until=released.valid_until.isoformat(),
            trouble="",
            offered=version_id,
            declined=declined if declined == version_id else "",
        )
        return not self._wants(version_id) or self._take(released, by_hand=False)

    def tick(self) -> None:
        """Carry out commands, and look at the active version's health.

        Raises:
            ReleaseError: if the disk refuses.
        """
        try:
            self._verbs.obey()
        finally:
            self._steps.judge()

    def _begin(self) -> None:
        config = self.config
        self._journal = Journal(config.state, self._clock)
        self._steps = Steps(
            config,
            journal=self._journal,
            shelf=self._shelf,
            bench=self._bench,
            events=EventLog(config.state, config.report, self._clock),
            health=self.health,
            monotonic=self.monotonic,
        )
        self._verbs = Verbs(
            Mailbox(config.state / "commands"),
            journal=self._journal,
            shelf=self._shelf,
            releases=self._releases,
            steps=self._steps,
            take=self._take,
        )
        counted = self._borne(self._count_start)
        try:
            self._borne(self._sweep)
            self._borne(lambda: self._verbs.obey(offline=True))
            self._borne(self._steps.restore)
        except FederatedError:
            if counted:  # nothing went down: this could be said in words
                self._borne(lambda: self._journal.change(boots=self._journal.book.boots - 1))
            raise

    def _sweep(self) -> None:
        """Remove what kills left, in the folders where this agent alone writes."""
        metadata = self.config.state / "release" / "metadata"
        with translated("remove what was left"):
            for folder in (self.config.state, metadata, metadata / "roots"):
                remove_left(folder)
        self._shelf.sweep(self._journal.book.versions.keys())

    def _borne(self, step: Callable[[], object]) -> bool:
        """Take a step of a start; a disk that takes nothing is said, and what is installed serves all the same.

        Returns:
            Whether the disk let it.
        """
        try:
            step()
        except ReleaseError as error:
            self._steps.tell("trouble", code=type(error).__name__, reason=str(error))
            return False
        return True

    def _count_start(self) -> None:
        """Count this start against what is to blame if the one before came to nothing."""
        book = self._journal.book
        probed = [one for one in book.versions.values() if one.state == "probing"]
        for one in probed:
            self._journal.enter(one.version_id, "staged")  # it counts its attempts itself
        boots = book.boots + (not probed)
        self._journal.change(boots=boots)
        self._steps.tell("started", boots=boots)
        if book.active != NULL and boots > self.config.probation.boots:
            self._steps.give_up_crashing(boots - 1)

    def _wants(self, version_id: str) -> bool:
        book = self._journal.book
        kept = book.pinned or book.declined or version_id == book.active
        return not (kept or book.state(version_id) == FAILED or self.undecided)

    def _take(self, released: ReleasedVersion, *, by_hand: bool = True) -> bool:
        """Bring a released version to probation, from wherever it is; a kill meanwhile is gone on from."""
        version_id = released.record.version_id
        try:
            if self._journal.book.state(version_id) == "committed" and self._shelf.get(version_id) is not None:
                self._steps.switch(version_id)
                return True
            if not self._bench.fits(released.record.base_digest):
                raise BaseMismatch(
                    f"it is for the base model {released.record.base_digest[:12]}; this device has another"
                )
            decisions = self._verbs.decisions
            self._stage(released)
            if self._verbs.decisions == decisions if by_hand else self._wants(version_id):
                self._steps.bring_up(version_id)  # else somebody decided otherwise while it came
        except FederatedError as error:
            if not is_blameless(error):
                self._enter(released, "discovered")
                self._steps.give_up(version_id, error)
                return True
            told = {"reason": str(error), "code": type(error).__name__, "attempts": 0}
            self._journal.enter(version_id, "discovered", entry=told)
            self._note_trouble(error)
            return False
        return True

    def _stage(self, released: ReleasedVersion) -> None:
        version_id = released.record.version_id
        if self._shelf.get(version_id) is None:
            self._shelf.drop(version_id)
            self._enter(released, "discovered")
            self._releases.sweep(keep=version_id)
            self._enter(released, "downloading")
            fetched = self._releases.fetch(released, self._shelf.weights())
            self._enter(released, "verified", way=fetched.way, nbytes=fetched.nbytes)
            self._shelf.put(released.record, fetched.manifest, fetched.weights, fetched.probes)
        self._enter(released, "staged")
        self._releases.sweep()

    def _enter(self, released: ReleasedVersion, state: State, **details: Any) -> None:
        version_id = released.record.version_id
        known = {"channel": released.channel, "record": released.record.to_custom()}
        if self._journal.book.state(version_id) != state:
            self._journal.enter(version_id, state, entry=known)
            self._steps.tell(state, version_id, counter=released.record.release_counter, **details)

    def _leave_revoked(self) -> None:
        """A version that was revoked does not go on answering."""
        record = self._shelf.record(self.active) if self.active != NULL else None
        if record is not None:
            try:
                self._releases.require_allowed(record)
            except BelowSecurityFloor as error:
                self._steps.give_up(self.active, error)

    def _note_trouble(self, error: FederatedError) -> None:
        said = f"{type(error).__name__}: {error}"
        if said != self._journal.book.trouble:
            event = "stale" if isinstance(error, ExpiredMetadata) else "trouble"
            self._steps.tell(event, code=type(error).__name__, reason=str(error))
        self._journal.change(polled_at=self._now(), trouble=said[:1000])

    def _now(self) -> str:
        return self._clock().isoformat(timespec="seconds")
