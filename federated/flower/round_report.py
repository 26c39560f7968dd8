"""What is said about a round when it closes: plain events for trackers, plain numbers for manifests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from federated.config import SelectionConfig
from federated.flower.round_book import Outcome, not_now, pooled_evaluation, refusals
from federated.manifest import VersionManifest

__all__ = ["final_event", "round_event", "train_metrics"]


def train_metrics(good: Iterable[Outcome]) -> dict[str, float]:
    """Example-weighted mean training loss of the good clients, and their examples."""
    pairs = [(outcome.metrics.get("train_loss"), outcome.num_examples) for outcome in good]
    known = [(loss, count) for loss, count in pairs if loss is not None and count > 0]
    metrics = {"num_examples": float(sum(count for _, count in pairs))}
    if known:
        metrics["train_loss"] = sum(loss * count for loss, count in known) / sum(count for _, count in known)
    return metrics


def round_event(
    outcomes: Sequence[Outcome],
    *,
    round_number: int,
    seconds: float,
    version_id: str | None,
    manifest: VersionManifest | None = None,
    moved: float = 0.0,
    metrics: Mapping[str, float] | None = None,
    missed: str = "",
    measured: Sequence[Outcome] | None = None,
) -> dict[str, Any]:
    """The ``round`` event.

    Args:
        outcomes: what became of each client.
        round_number: 1-based.
        seconds: how long the round took.
        version_id: of the global adapter now.
        manifest: of the version that the round made; None when it made none.
        moved: L2 norm of the global adapter's move.
        metrics: what the rule reports of itself.
        missed: why there is no version.
        measured: those who measured the version that the round started from; default: all.
    """
    good = [outcome for outcome in outcomes if outcome.status == "ok"]
    started_from = manifest.parent if manifest else version_id
    evaluation = pooled_evaluation(list(outcomes if measured is None else measured))
    return {
        "event": "round",
        "round_number": round_number,
        "participants": len(good),
        "cohort": len(outcomes),
        "published": manifest is not None,
        "version_id": version_id,
        "parent": started_from,
        "weights_digest": manifest.weights_digest if manifest else None,
        "train_loss": train_metrics(good).get("train_loss"),
        "update_norm": moved,
        "rule": dict(metrics or {}),
        "bytes_up": sum(outcome.bytes_up for outcome in outcomes),
        "bytes_down": sum(outcome.bytes_down for outcome in outcomes),
        "seconds": round(seconds, 3),
        "refused": refusals(outcomes),
        "not_now": not_now(outcomes),
        "evaluation": {**evaluation, "version_id": started_from} if evaluation else None,
        "message": None if manifest else f"{missed}: the global adapter stays as it was",
    }


def final_event(outcomes: Sequence[Outcome], *, version_id: str | None, selection: SelectionConfig) -> dict[str, Any]:
    """The ``final`` event.

    Args:
        outcomes: of those that were asked to measure the last adapter.
        version_id: of it.
        selection: says what share of the clients was asked.
    """
    return {
        "event": "final",
        "version_id": version_id,
        "evaluation": pooled_evaluation(list(outcomes)),
        "refused": refusals(outcomes),
        "not_now": not_now(outcomes),
        "share": selection.fraction_evaluate,
    }
