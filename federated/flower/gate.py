"""The evaluation gate: a version that clients measured to be not worse goes to the canary channel by itself.

Clients measure what they receive, so version k is measured in round k + 1, the last one at the end. What it is compared
with is the newest measurement of the version that the channel points at, which may come from another run; where other
clients took part, the two are not of the same examples.

Privacy: which version is promoted depends on clients' held-out data. Under ``privacy`` the gate is off, unless the
config says that it shall be unprotected; measurements and promotions are then stamped.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from federated.config import ExperimentConfig
from federated.errors import BaseMismatch, ChannelConflict, NotApproved
from federated.registry import Registry
from federated.tracking import Tracker

__all__ = ["STAMP", "Gate"]

_LOG = logging.getLogger(__name__)
_LOWER_IS_BETTER = frozenset({"loss", "perplexity"})

STAMP = "which version was promoted, by clients' measurements"
"""What an unprotected gate adds to what no account covers."""


class Gate:
    """Takes each measurement of a version, records it and decides.

    Args:
        registry: open.
        config: the experiment; its `gate` steers this.
        run_id: the run.
        tracker: takes a ``gate`` event for each decision, a ``warning`` where a promotion was refused.
    """

    def __init__(self, registry: Registry, config: ExperimentConfig, *, run_id: str, tracker: Tracker) -> None:
        self._registry = registry
        self._gate = config.gate
        self._run_id = run_id
        self._tracker = tracker
        self._not_protected = (STAMP,) if config.privacy.enabled else ()

    @classmethod
    def of(cls, registry: Registry | None, config: ExperimentConfig, *, run_id: str, tracker: Tracker) -> Gate | None:
        """The gate that a config asks for; None where it is off or no version is kept."""
        if registry is None or not config.gate.enabled:
            return None
        return cls(registry, config, run_id=run_id, tracker=tracker)

    def measured(self, evaluation: Mapping[str, Any] | None) -> None:
        """Take what clients measured: pooled metrics with the ``version_id`` that they are of; None does nothing.

        Raises:
            RegistryError: if the measurement cannot be recorded.
        """
        if evaluation is None:
            return
        version_id = str(evaluation["version_id"])
        metrics = {name: float(value) for name, value in evaluation.items() if name != "version_id"}
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._registry.evaluate(version_id, finite, run_id=self._run_id, not_protected=self._not_protected)
        record = self._registry.get(version_id)
        if record.manifest.servable and record.number > 0:  # v0 is untrained
            self._decide(version_id, finite.get(self._gate.metric))

    def _decide(self, version_id: str, found: float | None) -> None:
        current = self._registry.channels().get(self._gate.channel)
        if current == version_id:
            return
        reason = self._objection(current, found)
        if not reason:
            reason = self._promote(version_id, current, found)
        event = {"event": "gate", "version_id": version_id, "channel": self._gate.channel, "metric": self._gate.metric}
        self._tracker.emit({**event, "value": found, "promoted": not reason, "message": reason})

    def _objection(self, current: str | None, found: float | None) -> str:
        """Why the version is not promoted; empty where nothing speaks against it."""
        metric = self._gate.metric
        if found is None:
            return f"clients reported no {metric}"
        if current is None:
            return ""
        known = self._known(current)
        if known is None:
            return f"{metric} of {current[:12]}, where the channel points, was never measured: promote by hand once"
        better = known - found if metric in _LOWER_IS_BETTER else found - known
        if better >= self._gate.min_improvement:
            return ""
        return f"{metric} {found:.6g} against {known:.6g} of {current[:12]}, where the channel points"

    def _known(self, version_id: str) -> float | None:
        values = (one.metrics.get(self._gate.metric) for one in self._registry.evaluations(version_id))
        return next((value for value in values if value is not None), None)

    def _promote(self, version_id: str, current: str | None, found: float | None) -> str:
        """Move the channel, if nobody else moved it meanwhile; returns why not, and says so."""
        details = {
            "gate": {"metric": self._gate.metric, "value": found, "min_improvement": self._gate.min_improvement},
            "not_protected": list(self._not_protected),
        }
        try:
            self._registry.channel(self._gate.channel).promote(version_id, expected=current, details=details)
        except (BaseMismatch, ChannelConflict, NotApproved) as error:
            message = f"the gate did not promote {version_id[:12]}: {error}"
            _LOG.warning("%s", message)
            self._tracker.emit({"event": "warning", "message": message})
            return str(error)
        return ""
