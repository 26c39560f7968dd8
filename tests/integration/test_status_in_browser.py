"""The status page as a browser shows it: light and dark, wide and narrow; it renews itself, runs no other script."""

import json
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from federated.deployment.layout import Layout
from federated.deployment.overview import Gatherer
from federated.deployment.overview_records import Overview
from federated.deployment.server_config import ServerConfig
from federated.deployment.status_page import StatusServer
from federated.tracking import JsonlTracker

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)"),
]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
EVIL = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
ACCOUNTS = [{"unit": "client", "epsilon": 6.4, "target_delta": 1e-5, "target_epsilon": 8.0,
             "not_protected": ["metrics (losses, accuracies)"]}]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two runs: one under way with refusals and privacy, one that failed with a message that is markup."""
    place = tmp_path / "deployment"
    (place / "runs").mkdir(parents=True)
    for name, submitted in (("flights", 2.0), ("first-try", 1.0)):
        about = {"name": name, "overrides": [], "app": "/app", "app_digest": "ab", "flower_runs": ["1"],
                 "rounds_before": [0], "submitted": submitted, "attempted": submitted}  # fmt: skip
        (place / "runs" / f"{name}.json").write_text(json.dumps(about))
    write(place, "first-try", {"event": "run", "run_id": "tiny-aa", "rounds": 5},
          {"event": "end", "status": "failed", "message": f"the disk is full {EVIL}"})  # fmt: skip
    write(place, "flights", {"event": "run", "run_id": "flights-ab", "method": "fedit + sgd", "rounds": 12})
    for number in range(1, 9):
        names = [f"airline-{letter}" for letter in "abcde"]
        write(place, "flights", {"event": "round_start", "round_number": number, "cohort": names},
              *({"event": "client", "round_number": number, "client_id": name, "status": "ok"} for name in names[:-1]),
              {"event": "client", "round_number": number, "client_id": names[-1], "status": "refused",
               "reason": EVIL if number == 3 else "payload_digest_mismatch"},
              {"event": "not_now", "client_id": "airline-f", "condition": "charging"},
              {"event": "round", "round_number": number, "published": True, "version_id": "cd" * 32,
               "participants": 4, "cohort": 5, "seconds": 7.25, "bytes_up": 95_000, "bytes_down": 81_000,
               "train_loss": 1.1 / number, "evaluation": {"loss": 1.2 / number + 0.1, "accuracy": 0.9 - 0.4 / number},
               "privacy": {"accounts": ACCOUNTS}})  # fmt: skip
    write(place, "flights", {"event": "round_start", "round_number": 9, "cohort": ["airline-a", "airline-b"]},
          {"event": "client", "round_number": 9, "client_id": "airline-a", "status": "ok"})  # fmt: skip
    return place


def write(place: Path, run: str, *events: dict[str, object]) -> None:
    tracker = JsonlTracker(place / "runs" / run / "metrics.jsonl")
    for event in events:
        tracker.emit(event)
    tracker.close()


@pytest.fixture
def url(folder: Path) -> Iterator[str]:
    with StatusServer(Gatherer(Layout(folder), ServerConfig(name="airlines")), 0) as server:
        yield f"http://127.0.0.1:{server.port}/"


def chromium(url: str, profile: Path, *arguments: str) -> str:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *arguments, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_markup_from_outside_is_text_and_nothing_of_it_runs(url: str, tmp_path: Path) -> None:
    page = chromium(url, tmp_path / "profile", "--dump-dom", "--virtual-time-budget=1000")
    assert "<title>airlines: status</title>" in page
    assert "&lt;script&gt;document.title='taken'" in page
    assert "<img" not in page
    assert "No process manager answers" in page


class Moving(Gatherer):
    """A deployment that ends a round between the first look and the next."""

    looks = 0

    def overview(self) -> Overview:
        self.looks += 1
        if self.looks == 2:
            write(self._layout.folder, "flights", {"event": "round", "round_number": 9, "published": True})
        return super().overview()


def test_it_renews_itself(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("federated.deployment.status_page._FRESH", 0.0)
    gatherer = Moving(Layout(folder), ServerConfig(name="airlines"))
    with StatusServer(gatherer, 0) as server:
        url = f"http://127.0.0.1:{server.port}/"
        page = chromium(url, tmp_path / "profile", "--dump-dom", "--virtual-time-budget=8000")
    assert gatherer.looks >= 3
    assert "9 of 12 rounds" in page
    assert "8 of 12 rounds" not in page
    assert 'role="alert" hidden' in page


@pytest.mark.parametrize(("scheme", "dark"), [("1", False), ("0", True)])
@pytest.mark.parametrize("width", [390, 1200])
def test_a_screenshot_is_light_or_dark_as_the_reader_has_it(
    url: str, tmp_path: Path, width: int, scheme: str, dark: bool
) -> None:
    shot = tmp_path / "shot.png"
    chromium(url, tmp_path / "profile", f"--window-size={width},2000", f"--screenshot={shot}",
             f"--blink-settings=preferredColorScheme={scheme}", "--virtual-time-budget=1000")  # fmt: skip
    red, green, blue = corner(shot.read_bytes())
    assert (max(red, green, blue) < 64) == dark
    assert shot.stat().st_size > 20_000


def corner(png: bytes) -> tuple[int, int, int]:
    """Colour of the first pixel, which no filter of PNG changes: 8 bits a channel, no interlacing."""
    at, packed = 8, b""
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            packed += png[at + 8 : at + 8 + size]
        at += 12 + size
    row = zlib.decompress(packed)
    return row[1], row[2], row[3]
