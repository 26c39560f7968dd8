"""Blobs in any fsspec file system: S3 and its like, or memory for tests. The only importer of fsspec.

An object appears whole or not at all where the store says so (object stores do). Elsewhere a killed writer may leave a
part of a blob that no row names yet; it is replaced when the same bytes are published. Credentials, endpoints and
regions come from the store's own environment variables and files, never from a URL or a config of ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from federated.errors import CorruptBlob, RegistryError
from federated.manifest import sha256_hex
from federated.registry.blobs import REPAIR, Blobs, BlobStore, check_digest, is_digest

__all__ = ["RemoteBlobs", "open_blobs"]

_EXTRAS = {"s3": "federated-peft[s3]", "s3a": "federated-peft[s3]"}


def open_blobs(place: Path | str) -> Blobs:
    """The blobs of a folder, or of an fsspec URL.

    Raises:
        RegistryError: if nothing installed can reach that kind of URL.
    """
    return BlobStore(place) if isinstance(place, Path) else RemoteBlobs(place)


class RemoteBlobs:
    """Immutable blobs below a URL, ``URL/ab/abcdef...``; see `federated.registry.blobs.Blobs`.

    Args:
        url: such as ``s3://bucket/prefix``; the bucket must be there.

    Raises:
        RegistryError: if nothing installed can reach that kind of URL.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url
        scheme = url.partition("://")[0]
        try:
            with self._named("reach"):  # listings change behind our back: other processes publish
                self._system, self._root = url_to_fs(url, use_listings_cache=False)
        except RegistryError as error:
            if not isinstance(error.__cause__, ImportError | ValueError):
                raise
            extra = _EXTRAS.get(scheme, "fsspec's package for it")
            raise RegistryError(f"blobs at {url}: nothing installed reaches {scheme}://; install {extra}") from error

    def put(self, data: bytes) -> str:
        """Store bytes and return their SHA-256; a damaged blob of this digest is replaced.

        Raises:
            RegistryError: if the store refuses; nothing visible was changed.
        """
        digest = sha256_hex(data)
        if not self._holds(digest):
            with self._named("write"):
                self._system.pipe_file(self._path(digest), data)
        return digest

    def has(self, digest: str) -> bool:
        """Whether there is a blob of this digest; its bytes are not read."""
        with self._named("look into"):
            return bool(self._system.exists(self._path(digest)))

    def read(self, digest: str) -> bytes:
        """The blob's bytes, hashed again.

        Raises:
            CorruptBlob: if it is missing or its bytes have another digest.
            RegistryError: if the store refuses.
        """
        data = self._bytes(digest)
        if data is None:
            raise CorruptBlob(f"blob {self.url}/{digest[:2]}/{digest} is missing (expected {digest}); {REPAIR}")
        found = sha256_hex(data)
        if found != digest:
            raise CorruptBlob(
                f"blob {self.url}/{digest[:2]}/{digest} is damaged: its SHA-256 is {found}, expected {digest}; {REPAIR}"
            )
        return data

    def sizes(self) -> dict[str, int]:
        """Bytes of every blob, by digest.

        Raises:
            RegistryError: if the store refuses.
        """
        with self._named("list"):
            found: dict[str, Any] = self._system.find(self._root, detail=True)
        named = {path.rpartition("/")[2]: int(entry["size"]) for path, entry in found.items()}
        return {name: size for name, size in named.items() if is_digest(name)}

    def delete(self, digests: Iterable[str]) -> None:
        """Remove blobs; one that is not there any more is passed over.

        Raises:
            RegistryError: if the store refuses.
        """
        for digest in digests:
            with self._named("delete from"):
                try:
                    self._system.rm_file(self._path(digest))
                except FileNotFoundError:
                    continue

    def sweep(self) -> int:
        """Nothing to do: there are no temporary files."""
        return 0

    def _path(self, digest: str) -> str:
        return f"{self._root}/{check_digest(digest)[:2]}/{digest}"

    def _bytes(self, digest: str) -> bytes | None:
        with self._named("read"):
            try:
                return bytes(self._system.cat_file(self._path(digest)))
            except FileNotFoundError:
                return None

    def _holds(self, digest: str) -> bool:
        data = self._bytes(digest)
        return data is not None and sha256_hex(data) == digest

    @contextmanager
    def _named(self, doing: str) -> Iterator[None]:
        """Stores raise nearly anything; one error for all."""
        try:
            yield
        except CorruptBlob:
            raise
        except Exception as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise RegistryError(
                f"cannot {doing} the blobs at {self.url}: {said}; check the URL, the credentials and the network"
            ) from error
