"""gc: removing versions that nothing needs, then bytes that no version names.

A version is needed if a channel points at it, or pointed at it so lately that a rollback may go there; if it has a tag;
if a device ever reported to hold it; if it is young, for a run that is under way stands on its own newest version, and
no channel may point there yet; or if a needed one descends from it.

Rows go first, in one transaction with the audit log's row; bytes follow in transactions of their own, each of which
looks again which of them no row names. Killed anywhere in between, what is left is bytes without a row, which the next
gc takes. A publisher looks for its bytes once more when nobody else can write.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from federated.errors import RegistryError
from federated.registry.access import Access, Transaction
from federated.registry.lookup import ancestors_of
from federated.registry.schema import (
    ApprovalRow,
    ChannelRow,
    DeviceRow,
    EvaluationRow,
    MoveRow,
    TagRow,
    VersionRow,
)

__all__ = ["YOUNG", "Collection", "collect"]

YOUNG = timedelta(days=1)
"""Versions younger than that stay, unless the caller says otherwise."""

_BATCH = 200


@dataclass(frozen=True)
class Collection:
    """What gc removed, or would remove.

    Args:
        removed: ids of versions, oldest first.
        kept: number of versions that stay.
        young: how many of these stay only because they are young, or a young one descends from them.
        blobs: number of blobs.
        freed: their bytes.
    """

    removed: tuple[str, ...]
    kept: int
    young: int
    blobs: int
    freed: int


def collect(access: Access, *, older_than: timedelta, keep: int, dry_run: bool) -> Collection:
    """Remove what nothing needs; see `federated.registry.Registry.gc` for the arguments.

    Raises:
        RegistryError: if an argument makes no sense.
    """
    if keep < 0 or older_than < timedelta(0):
        raise RegistryError(f"gc keeps {keep} earlier versions and those younger than {older_than}; expected 0 or more")
    if dry_run:
        with access.reading("look for what can be removed") as session:
            found = _Found.of(session, before=access.now() - older_than, keep=keep)
            sizes, named = access.blobs.sizes(), _named(session, found.needed)
        orphans = [size for digest, size in sizes.items() if digest not in named]
        return found.collection(len(orphans), sum(orphans))
    with access.writing("remove versions") as work:
        found = _Found.of(work.session, before=work.now - older_than, keep=keep)
        _remove(work, found.doomed)
    return found.collection(*_sweep(access))


@dataclass(frozen=True)
class _Found:
    """Which versions go (oldest first), and which stay; ``wanted`` would stay whatever their age."""

    doomed: tuple[str, ...]
    needed: frozenset[str]
    wanted: frozenset[str]

    @classmethod
    def of(cls, session: Session, *, before: datetime, keep: int) -> _Found:
        rows = session.execute(select(VersionRow.version_id, VersionRow.created_at).order_by(VersionRow.sequence)).all()
        limit = before.replace(tzinfo=None)
        young = [version_id for version_id, created in rows if created > limit]
        wanted = ancestors_of(session, list(_roots(session, keep)))
        needed = wanted | ancestors_of(session, young)
        doomed = tuple(version_id for version_id, _ in rows if version_id not in needed)
        return cls(doomed, frozenset(needed), frozenset(wanted))

    def collection(self, blobs: int, freed: int) -> Collection:
        return Collection(self.doomed, len(self.needed), len(self.needed - self.wanted), blobs, freed)


def _roots(session: Session, keep: int) -> Iterator[str]:
    """What is needed for its own sake."""
    yield from session.scalars(select(TagRow.version_id))
    yield from session.scalars(select(DeviceRow.version_id))
    for pointer in session.scalars(select(ChannelRow)):
        yield pointer.version_id
        move = session.get(MoveRow, pointer.move)
        for _ in range(keep):
            move = None if move is None or move.below is None else session.get(MoveRow, move.below)
            if move is not None:
                yield move.version_id


def _remove(work: Transaction, doomed: Sequence[str]) -> None:
    if not doomed:
        return
    newest_first = doomed[::-1]  # no row may be named as a parent when it goes
    for batch in _batches(newest_first):
        for table in (ApprovalRow, EvaluationRow, VersionRow):
            work.session.execute(delete(table).where(table.version_id.in_(batch)))
    work.note("gc", "versions", versions=list(doomed))


def _sweep(access: Access) -> tuple[int, int]:
    """Remove bytes that no row names; returns how many blobs, and their bytes."""
    blobs = freed = 0
    sizes = access.blobs.sizes()
    for batch in _batches(sorted(sizes)):
        with access.writing("remove bytes that no version names") as work:
            orphans = set(batch) - _named_among(work.session, batch)
            work.blobs.delete(orphans)
            blobs, freed = blobs + len(orphans), freed + sum(sizes[digest] for digest in orphans)
    return blobs, freed


def _named(session: Session, version_ids: frozenset[str]) -> set[str]:
    """Digests of all bytes that some versions name."""
    rows = session.execute(select(VersionRow.version_id, VersionRow.weights_digest, VersionRow.state_digest))
    return {digest for one, *digests in rows if one in version_ids for digest in digests if digest}


def _named_among(session: Session, digests: Sequence[str]) -> set[str]:
    named = select(VersionRow.weights_digest).where(VersionRow.weights_digest.in_(digests))
    states = select(VersionRow.state_digest).where(VersionRow.state_digest.in_(digests))
    return {digest for digest in session.scalars(named.union(states)) if digest}


def _batches(items: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), _BATCH):
        yield items[start : start + _BATCH]
