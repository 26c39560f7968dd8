"""Clients made anew from pooled rows, with Flower's partitioners (imported when used).

The only place that knows flwr-datasets. It divides row numbers and labels, never the rows themselves.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from federated.config import DataConfig, PartitionConfig
from federated.data.chance import draw_order
from federated.data.source import Pool, Row, few
from federated.errors import DataError

__all__ = ["partition_rows"]


def partition_rows(rows: Sequence[Row], config: DataConfig, *, notes: tuple[str, ...] = ()) -> Pool:
    """Divide pooled rows among ``config.partition.num_clients`` clients named ``client-000``, ``client-001`` ...

    ``iid`` deals shuffled rows evenly; ``dirichlet`` draws each label's shares (Hsu et al. 2019), ``pathological``
    gives each client a few labels (McMahan et al. 2017). Seeded by ``config.seed``.

    Args:
        rows: all clients' rows, in a reproducible order.
        config: holds the partition and the seed.
        notes: said before this pool's own.

    Returns:
        A pool without clients that got no rows; the notes name those.

    Raises:
        DataError: if the rows have no labels where labels decide, or cannot be divided so.
    """
    partition = config.partition
    if partition.kind != "iid" and any("label" not in row for row in rows):
        raise DataError(
            f"data.partition.kind={partition.kind} needs labels, which causal_lm rows lack; use iid or natural"
        )
    if partition.num_clients > len(rows):
        raise DataError(
            f"data.partition.num_clients={partition.num_clients} is more than the {len(rows)} rows; use fewer"
        )
    shares, warned = _divide(rows, config)
    width = max(3, len(str(partition.num_clients - 1)))
    made = {f"client-{number:0{width}d}": [rows[index] for index in share] for number, share in enumerate(shares)}
    empty = [client_id for client_id, got in made.items() if not got]
    said = (f"left out {len(empty)} clients that got no rows: {few(empty)}",) if empty else ()
    kept = {client_id: got for client_id, got in made.items() if got}
    return Pool(
        tuple(kept), kept.__getitem__, {name: len(got) for name, got in kept.items()}, notes=notes + warned + said
    )


def _divide(rows: Sequence[Row], config: DataConfig) -> tuple[list[list[int]], tuple[str, ...]]:
    """Row numbers per client, and the partitioner's warnings as notes."""
    from datasets import Dataset

    order = draw_order(len(rows), config.seed, "partition")
    partitioner = _partitioner(config.partition, config.seed)
    partitioner.dataset = Dataset.from_dict({"row": order, "label": [rows[index].get("label", 0) for index in order]})
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            parts = [partitioner.load_partition(number) for number in range(config.partition.num_clients)]
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise DataError(f"data.partition: {len(rows)} rows cannot be divided so: {reason}") from None
    notes = tuple(" ".join(str(warning.message).split()) for warning in caught if warning.category is UserWarning)
    return [[int(index) for index in part["row"]] for part in parts], notes


def _partitioner(partition: PartitionConfig, seed: int) -> Any:
    from flwr_datasets import partitioner as flower

    if partition.kind == "iid":
        return flower.IidPartitioner(partition.num_clients)
    if partition.kind == "dirichlet":
        # no smallest size: asking for one makes flwr-datasets draw again, which bends the distribution
        return flower.DirichletPartitioner(
            partition.num_clients, "label", partition.alpha, min_partition_size=0, self_balancing=False, seed=seed
        )
    return flower.PathologicalPartitioner(
        partition.num_clients, "label", partition.classes_per_client, "first-deterministic", seed=seed
    )
