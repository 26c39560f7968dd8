"""What a client's data looks like to the rest of the library, and how one client's rows are split.

Knows no file and no format: `federated.data.sources` opens one, trainers and engines only see `Source`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from federated.config import DataConfig
from federated.data.chance import draw_order
from federated.errors import DataError

__all__ = ["few", "ClientData", "Pool", "PooledSource", "Row", "Source", "check_source", "split_rows"]

Row = Mapping[str, Any]
"""One example: ``{"text", "label"}``, ``{"text"}``, ``{"messages"}`` or ``{"values", "label"}``."""

RowsOf = Callable[[str], Sequence[Row]]


def few(names: Sequence[str], most: int = 8) -> str:
    """Names for a note, the first ones when there are many.

    >>> few(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class ClientData:
    """One client's examples, split.

    Privacy: these rows never leave the client.

    Args:
        client_id: stable name.
        train: rows to train on, at least one.
        test: held-out rows, at least one.
    """

    client_id: str
    train: list[Row]
    test: list[Row]


class Source(Protocol):
    """Clients and their rows. Cheap to make; loading one client does not load the others' files."""

    @property
    def client_ids(self) -> tuple[str, ...]:
        """Sorted stable names."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names; ``row["label"]`` is an index into them. Empty for language modelling."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out on the way, in words; never private data."""
        ...

    def load(self, client_id: str) -> ClientData:
        """Read and split one client's rows.

        Raises:
            DataError: if the client is unknown, or its data is missing, malformed or too small.
        """
        ...


@dataclass(frozen=True)
class Pool:
    """Clients before anybody is left out.

    Args:
        client_ids: sorted.
        rows: reads one client's rows.
        counts: rows per client where they are known without reading; None for one file per client.
        own: the user's own data: a client that is too small is an error, not a note.
        notes: what was dropped so far.
    """

    client_ids: tuple[str, ...]
    rows: RowsOf
    counts: Mapping[str, int] | None = None
    own: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PooledSource:
    """The one `Source`: a pool of clients, and how to split each."""

    pool: Pool
    config: DataConfig
    labels: tuple[str, ...]

    @property
    def client_ids(self) -> tuple[str, ...]:
        """Sorted stable names."""
        return self.pool.client_ids

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out on the way, in words."""
        return self.pool.notes

    def load(self, client_id: str) -> ClientData:
        """Read and split one client's rows (new lists; the rows may be shared).

        Raises:
            DataError: if the client is unknown, or its data is missing, malformed or too small.
        """
        if client_id not in self.pool.client_ids:
            raise DataError(f"no client {client_id!r} in data={self.config.name}; there are {len(self.client_ids)}")
        return split_rows(self.pool.rows(client_id), self.config, client_id=client_id)


def split_rows(rows: Sequence[Row], config: DataConfig, *, client_id: str) -> ClientData:
    """Split one client's rows into train and test: ``round(test_fraction * n)`` held out, at least one on each side.

    The order depends on ``(config.seed, client_id)`` and the number of rows only, never on other clients; the caps
    of ``config`` are applied after the split.

    Raises:
        DataError: if there are fewer than two rows.
    """
    if len(rows) < 2:
        raise DataError(too_small(client_id, len(rows)))
    order = draw_order(len(rows), config.seed, client_id)
    held_out = min(max(1, math.floor(len(rows) * config.test_fraction + 0.5)), len(rows) - 1)
    test, train = order[:held_out], order[held_out:]
    return ClientData(
        client_id,
        train=[rows[index] for index in train[: config.max_train_per_client or None]],
        test=[rows[index] for index in test[: config.max_test_per_client or None]],
    )


def too_small(client_id: str, count: int) -> str:
    """The message about a client that cannot be split."""
    found = "no examples" if count == 0 else "one example"
    return (
        f"client {client_id!r} has {found}; expected at least 2 (one to train on, one held out): add rows, "
        "remove the client, or set data.min_per_client=3 or more to leave small clients out"
    )


def check_source(source: Source) -> None:
    """Load every client once, one at a time, so that bad data is found before a run starts.

    Raises:
        DataError: the first fault.
    """
    for client_id in source.client_ids:
        source.load(client_id)
