"""``fedpeft registry``: commands that make, name, clean and check; `federated.cli.registry` holds those that read."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from federated.cli.registry import (
    AsOption,
    BlobsOption,
    RegistryOption,
    actor,
    blobs_place,
    open_registry,
)
from federated.cli.tables import say
from federated.errors import ConfigError, RegistryError

if TYPE_CHECKING:
    from federated.registry import Registry, VersionRecord

__all__ = ["COMMANDS"]


def init(
    registry: Annotated[str, typer.Argument(metavar="PATH_OR_URL", help="Folder or SQLAlchemy URL.")],
    blobs: BlobsOption = None,
    name: AsOption = None,
) -> None:
    """Make an empty registry, or bring the schema of one up to date."""
    from federated.registry import Registry

    with Registry.open(registry, blobs=blobs or blobs_place(), actor=actor(name)) as store:
        say(f"registry {store.location}: {len(store.versions())} versions, audit log at {store.audit.head()}")


def tag(
    version: Annotated[str | None, typer.Argument(metavar="[VERSION]", help="As in show.")] = None,
    label: Annotated[str | None, typer.Argument(metavar="[TAG]", help="Such as release-1.0.")] = None,
    registry: RegistryOption = None,
    blobs: BlobsOption = None,
    name: AsOption = None,
    remove: Annotated[str | None, typer.Option("--remove", metavar="TAG", help="Take a tag away.")] = None,
) -> None:
    """Give a version a name that stays, and keeps it from gc; without arguments, list the tags."""
    if (version is None) != (label is None) or (remove and version):
        raise ConfigError("registry tag takes VERSION TAG, or --remove TAG, or nothing at all to list the tags")
    with open_registry(registry, blobs, name) as store:
        if remove is not None:
            store.untag(remove)
        elif version is not None and label is not None:
            store.tag(version, label)
        for tagged, version_id in store.tags().items():
            say(f"{tagged}  {version_id}")


def verify(registry: RegistryOption = None, blobs: BlobsOption = None) -> None:
    """Check every record, blob, lineage and channel, and the audit log, against what was written."""
    with open_registry(registry, blobs) as store:
        faults, count, head = store.verify(), len(store.versions()), store.audit.head()
    for fault in faults:
        say(f"{fault.part} {fault.version_id[:12]}: {fault.message}" if fault.version_id else fault.message)
    if faults:
        raise RegistryError(f"{len(faults)} faults; what is named above cannot be trusted any more")
    say(f"{count} versions, their bytes and lineages, the channels and the audit log are whole; head {head}")


def gc(
    registry: RegistryOption = None,
    blobs: BlobsOption = None,
    name: AsOption = None,
    older_than: Annotated[
        float, typer.Option("--older-than", min=0, metavar="DAYS", help="Younger versions stay: a run may need them.")
    ] = 1.0,
    keep: Annotated[
        int, typer.Option("--keep", min=0, metavar="N", help="Earlier versions of a channel that stay.")
    ] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing, and say what would be.")] = False,
) -> None:
    """Remove versions that no channel, lineage, tag or device needs, and bytes that no version names."""
    with open_registry(registry, blobs, name) as store:
        done = store.gc(older_than=timedelta(days=older_than), keep=keep, dry_run=dry_run)
    for version_id in done.removed:
        say(f"{'would remove' if dry_run else 'removed'} {version_id}")
    young = f" ({done.young} of them only because they are younger than {older_than:g} days)" if done.young else ""
    verb = "would go" if dry_run else "gone"
    say(f"{len(done.removed)} versions and {done.blobs} blobs ({done.freed} bytes) {verb}, {done.kept} kept{young}")


def import_(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="As export wrote it, or a PEFT folder.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OVERRIDES]...", help="Of a PEFT folder, as for simulate: model=..., task=..."),
    ] = None,
    registry: RegistryOption = None,
    blobs: BlobsOption = None,
    name: AsOption = None,
    app_dir: Annotated[Path, typer.Option("--app", metavar="DIR", help="App folder, for a PEFT folder.")] = Path(),
) -> None:
    """Publish a version with its lineage from a folder, or a PEFT adapter as version 1; no channel moves."""
    with open_registry(registry, blobs, name) as store:
        if (folder / "adapter_config.json").is_file():
            records = _import_peft(store, folder.absolute(), list(overrides or []), app_dir)
        elif overrides:
            raise ConfigError(f"{overrides[0]}: overrides say what a PEFT folder is for, and {folder} is none")
        else:
            records = store.import_folder(folder)
    say(f"v{records[0].number} ({records[0].version_id}) and {len(records) - 1} ancestors are in {store.location}")


def _import_peft(store: Registry, folder: Path, overrides: list[str], app_dir: Path) -> list[VersionRecord]:
    from federated.cli.apps import enter_app
    from federated.cli.compose import compose
    from federated.flower.imports import import_peft

    manifest = import_peft(store, folder, compose(enter_app(app_dir), overrides))
    return store.lineage(manifest.version_id)


COMMANDS: dict[str, Callable[..., None]] = {
    "init": init,
    "tag": tag,
    "verify": verify,
    "gc": gc,
    "import": import_,
}
"""By name, for the group of `federated.cli.registry`."""
