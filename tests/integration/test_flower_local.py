"""Flower's built-in local connection leaves a SuperLink running: docs/flower.md says so, and how to end it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "flower.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Left:
    """What `flwr ls` printed and left: living processes by id, with their command lines."""

    printed: str
    home: Path
    port: int
    processes: dict[int, str]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _living(home: Path) -> dict[int, str]:
    """Processes that know this home folder, which nobody else was given."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"FLWR_HOME={home}\0".encode() in (path / "environ").read_bytes():
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # it ended while we looked, or is somebody else's
    return found


@pytest.fixture
def left(tmp_path: Path) -> Iterator[Left]:
    """A command of Flower's has come and gone, with a configuration that it made itself."""
    home, port = tmp_path / "home", _free_port()
    home.mkdir()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("FLWR_")},
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_LOCAL_CONTROL_API_PORT": str(_free_port()),
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    try:
        done = subprocess.run(
            [BIN / "flwr", "ls"],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        yield Left(done.stdout, home, port, _living(home))
    finally:
        for process in _living(home):
            os.kill(process, signal.SIGKILL)


def _found_by_the_page(left: Left) -> list[int]:
    """The processes that the page's `pgrep` finds, looked for among ours alone."""
    (pattern,) = re.findall(r"^kill \$\(pgrep -f '(.+)'\)$", PAGE, re.MULTILINE)
    return [process for process, command in left.processes.items() if re.search(pattern, command)]


def test_a_superlink_stays_and_the_page_s_command_ends_it(left: Left) -> None:
    assert f"127.0.0.1:{left.port}" in left.printed
    assert (left.home / "local-superlink").is_dir()
    (superlink,) = _found_by_the_page(left)
    os.kill(superlink, signal.SIGTERM)
    end = time.monotonic() + 60
    while _living(left.home) and time.monotonic() < end:
        time.sleep(0.2)
    assert _living(left.home) == {}


def test_the_page_names_flower_s_own_address_and_port() -> None:
    from flwr.cli import constant

    assert f"`{constant.LOCAL_SUPERLINK_ADDRESS_MAGIC_VALUE}`" in PAGE
    if "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT" not in os.environ:
        assert f"127.0.0.1:{constant.LOCAL_SUPERLINK_HTTP_API_PORT}" in PAGE
