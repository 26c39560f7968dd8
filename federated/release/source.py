"""Where the files of a release come from: a folder, a web server, or whatever follows `Source`.

A source is not trusted: it can withhold, replace and repeat. It is asked for names such as ``metadata/timestamp.json``
and gives bytes; who reads them counts and checks. A source that can begin in the middle of a file is `Resumable`; of
others the beginning is read again and thrown away. Caches and peers would be sources of their own.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.exceptions import HTTPError

from federated.errors import EndlessData, MissingFile, ReleaseError, Unreachable, WrongContent

__all__ = ["FolderSource", "HttpSource", "Resumable", "Source", "chunks_of", "open_source", "read_all", "rest_of"]

CHUNK = 256 * 1024
_ABSENT = (403, 404, 410)  # object stores answer 403 for what is not there


class Source(Protocol):
    """Files by name.

    Attributes:
        label: for messages: the folder or the URL.
    """

    label: str

    def read(self, name: str) -> Generator[bytes, None, None]:
        """The file's bytes in pieces; closing the generator ends the transfer.

        Args:
            name: path below the release's folder, quoted as in a URL.

        Raises:
            MissingFile: if there is no such file.
            Unreachable: if the source does not answer, or stops in the middle.
        """
        ...


@runtime_checkable
class Resumable(Source, Protocol):
    """A source that can begin in the middle of a file."""

    def read_from(self, name: str, start: int) -> Generator[bytes, None, None]:
        """The file's bytes from ``start`` on, as they lie there; see `Source.read`.

        Raises:
            WrongContent: if the file has no such byte, or something else comes: begin from zero.
            MissingFile, Unreachable: see `Source.read`.
        """
        ...


class FolderSource:
    """A folder, a mounted stick, a bundle.

    Args:
        folder: holds ``metadata/`` and ``targets/``.
    """

    def __init__(self, folder: Path) -> None:
        self.label = str(folder)
        self._folder = folder

    def read(self, name: str) -> Generator[bytes, None, None]:
        """See `Source.read`."""
        return self.read_from(name, 0)

    def read_from(self, name: str, start: int) -> Generator[bytes, None, None]:
        """See `Resumable.read_from`."""
        path = self._folder / unquote(name)
        if ".." in path.parts[len(self._folder.parts) :]:
            raise MissingFile(f"{name} is no file of {self.label}")
        try:
            with path.open("rb") as file:
                file.seek(start)
                while chunk := file.read(CHUNK):
                    yield chunk
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise self._missing(name) from None
        except OSError as error:
            raise Unreachable(f"cannot read {path}: {error.strerror}; check the medium and its permissions") from error

    def _missing(self, name: str) -> Unreachable:
        if not (self._folder / "metadata").is_dir():
            return Unreachable(f"{self.label} is no folder of releases: it has no metadata/; mount it, or name another")
        return MissingFile(f"{self.label} has no {name}")


class HttpSource:
    """A web server or object store; connections are kept. HTTP will do: nothing that comes is trusted.

    Args:
        url: of the folder that holds ``metadata/`` and ``targets/``.
        timeout: seconds to connect, and without a byte.
    """

    def __init__(self, url: str, *, timeout: float = 20.0) -> None:
        self.label = url
        self._base = url.rstrip("/")
        headers = {"User-Agent": "federated-peft", "Accept-Encoding": "gzip"}
        settings: dict[str, Any] = {
            "timeout": urllib3.Timeout(timeout),
            "retries": urllib3.Retry(2, redirect=4, respect_retry_after_header=False),  # else a server says how long
            "headers": headers,
        }
        proxy = _proxy_for(url)
        self._pool = urllib3.ProxyManager(proxy, **settings) if proxy else urllib3.PoolManager(**settings)

    def read(self, name: str) -> Generator[bytes, None, None]:
        """See `Source.read`."""
        with self._asked(name, {}) as response:
            self._check(response.status, name)
            yield from _pieces(response)

    def read_from(self, name: str, start: int) -> Generator[bytes, None, None]:
        """See `Resumable.read_from`; of a server that ignores the range, the beginning is thrown away."""
        wanted = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        with self._asked(name, wanted) as response:
            status, headers = response.status, response.headers
            if status == 416 or (status == 206 and not _continues(headers, start)):
                raise WrongContent(
                    f"{self.label} was asked for {name} from byte {start} on and answers HTTP {status} with "
                    f"{headers.get('Content-Range', 'no range')!r}; it is begun again"
                )
            if status == 206:
                yield from _pieces(response)
                return
            self._check(status, name)
            yield from _skipped(_pieces(response), start)

    @contextmanager
    def _asked(self, name: str, headers: Mapping[str, str]) -> Iterator[urllib3.BaseHTTPResponse]:
        """A response, whose connection is kept if all of it was read; what goes wrong is `Unreachable`."""
        try:
            response = self._pool.request(
                "GET", f"{self._base}/{name}", preload_content=False, headers={**self._pool.headers, **headers}
            )
            try:
                yield response
                response.release_conn()
            finally:
                response.close()  # a connection that was released stays open
        except (HTTPError, OSError, ValueError) as error:
            raise Unreachable(f"{self.label} does not answer for {name}: {error}; try again later") from error

    def _check(self, status: int, name: str) -> None:
        if status in _ABSENT:
            raise MissingFile(f"{self.label} has no {name} (HTTP {status})")
        if status != 200:
            raise Unreachable(f"{self.label} answers HTTP {status} for {name}; try again later, or check the URL")


def open_source(where: str | Path | Source) -> Source:
    """A source for a folder, an ``http://`` or ``https://`` URL, or a source itself.

    Raises:
        ReleaseError: if it is a URL of another kind, or malformed.
    """
    if isinstance(where, Path):
        return FolderSource(where)
    if not isinstance(where, str):
        return where
    scheme = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*)://", where)
    if scheme is None:
        return FolderSource(Path(where))
    if scheme[1].lower() not in ("http", "https"):
        raise ReleaseError(f"{where}: releases come from a folder, or from an http:// or https:// URL")
    try:
        return HttpSource(where)
    except (ValueError, HTTPError) as error:
        raise ReleaseError(f"{where}: no URL, or no proxy, that can be used: {error}") from error


def rest_of(source: Source, name: str, start: int) -> Generator[bytes, None, None]:
    """A file from a byte on, also of a source that can only begin at zero.

    Raises:
        WrongContent, MissingFile, Unreachable: see `Resumable.read_from`.
    """
    return source.read_from(name, start) if isinstance(source, Resumable) else _skipped(source.read(name), start)


def chunks_of(source: Source, name: str, limit: int, *, start: int | None = None) -> Generator[bytes, None, None]:
    """A file in pieces, ended as soon as it is too long.

    Args:
        source: not trusted.
        name: as in `Source.read`.
        limit: bytes that may come.
        start: begin there, and take bytes as they lie at the source (`rest_of`).

    Raises:
        EndlessData: after more than ``limit`` bytes.
        WrongContent, MissingFile, Unreachable: see `Source.read` and `Resumable.read_from`.
    """
    seen = 0
    with closing(source.read(name) if start is None else rest_of(source, name, start)) as chunks:
        for chunk in chunks:
            seen += len(chunk)
            if seen > limit:
                raise EndlessData(f"{source.label} sends more than the {limit} bytes that {name} may have; stopped")
            yield chunk


def read_all(source: Source, name: str, limit: int) -> bytes:
    """A whole file.

    Raises:
        EndlessData, MissingFile, Unreachable: see `chunks_of`.
    """
    with closing(chunks_of(source, name, limit)) as chunks:
        return b"".join(chunks)


def _pieces(response: urllib3.BaseHTTPResponse) -> Generator[bytes, None, None]:
    """What comes, as it comes: on a slow line nothing waits for a whole piece, and a break loses none of it."""
    while piece := response.read1(CHUNK):
        yield piece


def _skipped(chunks: Iterable[bytes], count: int) -> Generator[bytes, None, None]:
    """All but the first ``count`` bytes."""
    for chunk in chunks:
        if count < len(chunk):
            yield chunk[count:]
        count -= min(count, len(chunk))


def _continues(headers: Mapping[str, str], start: int) -> bool:
    """Whether these are the bytes that were asked for, and not packed ones."""
    plain = headers.get("Content-Encoding", "identity") == "identity"
    return plain and re.fullmatch(rf"bytes {start}-\d+/(\d+|\*)", headers.get("Content-Range", "")) is not None


def _proxy_for(url: str) -> str | None:
    parts = urlsplit(url)
    if proxy_bypass(parts.hostname or ""):
        return None
    return getproxies().get(parts.scheme)
