"""``fedpeft registry``: list, show and follow the versions of a registry; these commands only read.

Errors are `federated.errors.FederatedError`; the caller prints them. Tables go to stdout, what was chosen on the
user's behalf to stderr. `federated.cli.registry_care` holds the commands of the same group that write.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from federated.cli.tables import as_json, cell, console, fill, number, say
from federated.errors import RegistryError

if TYPE_CHECKING:
    from federated.manifest import AdapterSpec
    from federated.registry import EvaluationRecord, Registry, VersionRecord

__all__ = [
    "AsOption",
    "BlobsOption",
    "RegistryOption",
    "VersionArgument",
    "actor",
    "app",
    "blobs_place",
    "find_registry",
    "open_registry",
]

app = typer.Typer(help="Keep, follow and check published adapter versions.", no_args_is_help=True)

_DATABASE, _BLOBS = "registry.db", "blobs"

RegistryOption = Annotated[
    str | None,
    typer.Option(
        "--registry",
        metavar="PATH_OR_URL",
        help="Folder or SQLAlchemy URL. Default: $FEDPEFT_REGISTRY, else the newest registry below runs/.",
    ),
]
BlobsOption = Annotated[
    str | None,
    typer.Option(
        "--blobs",
        metavar="FOLDER_OR_URL",
        help="Where the bytes are, if not beside the database: s3://... Default: $FEDPEFT_BLOBS.",
    ),
]
AsOption = Annotated[
    str | None, typer.Option("--as", metavar="NAME", help="Who does it, for the audit log. Default: your user name.")
]
VersionArgument = Annotated[
    str, typer.Argument(metavar="VERSION", help="latest, v3, RUN:v3, a channel, a tag, or the beginning of an id.")
]


def find_registry(folder: Path | None = None) -> str:
    """The registry to use when none was named; says which on stderr.

    Args:
        folder: where ``runs/`` is; default: the current folder.

    Raises:
        RegistryError: if the environment names none and there is none below ``runs/``.
    """
    named = os.environ.get("FEDPEFT_REGISTRY")
    if named:
        return _say(named, "from FEDPEFT_REGISTRY")
    below = folder or Path()
    every = [path for depth in ("*", "*/*") for path in below.glob(f"runs/{depth}/registry/{_DATABASE}")]
    found = [path for path in every if _holds_versions(path)] or every
    if not found:
        raise RegistryError(
            f"no registry was named and there is none in {below.absolute() / 'runs'}; "
            f"run a simulation here first, pass --registry PATH, or set FEDPEFT_REGISTRY"
        )
    return _say(str(max(found, key=_touched).parent), "the newest one in runs/")


def actor(name: str | None = None) -> str:
    """Who the audit log says that it was: the name given, else the user of the process."""
    if name is not None:
        return name
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"user {os.getuid()}"


def blobs_place() -> str | None:
    """Where the environment says that the bytes are."""
    return os.environ.get("FEDPEFT_BLOBS") or None


def open_registry(registry: str | None, blobs: str | None = None, name: str | None = None) -> Registry:
    """Open an existing registry for a command.

    Args:
        registry: folder or URL; None: see `find_registry`.
        blobs: folder or URL of the bytes, if they are not beside the database; None: ``FEDPEFT_BLOBS`` says.
        name: who works with it; see `actor`.

    Raises:
        RegistryError: if there is none, or it cannot be opened.
    """
    from federated.registry import Registry  # SQLAlchemy takes its time; `fedpeft --help` should not

    return Registry.open(registry or find_registry(), create=False, blobs=blobs or blobs_place(), actor=actor(name))


@app.command("list")
def list_versions(
    registry: RegistryOption = None,
    blobs: BlobsOption = None,
    newest: Annotated[int | None, typer.Option("--newest", min=1, metavar="N", help="Only so many.")] = None,
) -> None:
    """List all versions, newest first."""
    with open_registry(registry, blobs) as store:
        records = store.versions(newest=newest)
    _print_versions(reversed(records), title=f"{len(records)} versions")


@app.command()
def show(version: VersionArgument, registry: RegistryOption = None, blobs: BlobsOption = None) -> None:
    """Show one version's whole record."""
    with open_registry(registry, blobs) as store:
        record, measured = store.get(version), store.evaluations(version)
    table = Table("field", "value", title=cell(f"version {record.number} of run {record.manifest.run_id}"))
    fill(table, [*_details(record), *(("measured later", _measured(one)) for one in measured)])
    console().print(table)


@app.command()
def lineage(version: VersionArgument = "latest", registry: RegistryOption = None, blobs: BlobsOption = None) -> None:
    """Show a version and all its ancestors, newest first."""
    with open_registry(registry, blobs) as store:
        records = store.lineage(version)
    _print_versions(records, title=f"lineage of {records[0].version_id[:12]}")


@app.command()
def channels(registry: RegistryOption = None, blobs: BlobsOption = None) -> None:
    """Show where each channel points."""
    with open_registry(registry, blobs) as store:
        pointed = {name: store.get(version_id) for name, version_id in store.channels().items()}
    table = Table("channel", "version", "id", "run")
    rows = [[name, f"v{at.number}", at.version_id[:12], at.manifest.run_id] for name, at in pointed.items()]
    fill(table, rows)
    console().print(table)


def _say(location: str, why: str) -> str:
    say(f"registry: {location} ({why})", stderr=True)
    return location


def _holds_versions(database: Path) -> bool:
    """Whether anything was ever published: a run that failed at once leaves a registry without a blob."""
    blobs = database.with_name(_BLOBS)
    return blobs.is_dir() and any(blobs.iterdir())


def _touched(database: Path) -> float:
    log = database.with_name(f"{_DATABASE}-wal")
    return max(path.stat().st_mtime for path in (database, log) if path.exists())


def _print_versions(records: Iterable[VersionRecord], *, title: str) -> None:
    table = Table(
        "version", "id", "run", "method", "clients", "metrics", "published (UTC)", "channels, tags", title=title
    )
    fill(table, map(_summary, records))
    console().print(table)


def _summary(record: VersionRecord) -> list[object]:
    manifest = record.manifest
    return [
        f"v{record.number}",
        record.version_id[:12],
        manifest.run_id,
        manifest.method,
        manifest.participants,
        ", ".join(f"{name} {number(value)}" for name, value in sorted(manifest.metrics.items())),
        f"{record.created_at:%Y-%m-%d %H:%M:%S}",
        ", ".join([*record.channels, *record.tags]),
    ]


def _details(record: VersionRecord) -> list[tuple[str, object]]:
    manifest, spec = record.manifest, record.manifest.spec
    return [
        ("version id", record.version_id),
        ("number", f"v{record.number}"),
        ("adapter", f"{manifest.adapter_id or 'unnamed'}, release counter {manifest.release_counter}"),
        ("licence", manifest.licence or "not stated"),
        ("run", manifest.run_id),
        ("published (UTC)", f"{record.created_at:%Y-%m-%d %H:%M:%S}"),
        ("channels", ", ".join(record.channels) or "none"),
        ("tags", ", ".join(record.tags) or "none"),
        ("parent", manifest.parent or "none"),
        ("base digest", manifest.base_digest),
        ("base parts", as_json(manifest.base) if manifest.base else "not recorded"),
        ("weights digest", manifest.weights_digest),
        ("method", manifest.method),
        ("participants", manifest.participants),
        ("kind", ", ".join([spec.peft_type, *_size(spec), spec.dtype])),
        ("servable", "yes" if manifest.servable else "no"),
        ("privacy", as_json(manifest.privacy) if manifest.privacy else "not accounted"),
        ("metrics", as_json(manifest.metrics)),
        ("task", as_json(manifest.task)),
        ("code version", manifest.code_version or "unknown"),
    ]


def _measured(one: EvaluationRecord) -> str:
    stamp = f"\nnot protected: {'; '.join(one.not_protected)}" if one.not_protected else ""
    return f"{as_json(one.metrics)}\nin {one.run_id}, {one.measured_at:%F %T} UTC{stamp}"


def _size(spec: AdapterSpec) -> list[str]:
    """What there is to say of an adapter's size, by its kind."""
    if spec.modules:
        return [f"rank {spec.rank}", f"alpha {spec.alpha:g}", f"{len(spec.modules)} modules"]
    if spec.virtual_tokens:
        return [f"{spec.virtual_tokens} virtual tokens"]
    return [f"{len(spec.trained)} tensors"] if spec.trained else []
