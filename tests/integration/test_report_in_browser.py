"""The run's report as a browser shows it: it renders, at a desk's and a phone's width, and asks for nothing."""

import http.server
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from federated.report import write_report
from federated.tracking import JsonlTracker

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)"),
]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--virtual-time-budget=3000",
)  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.emit({"event": "run", "run_id": "r", "name": "<script>alert(1)</script>", "method": "fedit + sgd",
                  "engine": "inprocess", "clients": 2, "rounds": 1, "base_bytes": 100, "base_params": 25,
                  "adapter_bytes": 4, "adapter_params": 1, "seed": 0, "source": "tiny",
                  "base_digest": "ab"})  # fmt: skip
    tracker.emit({"event": "round", "round_number": 1, "participants": 2, "cohort": 2, "published": True,
                  "version_id": "cd", "parent": "ab", "weights_digest": "ef", "train_loss": 0.5, "update_norm": 1.0,
                  "bytes_up": 10, "bytes_down": 10, "seconds": 1.0, "refused": [],
                  "evaluation": {"loss": 1.0, "accuracy": 0.5, "num_examples": 4}})  # fmt: skip
    tracker.emit({"event": "end", "status": "completed", "message": ""})
    tracker.close()
    (tmp_path / "config.yaml").write_text("name: demo\n")
    (tmp_path / "versions.json").write_text("[]")
    write_report(tmp_path)
    return tmp_path


class _Recorder(http.server.SimpleHTTPRequestHandler):
    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def server(run_dir: Path) -> Iterator[tuple[str, list[str]]]:
    seen: list[str] = []
    handler = type("Handler", (_Recorder,), {"seen": seen})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(run_dir))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/report.html", seen
        httpd.shutdown()
        thread.join()


def _chromium(*arguments: str, profile: Path) -> str:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_the_page_renders_and_asks_for_nothing_else(server: tuple[str, list[str]], tmp_path: Path) -> None:
    url, seen = server
    page = _chromium("--dump-dom", url, profile=tmp_path / "profile")
    assert "<svg" in page
    assert "&lt;script&gt;alert(1)" in page
    assert set(seen) <= {"/report.html", "/favicon.ico"}


@pytest.mark.parametrize("width", [390, 1200])
def test_a_screenshot_is_made(server: tuple[str, list[str]], tmp_path: Path, width: int) -> None:
    shot = tmp_path / "shot.png"
    _chromium(f"--window-size={width},2000", f"--screenshot={shot}", server[0], profile=tmp_path / "profile")
    assert shot.stat().st_size > 5_000
