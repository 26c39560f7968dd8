"""What a device remembers: the metadata that it verified last, and the files that it fetched, in a folder of its own.

Newer metadata are judged by these: without them, rollback protection starts anew. A copy that cannot be verified any
more (its keys were replaced, its file is damaged) counts as not there, as TUF has it.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from federated.release.disk import read_file, translated, write_file

__all__ = ["Store"]


class Store:
    """Verified metadata in a folder.

    Args:
        folder: made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def role(self, name: str) -> bytes | None:
        """The metadata of a role as they were verified last.

        Raises:
            ReleaseError: if they are there and cannot be read.
        """
        return self._read(self._path(name))

    def root(self, version: int) -> bytes | None:
        """One version of the root.

        Raises:
            ReleaseError: if it is there and cannot be read.
        """
        return self._read(self._root_path(version))

    def keep_role(self, name: str, data: bytes) -> None:
        """Remember verified metadata.

        Raises:
            ReleaseError: if the disk refuses.
        """
        self._write(self._path(name), data)

    def keep_root(self, version: int, data: bytes) -> None:
        """Remember a verified root.

        Raises:
            ReleaseError: if the disk refuses.
        """
        self._write(self._root_path(version), data)

    def _path(self, name: str) -> Path:
        return self.folder / "metadata" / f"{quote(name, safe='')}.json"

    def _root_path(self, version: int) -> Path:
        return self.folder / "metadata" / "roots" / f"{version}.json"

    @staticmethod
    def _read(path: Path) -> bytes | None:
        with translated("read what was verified before"):
            return read_file(path)

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        with translated("write what was verified"):
            write_file(path, data)
