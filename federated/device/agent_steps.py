"""What the agent does with a version that is on the shelf: load it, prove it, route to it, commit it, give it up.

Each step is written into the journal before or with its effect, so that after a kill at any moment the next start finds
a version to serve. Whatever fails, the way down is the same: what answered before, then the last known good, then null.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from federated.device.agent_bench import Bench, is_blameless
from federated.device.agent_config import DeviceConfig
from federated.device.agent_events import EventLog
from federated.device.health import HealthReport, judge
from federated.device.journal import FAILED, Entry, Journal
from federated.device.shelf import Shelf
from federated.device.slots import NULL
from federated.errors import DeviceError, FederatedError, NoRuntime, ReleaseError

__all__ = ["Steps"]

_LOG = logging.getLogger(__name__)


class Steps:
    """See the module; used by one thread at a time.

    Args:
        config: the device's.
        journal, shelf, events: of the state folder.
        bench: loads and proves.
        health: what whoever serves reports.
        monotonic: seconds that never go back.
    """

    def __init__(
        self,
        config: DeviceConfig,
        *,
        journal: Journal,
        shelf: Shelf,
        bench: Bench,
        events: EventLog,
        health: HealthReport,
        monotonic: Callable[[], float],
    ) -> None:
        self._config = config
        self._journal = journal
        self._shelf = shelf
        self._bench = bench
        self._events = events
        self._health = health
        self._monotonic = monotonic
        self._since = monotonic()
        self._settled = True
        self._owed: Callable[[], object] | None = None
        """What was done, and could not be written down."""

    def tell(self, event: str, version_id: str = "", **details: Any) -> None:
        """Log an event, for people and on the disk; a full disk does not stop the device."""
        words = " ".join(f"{key}={value}" for key, value in details.items() if value not in ("", None))
        _LOG.info("%s", " ".join(part for part in (event, version_id[:12], words) if part))
        try:
            self._events.add(event, version_id, **details)
        except FederatedError as error:
            _LOG.warning("%s", error)

    def restore(self) -> None:
        """At a start: serve what the journal says, or what there is to go back to.

        Raises:
            NoRuntime: if the base model cannot be opened.
            ReleaseError: if the disk refuses.
        """
        active = self._journal.book.active
        if active == NULL:
            self._open_base()
            return
        try:
            with self._bench.held(active) as digest:
                self._point(digest)
        except NoRuntime:
            raise
        except FederatedError as error:
            self._open_base()  # while the record is there: null may be all that is left
            self._give_up_loading(active, error)
            return
        self.tell("serving", active, state=self._journal.book.state(active))

    def give_up_crashing(self, boots: int) -> None:
        """At a start, after too many that came to nothing: go back without a look at either version.

        The journal moves before anything is loaded, so that each version has starts of its own to fail in, and the
        null adapter comes at the end.
        """
        book = self._journal.book
        reason = f"{boots} starts in a row without a commit or a sign of health: a crash loop"
        target = next(one for one in self._candidates() if one == NULL or self._shelf.record(one) is not None)
        told = {"reason": reason, "code": "DeviceError"}
        self._journal.enter(book.active, FAILED, entry=told, boots=1, **self._gone_back_to(target))
        self.tell("failed", book.active, reason=reason)

    def bring_up(self, version_id: str, **fields: Any) -> bool:
        """Probe a version on the shelf, and put it on probation.

        Args:
            version_id: on the shelf.
            fields: of the book, changed when it is activated.

        Returns:
            Whether it answers now; if not, it failed and the routing is as it was.

        Raises:
            NoRuntime, ReleaseError: if it is not the version's fault that it cannot.
        """
        attempts = self._entry(version_id).attempts
        if attempts >= self._config.probation.boots:
            reason = f"the device went down {attempts} times while this version was loaded and probed"
            self.give_up(version_id, DeviceError(reason))
            return False
        self._journal.enter(version_id, "probing", entry={"attempts": attempts + 1})
        self.tell("probing", version_id)
        try:
            with self._bench.held(version_id) as digest:
                self._bench.prove(version_id, digest)
                self._activate(version_id, digest, fields)
        except FederatedError as error:
            if is_blameless(error):
                raise
            self.give_up(version_id, error)
            return False
        return True

    def switch(self, version_id: str, **fields: Any) -> None:
        """Route to a version that was committed before, or to null.

        Raises:
            BelowSecurityFloor: if it was revoked.
            DeviceError: if it is not here any more, or cannot be loaded.
            FederatedError: as the runtime raises it.
        """
        good = self._good_without(version_id) + ((version_id,) if version_id != NULL else ())
        left = self._journal.book.active
        with self._bench.held(version_id) as digest:
            self._journal.change(**self._route(version_id), good=good, boots=0, **fields)
            self._point(digest)
        self._set_aside(left)
        self.tell("activated", version_id, digest=digest)

    def judge(self) -> None:
        """Commit the active version, give it up, or leave it on probation; note that a start went well."""
        if self._owed is not None:
            self._owed()
        active = self._journal.book.active
        if self._settled:
            return
        tally, seconds = self._health.tally, self._monotonic() - self._since
        if self._journal.book.state(active) != "probation":
            if tally.successes or seconds >= self._config.probation.seconds:
                self._settled = True
                self._journal.change(boots=0)
            return
        verdict = judge(tally, seconds, self._config.probation)
        if verdict == "failed":
            said = f"{tally.failures} requests failed on probation, the last because: {tally.reason}"
            self.give_up(active, DeviceError(said))
        elif verdict == "passed":
            self._commit(active)

    def give_up(self, version_id: str, error: FederatedError) -> None:
        """Remember a version as bad; if it is the one that answers, go back.

        If the disk refuses, what answers has changed all the same, and `judge` writes it down later.
        """
        failed = {"reason": str(error) or repr(error), "code": type(error).__name__, "attempts": 0}
        if version_id != self._journal.book.active:
            self._journal.enter(version_id, FAILED, entry=failed)
        else:
            change = self._go_back()
            self._owed = lambda: self.give_up(version_id, error)
            self._journal.enter(version_id, FAILED, entry=failed, **change, boots=0)
            self._owed = None
        self.tell("failed", version_id, code=failed["code"], reason=failed["reason"])
        self.tidy()

    def leave(self, **fields: Any) -> str:
        """Go back from the active version, which stays committed if it was; what is on probation has failed by that.

        Nothing leads to it by itself any more. As with `give_up`, a full disk only delays the journal.

        Returns:
            What answers now.
        """
        active = self._journal.book.active
        change = {**self._go_back(), "good": self._good_without(active), "boots": 0, **fields}
        self._owed = lambda: self.leave(**fields)
        if self._journal.book.state(active) == "probation":
            reason = {"reason": "rolled back by hand on probation", "code": "DeviceError"}
            self._journal.enter(active, FAILED, entry=reason, **change)
        else:
            self._journal.change(**change)
        self._owed = None
        self.tell("rolled_back", active, to=self._journal.book.active)
        return self._journal.book.active

    def tidy(self) -> None:
        """Take the oldest versions off the shelf that nobody needs, while there are more than the capacity."""
        book = self._journal.book
        needed = {book.active, book.pinned, book.offered, *book.trail[-1:], *book.good[-1:]}
        held = sorted(self._shelf.ids(), key=lambda one: max(self._entry(one).times.values(), default=""))
        for version_id in [one for one in held if one not in needed][: max(0, len(held) - self._config.capacity)]:
            self._shelf.drop(version_id)
            self.tell("dropped", version_id)

    def _commit(self, version_id: str) -> None:
        try:
            with self._bench.held(version_id) as digest:
                self._bench.prove(version_id, digest)
        except FederatedError as error:
            if is_blameless(error):
                raise
            self.give_up(version_id, error)
            return
        good = (*self._good_without(version_id), version_id)
        self._journal.enter(version_id, "committed", boots=0, good=good)
        self._settled = True
        self.tell("committed", version_id)
        self.tidy()

    def _activate(self, version_id: str, digest: str, fields: Mapping[str, Any]) -> None:
        """Put a version that was proved on probation: the journal first, then the pointer."""
        left = self._journal.book.active
        self._journal.enter(
            version_id, "probation", entry={"attempts": 0}, boots=0, **self._route(version_id), **fields
        )
        self._point(digest)
        self._set_aside(left)
        self.tell("activated", version_id, digest=digest)

    def _set_aside(self, version_id: str) -> None:
        """What was left in the middle of its probation is on the shelf, and nothing is said against it."""
        if version_id != self._journal.book.active and self._journal.book.state(version_id) == "probation":
            self._journal.enter(version_id, "staged")

    def _route(self, version_id: str) -> dict[str, Any]:
        """The book's fields once a version answers, and the one before it is what to go back to."""
        book = self._journal.book
        if version_id == book.active:
            return {}
        return {"active": version_id, "trail": (*(one for one in book.trail if one != version_id), book.active)}

    def _go_back(self) -> dict[str, Any]:
        """Route to the first of what there is to go back to that can be loaded; the book's fields for that.

        The pointer moves first: what fails must not answer any longer than it takes. A kill before the journal has it
        repeats the step at the next start.
        """
        for candidate in self._candidates():
            try:
                with self._bench.held(candidate) as digest:
                    self._point(digest)
                break  # at null, the last candidate, at the latest
            except FederatedError as error:
                self.tell("passed_over", candidate, reason=str(error))
        return self._gone_back_to(candidate)

    def _gone_back_to(self, version_id: str) -> dict[str, Any]:
        trail = self._journal.book.trail
        left = trail[: trail.index(version_id)] if version_id in trail else ()
        return {"active": version_id, "trail": left}

    def _good_without(self, version_id: str) -> tuple[str, ...]:
        return tuple(one for one in self._journal.book.good if one != version_id)

    def _candidates(self) -> Iterator[str]:
        book = self._journal.book
        for one in dict.fromkeys((*reversed(book.trail), *reversed(book.good))):
            if one == NULL:
                break
            if one != book.active and book.state(one) != FAILED:
                yield one
        yield NULL

    def _open_base(self) -> None:
        """Open the base that versions here are for, first of those that answered: null answers without any of them.

        Raises:
            NoRuntime: if it cannot be opened.
        """
        book = self._journal.book
        known = dict.fromkeys((book.active, *reversed(book.trail), *reversed(book.good), *self._shelf.ids()))
        for manifest in filter(None, map(self._shelf.manifest, known)):
            try:
                self._bench.open_base(manifest)
                return
            except NoRuntime:
                raise
            except FederatedError as error:
                self.tell("passed_over", manifest.version_id, reason=str(error))

    def _give_up_loading(self, version_id: str, error: FederatedError) -> None:
        """Of damaged files the version is not to blame: it may be fetched again.

        As with `give_up`, a disk that refuses only delays the journal.
        """
        damaged = self._is_damaged(version_id)
        if not (damaged or is_blameless(error)):
            self.give_up(version_id, error)
            return
        change = self._go_back()
        self._owed = lambda: self._give_up_loading(version_id, error)
        if damaged:
            told = {"reason": str(error), "code": type(error).__name__}
            self._journal.enter(version_id, "discovered", entry=told, **change, boots=0)
            self._shelf.drop(version_id)
        else:
            self._journal.change(**change)
        self._owed = None
        self.tell("damaged" if damaged else "passed_over", version_id, reason=str(error))

    def _is_damaged(self, version_id: str) -> bool:
        try:
            return self._shelf.get(version_id) is None
        except ReleaseError:  # it may be whole: whoever may not read it, or has too many files open, does not know
            return False

    def _point(self, digest: str) -> None:
        """Move the runtime's pointer, and watch what answers from now on."""
        self._bench.point(digest)
        self._owed = None
        self._health.watch(digest)
        self._since = self._monotonic()
        self._settled = digest == NULL

    def _entry(self, version_id: str) -> Entry:
        return self._journal.book.versions.get(version_id) or Entry(version_id, "discovered")
