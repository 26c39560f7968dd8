"""Rows of a data set on the Hugging Face hub. Needs a network, or a data set that is in datasets' own cache.

The only place that calls `datasets.load_dataset`; no code from the hub is ever run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from federated.config import DataConfig
from federated.data.readers import Record
from federated.errors import DataError

__all__ = ["hub_records"]

Load = Callable[[str], Iterable[Mapping[str, Any]]]


def load_train_split(name: str) -> Iterable[Mapping[str, Any]]:
    """The ``train`` split of a data set, or of the folder ``name``, as datasets loads it."""
    from datasets import load_dataset

    rows: Iterable[Mapping[str, Any]] = load_dataset(name, split="train")
    return rows


def hub_records(config: DataConfig, *, load: Load | None = None) -> Iterator[Record]:
    """The data set's rows.

    Args:
        config: its ``path`` is the data set's name.
        load: loads the rows by name (for tests); the default goes through `datasets`.

    Raises:
        DataError: if ``data.path`` is missing, or the data set cannot be loaded.
    """
    if not config.path:
        raise DataError("data=hub needs data.path (a data set's name, as in 'owner/name'), found none")
    try:
        rows = (load or load_train_split)(config.path)
    except Exception as error:  # noqa: BLE001 - datasets and its HTTP client raise their own trees
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise DataError(f"data.path: the data set {config.path!r} cannot be loaded from the hub: {reason}") from None
    for number, row in enumerate(rows, start=1):
        yield Record(f"{config.path} row {number}", row)
