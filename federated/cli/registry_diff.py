"""``fedpeft registry diff``: what two versions differ in."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from federated.cli.registry import BlobsOption, RegistryOption, VersionArgument, open_registry
from federated.cli.tables import console, fill, say

if TYPE_CHECKING:
    from federated.registry import Difference, TensorChange

__all__ = ["COMMANDS"]


def diff(
    first: VersionArgument,
    second: VersionArgument,
    registry: RegistryOption = None,
    blobs: BlobsOption = None,
    largest: Annotated[int, typer.Option("--largest", min=0, metavar="N", help="So many tensors.")] = 10,
) -> None:
    """Show what differs in the records and in the stored tensors of two versions, and where they part."""
    with open_registry(registry, blobs) as store:
        found = store.diff(first, second)
    fields = Table("field", "first", "second", title=_title(found))
    fill(fields, found.fields)
    console().print(fields)
    if found.tensors and largest:
        tensors = Table("tensor", "change", "relative", title=f"the {min(largest, len(found.tensors))} largest changes")
        fill(tensors, [_row(one) for one in sorted(found.tensors, key=_size, reverse=True)[:largest]])
        console().print(tensors)
    say(found.message or _summary(found))


def _title(found: Difference) -> str:
    first, second = (f"v{one.number} ({one.version_id[:12]})" for one in (found.first, found.second))
    if found.ancestor is None:
        return f"{first} and {second}, which have no common ancestor"
    return f"{first} and {second}, from v{found.ancestor.number} ({found.ancestor.version_id[:12]}) on"


def _size(one: TensorChange) -> float:
    return float("inf") if one.change is None else one.change


def _row(one: TensorChange) -> list[object]:
    if one.change is None:
        return [one.name, one.message, ""]
    return [one.name, f"{one.change:.4g}", f"{one.change / one.norm:.2%}" if one.norm else ""]


def _summary(found: Difference) -> str:
    if not found.tensors:
        return f"all {found.same} tensors are equal, bit for bit"
    return (
        f"{len(found.tensors)} of {len(found.tensors) + found.same} tensors differ; the change is {found.relative:.2%} "
        f"of the first's length"
    )


COMMANDS: dict[str, Callable[..., None]] = {"diff": diff}
"""By name, for the group of `federated.cli.registry`."""
