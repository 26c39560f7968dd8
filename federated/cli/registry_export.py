"""``fedpeft registry export``: a version with its lineage, or in a format that other programs read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from federated.cli.export_formats import LINEAGE, exporter_of, format_names
from federated.cli.registry import BlobsOption, RegistryOption, VersionArgument, open_registry
from federated.cli.release import KeysOption, PassphraseOption
from federated.cli.seals import seal_key
from federated.cli.tables import say
from federated.errors import ConfigError

if TYPE_CHECKING:
    from federated.release import Artefact
    from federated.release.dsse import SealKey
    from federated.release.exportable import Exportable

__all__ = ["COMMANDS", "exportable"]


def export(
    version: VersionArgument,
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="A new folder.")],
    format_: Annotated[str, typer.Option("--as", metavar="FORMAT", help=f"One of {format_names()}.")] = LINEAGE,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="SOURCE", help="The base model, where it is not at the record's model.source."),
    ] = None,
    base_name: Annotated[
        str, typer.Option("--base-name", metavar="NAME", help="What the files call the base model, such as ORG/NAME.")
    ] = "",
    seal: Annotated[
        str | None,
        typer.Option("--seal", metavar="KEY", help="Seal the folder with this key: its name, or a PEM file."),
    ] = None,
    keys: KeysOption = None,
    passphrase_file: PassphraseOption = None,
    app_dir: Annotated[Path, typer.Option("--app", metavar="DIR", help="Where the base model is looked up.")] = Path(),
    registry: RegistryOption = None,
    blobs: BlobsOption = None,
) -> None:
    """Write a version into a folder: with its lineage for another registry, or alone for other programs.

    Example: fedpeft registry export stable --as peft --to support-adapter --seal seal
    """
    if format_ == LINEAGE and (base or base_name):
        raise ConfigError(f"--base {base or base_name}: a lineage needs no base model; it goes with --as")
    exporter = None if format_ == LINEAGE else exporter_of(format_)
    key = None if seal is None else seal_key(seal, keys, passphrase_file)
    if exporter is None:
        _lineage(version, to, registry, blobs, key)
        return
    from federated.release import Artefact
    from federated.release.exportable import export as write

    with open_registry(registry, blobs) as store:
        artefact = Artefact.of(store, version)
    files = write(exportable(artefact, base, app_dir, public_name=base_name), exporter, to, key=key)
    say(f"{to}: {artefact.version_id[:12]} as {format_}: {', '.join(files)}")


def exportable(artefact: Artefact, base: str | None, app_dir: Path, *, public_name: str = "") -> Exportable:
    """A version with its base model, loaded and checked.

    Args:
        artefact: the version.
        base: a source in place of the record's.
        app_dir: where relative sources are looked up after the working directory.
        public_name: see `federated.release.exportable.Exportable`.

    Raises:
        ModelError: if the base cannot be loaded, or is another one.
        DeviceError: if the record does not say how to rebuild the model.
    """
    from federated.adapters import load_base
    from federated.device import recipe_of
    from federated.release.exportable import Exportable

    recipe = recipe_of(artefact.manifest)
    model = recipe.model if base is None else replace(recipe.model, source=base)
    return Exportable(artefact, load_base(model, app_dir=app_dir), recipe.task, public_name)


def _lineage(version: str, to: Path, registry: str | None, blobs: str | None, key: SealKey | None) -> None:
    with open_registry(registry, blobs) as store:
        records = store.export(version, to)
    if key is not None:
        from federated.release.seal import seal

        seal(to, records[0].manifest, key)
    say(f"{to}: v{records[0].number} ({records[0].version_id[:12]}) and {len(records) - 1} ancestors")


COMMANDS: dict[str, Callable[..., None]] = {"export": export}
"""By name, for the group of `federated.cli.registry`."""
