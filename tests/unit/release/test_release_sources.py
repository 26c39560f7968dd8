"""Sources: a folder and a real web server give the same, and what goes wrong with them has a name."""

import gzip
import os
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from federated.errors import EndlessData, MissingFile, ReleaseError, Unreachable
from federated.release import FolderSource, HttpSource
from federated.release.source import CHUNK, chunks_of, open_source, read_all

BIG = os.urandom(2 * CHUNK + 17)
ROLE = b'{"signed": {}}' * 100


class Handler(BaseHTTPRequestHandler):
    """Files by path; some paths misbehave."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    seen: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers.get("User-Agent")))
        name = self.path.rsplit("/", 1)[-1]
        if name.isdigit():
            self.answer(int(name), b"")
        elif name == "moved.json":
            self.send_response(302)
            self.send_header("Location", "/releases/metadata/role.json")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif name == "packed.json":
            self.answer(200, gzip.compress(ROLE), ("Content-Encoding", "gzip"))
        elif name == "garbled.json":
            self.answer(200, b"no gzip", ("Content-Encoding", "gzip"))
        elif name == "cut.json":
            self.answer(200, b"x" * 10, ("Content-Length", "100"))
            self.close_connection = True
        else:
            self.answer(200, {"big": BIG, "role.json": ROLE}[name])

    def answer(self, status: int, data: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Says nothing when a client hangs up."""

    def handle_error(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/releases"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "role.json").write_bytes(ROLE)
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "big").write_bytes(BIG)
    return tmp_path


def test_odd_names(folder: Path) -> None:
    """As a web server would find them."""
    (folder / "metadata" / "odd name?.json").write_bytes(ROLE)
    assert read_all(FolderSource(folder), "metadata/odd%20name%3F.json", 10_000) == ROLE


def test_both_give_the_same(folder: Path, url: str) -> None:
    for source in (FolderSource(folder), HttpSource(url)):
        assert read_all(source, "metadata/role.json", 10_000) == ROLE
        assert read_all(source, "targets/big", len(BIG)) == BIG


def test_the_web_server_is_asked_politely(url: str) -> None:
    Handler.seen.clear()
    read_all(HttpSource(url + "/"), "metadata/a%20b%25/role.json", 10_000)
    assert Handler.seen == [("/releases/metadata/a%20b%25/role.json", "federated-peft")]


def test_packed_and_moved_files(url: str) -> None:
    source = HttpSource(url)
    assert read_all(source, "metadata/packed.json", 10_000) == ROLE
    assert read_all(source, "metadata/moved.json", 10_000) == ROLE


@pytest.mark.parametrize("limit", [0, 1, CHUNK, len(BIG) - 1])
def test_nothing_is_read_beyond_a_limit(folder: Path, url: str, limit: int) -> None:
    for source in (FolderSource(folder), HttpSource(url)):
        with pytest.raises(EndlessData, match=f"sends more than the {limit} bytes that targets/big may have"):
            read_all(source, "targets/big", limit)
        seen = 0
        with pytest.raises(EndlessData), closing(chunks_of(source, "targets/big", limit)) as chunks:
            for chunk in chunks:
                seen += len(chunk)
        assert seen <= limit


@pytest.mark.parametrize("status", [403, 404, 410])
def test_file_that_a_server_does_not_have(url: str, status: int) -> None:
    with pytest.raises(MissingFile, match=f"has no {status} \\(HTTP {status}\\)"):
        read_all(HttpSource(url), str(status), 10)


@pytest.mark.parametrize("status", [400, 500, 503, 204])
def test_server_that_cannot(url: str, status: int) -> None:
    with pytest.raises(Unreachable, match=f"answers HTTP {status} for {status}; try again later") as caught:
        read_all(HttpSource(url), str(status), 10)
    assert type(caught.value) is Unreachable


@pytest.mark.parametrize("name", ["cut.json", "garbled.json"])
def test_transfer_that_breaks(url: str, name: str) -> None:
    with pytest.raises(Unreachable, match=f"does not answer for {name}"):
        read_all(HttpSource(url), name, 1000)


def test_nobody_listens() -> None:
    with pytest.raises(Unreachable, match=r"does not answer for metadata/timestamp.json"):
        read_all(HttpSource("http://127.0.0.1:9", timeout=1), "metadata/timestamp.json", 10)


def test_nobody_of_that_name() -> None:
    with pytest.raises(Unreachable, match="does not answer"):
        read_all(HttpSource("http://releases.invalid", timeout=1), "metadata/timestamp.json", 10)


def test_proxy(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server stands for a proxy: it is asked for the whole URL of a host that there is not."""
    monkeypatch.setenv("http_proxy", url.removesuffix("/releases"))
    Handler.seen.clear()
    assert read_all(HttpSource("http://releases.invalid"), "role.json", 10_000) == ROLE
    assert Handler.seen[0][0] == "http://releases.invalid/role.json"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert read_all(HttpSource(url), "role.json", 10_000) == ROLE
    assert Handler.seen[1][0] == "/releases/role.json"


@pytest.mark.parametrize(
    "name", ["metadata/nothing.json", "metadata", "../secret", "metadata/role.json/x", "a/../../x", "%2e%2e/secret"]
)
def test_file_that_a_folder_does_not_have(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_bytes(b"secret")
    with pytest.raises(MissingFile, match=r"no file of|has no"):
        read_all(FolderSource(folder), name, 10)


def test_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="is no folder of releases: it has no metadata/; mount it") as caught:
        read_all(FolderSource(tmp_path / "stick"), "metadata/timestamp.json", 10)
    assert not isinstance(caught.value, MissingFile)


def test_medium_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(Unreachable, match=r"cannot read .*role\.json: Input/output error; check the medium"):
        read_all(FolderSource(folder), "metadata/role.json", 10)


def test_what_a_source_may_be(tmp_path: Path) -> None:
    folder = FolderSource(tmp_path)
    assert open_source(folder) is folder
    assert isinstance(open_source(str(tmp_path)), FolderSource)
    assert isinstance(open_source(tmp_path), FolderSource)
    assert isinstance(open_source("HTTPS://releases.example.org"), HttpSource)


@pytest.mark.parametrize(
    ("where", "message"),
    [("ftp://example.org/x", "from a folder, or from an http:// or https:// URL"), ("http://[", "no URL, or no proxy")],
)
def test_what_a_source_cannot_be(where: str, message: str) -> None:
    with pytest.raises(ReleaseError, match=message):
        open_source(where)


def test_proxy_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "socks9://example.org")
    with pytest.raises(ReleaseError, match="no URL, or no proxy, that can be used"):
        open_source("http://example.org")
