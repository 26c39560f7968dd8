"""Opens a `Source`: finds the data, makes clients of it, and says who was left out.

Called by engines, client apps and the command line. One process parses a table once, however many clients it
simulates; data that changed on disk is read anew.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from federated.config import DataConfig, TaskConfig
from federated.data.assets import asset_path
from federated.data.bundled import BUNDLED, bundled_pool
from federated.data.hub import hub_records
from federated.data.partition import partition_rows
from federated.data.readers import SUFFIXES, Record, read_records, short_path
from federated.data.rows import RowReader, check_client_id
from federated.data.source import Pool, PooledSource, Row, Source, few, too_small
from federated.data.synthetic import synthetic_pool
from federated.errors import DataError

__all__ = ["open_source"]

_Stamp = tuple[tuple[str, int, int], ...]


def open_source(config: DataConfig, task: TaskConfig, *, app_dir: Path | None = None) -> Source:
    """Open the data that ``config`` names, for ``task``.

    With ``data=files`` only the folder is listed here, and each client's file is read by ``load``. The result is
    cached by configuration and by the state of the files.

    Args:
        config: where rows come from and how they become clients.
        task: what a row holds.
        app_dir: where a relative ``config.path`` is looked up when the working directory does not have it.

    Raises:
        DataError: if the data is missing, malformed, does not fit the task, or leaves no client.
    """
    try:
        path = _located(config, app_dir)
        return _open(config, task, path, _stamp(path))
    except OSError as error:
        raise DataError(f"data.path: {config.path!r} cannot be read: {error.strerror}") from None


def _located(config: DataConfig, app_dir: Path | None) -> Path | None:
    if config.name in BUNDLED:
        return asset_path(config.name)
    if config.name not in ("files", "table"):
        return None
    if not config.path:
        raise DataError(f"data={config.name} needs data.path, found none")
    given = Path(config.path).expanduser()
    for path in (given, app_dir / given if app_dir else given):
        if path.exists():
            return path.absolute()
    places = "the working directory" + (" and the app folder" if app_dir else "")
    raise DataError(f"data.path: no such file or folder: {config.path!r} (looked in {places})")


def _stamp(path: Path | None) -> _Stamp:
    """What changes when the data changes: each file's name, time and size."""
    if path is None:
        return ()
    stamps = []
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        status = file.lstat()
        stamps.append((file.name, status.st_mtime_ns, status.st_size))
    return tuple(stamps)


@lru_cache(maxsize=8)
def _open(config: DataConfig, task: TaskConfig, path: Path | None, stamp: _Stamp) -> Source:  # noqa: ARG001
    pool = _natural_pool(config, task, path)
    if config.partition.kind != "natural":
        rows: list[Row] = [row for client_id in pool.client_ids for row in pool.rows(client_id)]
        pool = partition_rows(rows, config, notes=pool.notes)
    pool = _large_enough(pool, config)
    pool = _first(pool, config.max_clients)
    return PooledSource(pool, config, task.labels)


def _natural_pool(config: DataConfig, task: TaskConfig, path: Path | None) -> Pool:
    if config.name == "hub":
        return _grouped(list(hub_records(config)), RowReader(config, task))
    if path is None:  # only made-up data has neither a place on disk nor on the hub
        return synthetic_pool(config, task)
    if config.name in BUNDLED:
        return bundled_pool(config, task, path=path)
    if config.name == "files":
        return _files_pool(path, RowReader(config, task))
    if not path.is_file():
        raise DataError(f"data.path: {short_path(path)} is a folder; data=table expects one file, or use data=files")
    reader = RowReader(config, task)
    return _grouped(list(read_records(path, columns=reader.columns)), reader)


def _grouped(records: Sequence[Record], reader: RowReader) -> Pool:
    """Rows of one table by client; where clients are made anew, the client column is not needed."""
    natural = reader.config.partition.kind == "natural"
    clients: dict[str, list[Row]] = defaultdict(list)
    for record, row in zip(records, reader.rows(records), strict=True):
        clients[reader.client_id(record) if natural else "all"].append(row)
    counts = {client_id: len(clients[client_id]) for client_id in sorted(clients)}
    return Pool(tuple(counts), clients.__getitem__, counts, own=natural)


def _files_pool(folder: Path, reader: RowReader) -> Pool:
    """One client per file; nothing is read yet."""
    if not folder.is_dir():
        raise DataError(f"data.path: {short_path(folder)} is a file; data=files expects a folder, or use data=table")
    hidden = [file.name for file in folder.iterdir() if file.name.startswith(".")]
    files = _by_client(sorted(file for file in folder.iterdir() if file.name not in hidden))
    if not files:
        kinds = ", ".join(SUFFIXES)
        raise DataError(f"data.path: the folder {short_path(folder)} is empty; expected one file per client ({kinds})")

    def rows(client_id: str) -> list[Row]:
        return reader.rows(read_records(files[client_id], columns=reader.columns))

    notes = (f"did not read hidden files: {', '.join(sorted(hidden))}",) if hidden else ()
    return Pool(tuple(sorted(files)), rows, own=True, notes=notes)


def _by_client(paths: Sequence[Path]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in paths:
        if path.is_dir() or path.suffix.lower() not in SUFFIXES:
            found = "a folder" if path.is_dir() else f"unsupported file type {path.suffix!r}"
            raise DataError(f"{short_path(path)}: {found}; expected one file per client ({', '.join(SUFFIXES)})")
        client_id = check_client_id(path.stem, short_path(path))
        if client_id in files:
            raise DataError(
                f"two files for client {client_id!r}: {files[client_id].name} and {path.name}; expected one"
            )
        files[client_id] = path
    return files


def _large_enough(pool: Pool, config: DataConfig) -> Pool:
    """Leave out clients with fewer than ``min_per_client`` rows, by name.

    In the user's own data a client that cannot even be split is an error, unless small clients were asked to be
    left out; with one file per client it is found when the client is loaded, because nothing is read before.
    """
    explicit = config.min_per_client > 2
    if pool.counts is None and not explicit:
        return pool
    counts = pool.counts or {client_id: len(pool.rows(client_id)) for client_id in pool.client_ids}
    least = max(2, config.min_per_client)
    largest = max(counts, key=counts.__getitem__, default=None)
    if largest is None or (counts[largest] < least and (explicit or not pool.own)):
        found = f"the largest of {len(counts)}, {largest!r}, has {counts[largest]}" if largest else "there is none"
        raise DataError(f"data={config.name} leaves no client: expected at least {least} rows per client, {found}")
    small = [client_id for client_id in pool.client_ids if counts[client_id] < least]
    if not small:
        return replace(pool, counts=counts)
    if pool.own and not explicit:
        raise DataError(too_small(small[0], counts[small[0]]))
    named = few([f"{client_id} ({counts[client_id]})" for client_id in small])
    note = f"left out {len(small)} clients with fewer than {least} rows: {named}"
    kept = tuple(client_id for client_id in pool.client_ids if counts[client_id] >= least)
    return replace(pool, client_ids=kept, counts=counts, notes=(*pool.notes, note))


def _first(pool: Pool, most: int) -> Pool:
    if not most or len(pool.client_ids) <= most:
        return pool
    note = f"kept the first {most} of {len(pool.client_ids)} clients by name (data.max_clients)"
    return replace(pool, client_ids=pool.client_ids[:most], notes=(*pool.notes, note))
