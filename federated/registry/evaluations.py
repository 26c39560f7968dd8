"""Measurements of published versions: what clients report of a version, they report after it was published.

So they stand beside the immutable record, not in it; each is a row of the audit log too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from federated.errors import RegistryError
from federated.manifest import canonical_json
from federated.registry.access import Transaction
from federated.registry.schema import EvaluationRow, VersionRow

__all__ = ["EvaluationRecord", "evaluate", "evaluations_of"]


@dataclass(frozen=True)
class EvaluationRecord:
    """A version measured on held-out examples.

    Args:
        version_id: what was measured.
        run_id: where.
        metrics: pooled over all examples, and ``num_examples``.
        not_protected: what no account of privacy covers here, in words; empty where nothing was promised.
        measured_at: UTC.
    """

    version_id: str
    run_id: str
    metrics: Mapping[str, float]
    not_protected: tuple[str, ...]
    measured_at: datetime


def evaluate(
    work: Transaction, row: VersionRow, metrics: Mapping[str, float], *, run_id: str, not_protected: Sequence[str]
) -> None:
    """Record one measurement.

    Raises:
        RegistryError: if a number is not finite.
    """
    odd = [name for name, value in metrics.items() if not math.isfinite(value)]
    if odd:
        raise RegistryError(f"the evaluation's {odd[0]} is {metrics[odd[0]]}; expected plain finite numbers")
    text, words = canonical_json(dict(metrics)).decode(), canonical_json(list(not_protected)).decode()
    work.session.add(
        EvaluationRow(version_id=row.version_id, run_id=run_id, metrics=text, not_protected=words, measured_at=work.at)
    )
    work.note("evaluate", row.version_id, run_id=run_id, metrics=dict(metrics), not_protected=list(not_protected))


def evaluations_of(session: Session, version_id: str) -> list[EvaluationRecord]:
    """All measurements of a version, newest first."""
    query = select(EvaluationRow).where(EvaluationRow.version_id == version_id).order_by(EvaluationRow.sequence.desc())
    return [_record(row) for row in session.scalars(query)]


def _record(row: EvaluationRow) -> EvaluationRecord:
    words = tuple(json.loads(row.not_protected))
    measured = row.measured_at.replace(tzinfo=UTC)
    return EvaluationRecord(row.version_id, row.run_id, json.loads(row.metrics), words, measured)
