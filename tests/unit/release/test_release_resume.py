"""Transfers that break go on, over real HTTP; parts that are wrong are dropped and fetched again from zero."""

import gzip
import hashlib
import http.server
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import TargetFile

from federated.errors import EndlessData, MissingFile, ReleaseError, Unreachable, WrongContent
from federated.files import sync_folder
from federated.release import FolderSource, HttpSource
from federated.release.client import _Metered
from federated.release.source import CHUNK, rest_of
from federated.release.transfer import transfer
from federated.testing.releases import Mirror

DATA = os.urandom(3 * CHUNK + 1234)
TARGET = TargetFile.from_data("stable/v/weights.safetensors", DATA, ["sha256"])
DIGEST = hashlib.sha256(DATA).hexdigest()
NAME = f"targets/stable/v/{DIGEST}.weights.safetensors"


class Server(http.server.ThreadingHTTPServer):
    """One file, served well or badly, as a test sets it; remembers the ranges that it was asked for."""

    daemon_threads = True
    data = DATA
    cut: int | None = None  # bytes after which the connection ends
    behaviour = "ranges"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges: list[str | None] = []


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        server.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        data, status, more = server.data, 200, {}
        if asked and server.behaviour == "416":
            data, status = b"", 416
        elif asked and server.behaviour == "other range":
            status, more = 206, {"Content-Range": f"bytes 0-{len(data) - 1}/{len(data)}"}
        elif asked and server.behaviour == "packed":
            data, status = gzip.compress(data[start:]), 206
            more = {"Content-Range": f"bytes {start}-{len(DATA) - 1}/{len(DATA)}", "Content-Encoding": "gzip"}
        elif asked and server.behaviour != "ignores":
            data, status = data[start:], 206
            more = {"Content-Range": f"bytes {start}-{len(server.data) - 1}/*"}
        self.send_response(status)
        length = 10**12 if server.behaviour == "endless" else len(data)
        for name, value in {"Content-Length": str(length), **more}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(data[: server.cut])
            while server.behaviour == "endless":
                self.wfile.write(b"\0" * CHUNK)
        except OSError:
            pass  # the client had enough
        self.close_connection = server.cut is not None

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def get(server: Server, tmp_path: Path) -> Callable[..., Path]:
    """Fetches the file, as after a restart: by a source of its own."""

    def run(limit: int = 10**9) -> Path:
        path = tmp_path / "files" / "weights.safetensors"
        transfer(HttpSource(f"http://127.0.0.1:{server.server_port}", timeout=5), TARGET, path, limit=limit)
        return path

    return run


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / "files" / f".{DIGEST}.part"


def begun(part: Path, data: bytes) -> None:
    part.parent.mkdir()
    part.write_bytes(data)


def test_a_transfer_that_breaks_goes_on_where_it_was(server: Server, get: Callable[..., Path], part: Path) -> None:
    server.cut = CHUNK + 5
    for sent in (server.cut, 2 * server.cut, 3 * server.cut):
        with pytest.raises(Unreachable):
            get()
        assert part.read_bytes() == DATA[: len(part.read_bytes())]
        assert sent - CHUNK <= part.stat().st_size <= sent  # what urllib3 had handed out by then
    server.cut = None
    assert get().read_bytes() == DATA
    assert not part.exists()
    assert server.ranges[0] is None
    assert len({*server.ranges}) == 4


@pytest.mark.parametrize("behaviour", ["ignores", "ranges"])
def test_a_part_is_gone_on_with(server: Server, get: Callable[..., Path], part: Path, behaviour: str) -> None:
    server.behaviour = behaviour
    begun(part, DATA[: CHUNK + 7])
    assert get().read_bytes() == DATA
    assert server.ranges == [f"bytes={CHUNK + 7}-"]


def test_a_whole_part_is_not_fetched(server: Server, get: Callable[..., Path], part: Path) -> None:
    begun(part, DATA)
    assert get().read_bytes() == DATA
    assert server.ranges == []


@pytest.mark.parametrize(
    "poison", [b"\0" * 1000, DATA[:-1] + bytes([DATA[-1] ^ 1]), DATA + b"more"], ids=["zeros", "last bit", "too long"]
)
def test_a_poisoned_part_is_dropped_and_fetched_from_zero(
    server: Server, get: Callable[..., Path], part: Path, poison: bytes
) -> None:
    begun(part, poison)
    assert get().read_bytes() == DATA
    assert server.ranges[-1] is None
    assert len(server.ranges) == (2 if len(poison) < len(DATA) else 1)
    assert [path.name for path in part.parent.iterdir()] == ["weights.safetensors"]


@pytest.mark.parametrize("behaviour", ["416", "other range", "packed"])
def test_a_server_that_cannot_go_on_is_asked_for_all(
    server: Server, get: Callable[..., Path], part: Path, behaviour: str
) -> None:
    server.behaviour = behaviour
    begun(part, DATA[:100])
    assert get().read_bytes() == DATA
    assert server.ranges == ["bytes=100-", None]


@pytest.mark.parametrize("start", [0, 100])
def test_other_bytes_are_refused_and_nothing_is_kept(
    server: Server, get: Callable[..., Path], part: Path, start: int
) -> None:
    begun(part, DATA[:start]) if start else None
    server.data = DATA[:-1] + bytes([DATA[-1] ^ 1])
    with pytest.raises(WrongContent, match="damaged or tampered with"):
        get()
    assert len(server.ranges) == (2 if start else 1)
    assert list(part.parent.iterdir()) == []


@pytest.mark.parametrize("start", [0, 100])
def test_endless_data_end(server: Server, get: Callable[..., Path], part: Path, start: int) -> None:
    begun(part, DATA[:start]) if start else None
    server.behaviour = "endless"
    with pytest.raises(EndlessData):
        get()
    assert list(part.parent.iterdir()) == []


def test_what_is_too_large_is_not_asked_for(server: Server, get: Callable[..., Path]) -> None:
    with pytest.raises(EndlessData, match="takes at most 1000 at once"):
        get(1000)
    assert server.ranges == []


def test_a_refused_connection_is_unreachable_and_leaves_the_part(
    server: Server, get: Callable[..., Path], part: Path
) -> None:
    begun(part, DATA[:100])
    server.server_close()
    with pytest.raises(Unreachable, match="does not answer"):
        get()
    assert part.read_bytes() == DATA[:100]


def test_a_folder_begins_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(DATA)
    (tmp_path / "metadata").mkdir()
    assert b"".join(FolderSource(tmp_path).read_from(NAME, CHUNK + 3)) == DATA[CHUNK + 3 :]
    with pytest.raises(MissingFile):
        next(FolderSource(tmp_path).read_from("targets/none", 5))


@pytest.mark.parametrize("start", [0, 5, 65_536, 65_537, len(DATA)])
def test_of_other_sources_the_beginning_is_thrown_away(start: int) -> None:
    with closing(rest_of(Mirror({NAME: DATA}), NAME, start)) as chunks:
        assert b"".join(chunks) == DATA[start:]


def test_flushing_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Any] = []
    monkeypatch.setattr(os, "fsync", lambda opened: flushed.append(str(Path(f"/proc/self/fd/{opened}").readlink())))
    sync_folder(tmp_path)
    assert flushed == [str(tmp_path)]


def test_a_disk_that_refuses(server: Server, get: Callable[..., Path], part: Path) -> None:
    part.mkdir(parents=True)
    with pytest.raises(ReleaseError, match="cannot write weights"):
        get()


def test_what_is_sent_is_counted_either_way() -> None:
    source = _Metered(Mirror({NAME: DATA}))
    assert b"".join(source.read(NAME)) == DATA
    assert b"".join(source.read_from(NAME, 100)) == DATA[100:]
    assert source.nbytes == 2 * len(DATA) - 100
