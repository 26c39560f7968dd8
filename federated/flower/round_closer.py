"""The end of a round, however it was filled: move the global adapter, publish its version, tell the trackers.

Called by `federated.flower.strategy` for cohorts and by `federated.flower.buffered` for buffers; it asks no client.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from federated.aggregation import Result
from federated.config import PrivacyConfig
from federated.errors import AggregationError
from federated.flower.gate import Gate
from federated.flower.publisher import Publisher
from federated.flower.round_book import Outcome
from federated.flower.round_report import round_event, train_metrics
from federated.flower.server_privacy import ServerPrivacy
from federated.flower.server_state import ServerState
from federated.manifest import VersionManifest
from federated.privacy.account import example_account, privacy_record
from federated.tracking import Tracker

__all__ = ["RoundCloser"]

_LOG = logging.getLogger(__name__)


class RoundCloser:
    """Ends rounds.

    Args:
        server: moves; its id of the last version follows.
        publisher: makes versions.
        tracker: takes a ``round`` event for each round.
        privacy: client-level privacy, where there is any.
        promised: what the run promises its clients' examples; None where nothing.
        gate: promotes what was measured well, where that is asked for.
    """

    def __init__(
        self,
        server: ServerState,
        publisher: Publisher,
        tracker: Tracker,
        *,
        privacy: ServerPrivacy | None = None,
        promised: PrivacyConfig | None = None,
        gate: Gate | None = None,
    ) -> None:
        self._server = server
        self._publisher = publisher
        self._tracker = tracker
        self._privacy = privacy
        self._gate = gate
        self._promised = promised if promised and promised.example.enabled else None

    def publish(self, good: Sequence[Outcome], number: int, *, servable: bool) -> VersionManifest:
        """Make a version of the global adapter as it is; ``good`` are those whose updates are in it.

        Privacy: with client-level privacy a manifest counts those that were planned, and tells no metric: both would
            depend on single clients.
        """
        private = self._privacy
        state = self._server.training_state(number)
        manifest = self._publisher.publish(
            state if private is None else replace(state, ledger_head=private.budget.head),
            parent=self._server.version_id or self._server.parent,
            participants=len(good) if private is None else round(private.planned),
            metrics=train_metrics(good) if private is None else {},
            servable=servable,
            privacy=self._record(),
        )
        self._server.version_id = manifest.version_id
        if private is not None:
            private.published(number)
        return manifest

    def close(
        self,
        found: Result | AggregationError,
        outcomes: Sequence[Outcome],
        *,
        number: int,
        seconds: float,
        measured: Sequence[Outcome] | None = None,
    ) -> dict[str, float] | None:
        """Apply and publish a round's result; without one, the global adapter stays as it was.

        Args:
            found: what the rule made of the updates, or why it made nothing.
            outcomes: what became of each client.
            number: of the round, 1-based.
            seconds: how long it took.
            measured: those who measured the version that the round started from; default: all.

        Returns:
            Training metrics of the good clients; None when there is no new version.

        Raises:
            RegistryError: if the version cannot be stored.
        """
        self._server.note(outcomes)
        if self._promised is not None:
            self._server.note_spent(outcomes)
        try:
            if isinstance(found, AggregationError):
                raise found
            moved = self._server.apply(found)
        except AggregationError as error:
            self._server.finished = number
            about = {"round": number}
            _LOG.warning("round %d: %s: the global adapter stays as it was", number, error, extra=about)
            version = self._server.version_id
            event = round_event(
                outcomes, round_number=number, seconds=seconds, version_id=version, missed=str(error), measured=measured
            )
            self._tracker.emit(event | self._spent())
            self.measured(event["evaluation"])
            return None
        good = [outcome for outcome in outcomes if outcome.status == "ok"]
        manifest = self.publish(good, number, servable=found.servable)
        self._server.finished = number
        event = round_event(
            outcomes,
            round_number=number,
            seconds=seconds,
            version_id=manifest.version_id,
            manifest=manifest,
            moved=moved,
            metrics=found.metrics,
            measured=measured,
        )
        self._tracker.emit(event | self._spent())
        self.measured(event["evaluation"])
        return train_metrics(good)

    def measured(self, evaluation: Mapping[str, Any] | None) -> None:
        """Hand what clients measured, with the ``version_id`` that it is of, to the gate.

        Raises:
            RegistryError: if it cannot be recorded.
        """
        if self._gate is not None:
            self._gate.measured(evaluation)

    def _record(self) -> dict[str, Any] | None:
        """What stands beside a version: an account for each unit that is protected."""
        accounts = [] if self._privacy is None else [self._privacy.budget.account()]
        if self._promised is not None:
            accounts.append(example_account(self._promised, self._server.epsilons.values()))
        return privacy_record(accounts)

    def _spent(self) -> dict[str, Any]:
        record = self._record()
        return {"privacy": record} if record else {}
