"""Questions to the tables inside a session: records with the names at them, lineages, the next release counter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from federated.registry.records import VersionRecord, record_of
from federated.registry.schema import ChannelRow, TagRow, VersionRow

__all__ = ["ancestors_of", "lineage_of", "next_counter", "records_of", "version_rows"]


def records_of(session: Session, rows: Iterable[VersionRow]) -> list[VersionRecord]:
    """The rows' records, each with the channels and tags at it.

    Raises:
        CorruptBlob: if a stored record does not match its id.
    """
    channels: defaultdict[str, list[str]] = defaultdict(list)
    tags: defaultdict[str, list[str]] = defaultdict(list)
    for channel in session.scalars(select(ChannelRow)):
        channels[channel.version_id].append(channel.name)
    for tag in session.scalars(select(TagRow)):
        tags[tag.version_id].append(tag.name)
    return [record_of(row, channels[row.version_id], tags[row.version_id]) for row in rows]


def version_rows(session: Session, *, run_id: str | None = None, newest: int | None = None) -> list[VersionRow]:
    """All versions, or one run's, or the newest few, in the order of their publication."""
    query = select(VersionRow).order_by(VersionRow.sequence.desc()).limit(newest)
    if run_id is not None:
        query = query.where(VersionRow.run_id == run_id)
    return list(session.scalars(query))[::-1]


def ancestors_of(session: Session, version_ids: Sequence[str]) -> set[str]:
    """The ids of some versions and of all that they descend from; a loop in the parents ends."""
    known: set[str] = set()
    parents = {row.version_id: row.parent for row in session.execute(select(VersionRow.version_id, VersionRow.parent))}
    for version_id in version_ids:
        at: str | None = version_id
        while at is not None and at in parents and at not in known:
            known.add(at)
            at = parents[at]
    return known


def lineage_of(session: Session, row: VersionRow) -> list[VersionRow]:
    """A version and its ancestors, newest first; a loop in the parents ends."""
    line = select(VersionRow.version_id, VersionRow.parent).where(VersionRow.version_id == row.version_id)
    walk = line.cte("line", recursive=True)
    above = select(VersionRow.version_id, VersionRow.parent).where(VersionRow.version_id == walk.c.parent)
    walk = walk.union(above)  # not all: what was seen is not followed again
    found = select(VersionRow).join(walk, walk.c.version_id == VersionRow.version_id)
    rows = {one.version_id: one for one in session.scalars(found)}
    ordered = []
    at = rows.pop(row.version_id, None)
    while at is not None:
        ordered.append(at)
        at = rows.pop(at.parent or "", None)
    return ordered


def next_counter(session: Session, adapter_id: str) -> int:
    """One more than the largest release counter of an adapter; 1 for a new one."""
    largest = session.scalar(select(func.max(VersionRow.release_counter)).where(VersionRow.adapter_id == adapter_id))
    return 1 + (largest or 0)
