"""Opening a registry: find its database and its bytes, make what is missing, bring the schema up to date."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path

from sqlalchemy import Engine

from federated.errors import StorageFull
from federated.registry.access import Access
from federated.registry.audit_log import check_person
from federated.registry.database import locate, open_engine, open_frozen, prepare
from federated.registry.remote_blobs import open_blobs
from federated.registry.translate import translated
from federated.registry.upgrades import holds_registry, upgrade

__all__ = ["open_access"]


def open_access(
    location: str | Path, *, create: bool, blobs: str | Path | None, clock: Callable[[], datetime], actor: str
) -> Access:
    """What `federated.registry.Registry.open` does, with its arguments and errors."""
    actor = check_person(actor, "the name of who works with the registry")
    given = Path(blobs or ".") if "://" in str(location) else Path(location)
    with translated("open the registry", str(given), folder=given.absolute()):
        place = locate(location, blobs)
    with translated("open the registry", place.label, folder=place.disk):
        store = open_blobs(place.blobs)
    upgraded = partial(_upgraded, label=place.label, now=clock(), actor=actor)
    try:
        with translated("open the registry", place.label, folder=place.disk):
            prepare(place, create=create)
            store.sweep()
            engine = upgraded(open_engine(place), create=create)
    except StorageFull:
        frozen = open_frozen(place)
        if frozen is None or not holds_registry(frozen):
            raise
        with translated("open the registry", place.label, folder=place.disk):
            engine = upgraded(frozen, create=False)
    return Access(place, engine, blobs=store, clock=clock, actor=actor)


def _upgraded(engine: Engine, *, create: bool, label: str, now: datetime, actor: str) -> Engine:
    try:
        upgrade(engine, create=create, label=label, now=now, actor=actor)
    except BaseException:
        engine.dispose()
        raise
    return engine
