"""``fedpeft registry devices``: which device holds which version, and reports of devices into the registry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from federated.cli.registry import AsOption, BlobsOption, RegistryOption, open_registry
from federated.cli.tables import console, fill, say
from federated.errors import RegistryError, VersionNotFound

if TYPE_CHECKING:
    from federated.registry import Registry

__all__ = ["COMMANDS"]


def devices(
    reports: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="Reports that 'fedpeft device report' wrote.")
    ] = None,
    registry: RegistryOption = None,
    blobs: BlobsOption = None,
    name: AsOption = None,
) -> None:
    """Take in reports of devices; without any, list which device held which version, and when.

    Example: fedpeft registry devices shop-17.json
    """
    with open_registry(registry, blobs, name) as store:
        for path in reports or ():
            _take(store, path)
        if not reports:
            table = Table("device", "version id", "first (UTC)", "last (UTC)")
            rows = store.devices.holdings()
            fill(
                table,
                ([one.device_id, one.version_id, f"{one.first_at:%F %T}", f"{one.last_at:%F %T}"] for one in rows),
            )
            console().print(table)


def _take(store: Registry, path: Path) -> None:
    from federated.registry.device_reports import device_report

    try:
        report = device_report(path.read_bytes())
    except OSError as error:
        raise RegistryError(f"cannot read {path}: {error.strerror}") from error
    unknown = 0
    for one in report.held:
        try:
            for at in (one.first_at, one.last_at):
                store.devices.report(report.device_id, one.version_id, at=at)
        except VersionNotFound:
            unknown += 1
    more = f", {unknown} unknown here" if unknown else ""
    say(f"{report.device_id}: held {len(report.held)} versions{more}")
    for version_id, reason in report.failed.items():
        say(f"{report.device_id}: {version_id[:12]} failed: {reason}")


COMMANDS: dict[str, Callable[..., None]] = {"devices": devices}
"""By name, for the group of `federated.cli.registry`."""
