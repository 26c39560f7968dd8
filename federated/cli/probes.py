"""``--probes`` of ``fedpeft release publish``: measure what a version answers, for devices to compare theirs with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from federated.cli.tables import say
from federated.errors import DataError

if TYPE_CHECKING:
    from federated.registry import Registry

__all__ = ["AppOption", "ProbesOption", "ProbeToleranceOption", "measured"]

ProbesOption = Annotated[
    Path | None,
    typer.Option(
        "--probes",
        metavar="FILE",
        help="JSON lines of inputs; their answers are measured and signed along. They become public.",
    ),
]
ProbeToleranceOption = Annotated[
    float,
    typer.Option("--probe-tolerance", min=0, max=1, help="How far a device's answers may be from the measured ones."),
]
AppOption = Annotated[
    Path, typer.Option("--app", metavar="DIR", help="For --probes: where a relative path of the base is looked up.")
]


def measured(store: Registry, version: str, path: Path, *, tolerance: float, app_dir: Path) -> dict[str, bytes]:
    """Run a version and the base alone on inputs.

    Privacy: the inputs become public with the release.

    Returns:
        The release's file, by name.

    Raises:
        DataError: if the file holds no rows.
        ProbeFailed: if the inputs do not show the adapter's effect.
        FederatedError: if the base cannot be loaded, or a row is none of the task's.
    """
    rows = _rows(path)
    from federated.device import open_runtime
    from federated.device.probes import make_probes
    from federated.release.roles import PROBES

    record = store.get(version)
    runtime = open_runtime(record.manifest, app_dir=app_dir)
    slot = runtime.install(record.manifest, store.weights(record.version_id), version_id=record.version_id)
    made = make_probes(runtime, slot.digest, rows, tolerance=tolerance)
    say(f"measured {len(made.probes)} probes", stderr=True)
    return {PROBES: made.to_bytes()}


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise DataError(f"cannot read the probes' inputs in {path}: {error}") from error
    rows = [_row(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise DataError(f'{path} holds no inputs; expected one JSON object a line, such as {{"text": "..."}}')
    return rows


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise DataError(f'{path}, line {number}: expected a JSON object such as {{"text": "..."}}, found {line[:60]!r}')
    return row
