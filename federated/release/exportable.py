"""What an export starts from: a version with its weights, and the base model that it belongs to.

One export is one folder, whole or not there. How a format looks is the business of the modules ``export_*``, of which
each knows one: a function that writes into an empty folder. The command finds them by name, see
`federated.cli.export_formats`. Torch is loaded by what is handed in, and by the formats when they are used.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from federated.config import TaskConfig
from federated.errors import BaseMismatch, ReleaseError
from federated.manifest import VersionManifest
from federated.release.artefact import Artefact
from federated.release.disk import translated
from federated.release.dsse import SealKey
from federated.release.seal import seal

if TYPE_CHECKING:
    from federated.adapters import BaseModel

__all__ = ["Exportable", "Exporter", "export"]


@dataclass(frozen=True, eq=False)
class Exportable:
    """A version and what stands around it.

    Args:
        artefact: the version; it can be served, and its weights are those of its record.
        base: its base model, loaded.
        task: what it answers.
        public_name: what the world calls the base; empty: see `base_name`.

    Raises:
        BaseMismatch: if the version belongs to another base model.
    """

    artefact: Artefact
    base: BaseModel
    task: TaskConfig
    public_name: str = ""

    def __post_init__(self) -> None:
        if self.base.base_digest != self.manifest.base_digest:
            raise BaseMismatch(
                f"version {self.artefact.version_id[:12]} belongs to the base model {self.manifest.base_digest[:12]}, "
                f"but {self.base.source} is {self.base.base_digest[:12]}: name the base that it was trained on"
            )

    @property
    def manifest(self) -> VersionManifest:
        """The version's record."""
        return self.artefact.manifest

    @property
    def base_name(self) -> str:
        """What files for others call the base: a hub's name as it is, of a folder the last part alone."""
        source = self.base.source
        if self.public_name:
            return self.public_name
        on_the_hub = _HUB_NAME.fullmatch(source) and not Path(source).is_dir()
        return source if on_the_hub else Path(source).name.replace(":", "-")


_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Exporter = Callable[[Exportable, Path], None]
"""Writes one version into an empty folder, or refuses it with a `ModelError` or `ReleaseError` that says why."""


def export(subject: Exportable, exporter: Exporter, folder: Path, *, key: SealKey | None = None) -> tuple[str, ...]:
    """Write a version into a new folder: all of it, or nothing where the format refuses it.

    Args:
        subject: what is exported.
        exporter: the format.
        folder: must not be there yet, or be empty.
        key: seals the folder, see `federated.release.seal`; None leaves it unsealed.

    Returns:
        The files' paths in the folder, sorted.

    Raises:
        ReleaseError: if the folder is in use or cannot be written; also as the format raises it.
        ModelError: as the format raises it.
    """
    beside = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}")
    with translated("write the export"):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ReleaseError(f"{folder} is there and not an empty folder; export into a new one")
        beside.mkdir(parents=True)
        try:
            exporter(subject, beside)
            if key is not None:
                seal(beside, subject.manifest, key)
            beside.replace(folder)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        return tuple(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))
