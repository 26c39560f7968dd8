"""Lines about what happened on a device: bounded, whole, and never a reason to fail."""

import json
import logging
import multiprocessing
from pathlib import Path

import pytest

from federated import device_events
from federated.device_events import EVENTS, note_event, noted, set_aside


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "events.jsonl"
    monkeypatch.setenv(EVENTS, str(found))
    return found


def test_nobody_reads_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EVENTS, raising=False)
    monkeypatch.chdir(tmp_path)
    note_event({"event": "answer"})
    assert not noted()
    assert list(tmp_path.iterdir()) == []


def test_a_line_is_json_with_its_time_and_its_owners_alone(path: Path) -> None:
    note_event({"event": "answer", "reason": 'a "line"\nbreak'}, clock=lambda: 5.0)
    (line,) = path.read_text().splitlines()
    assert json.loads(line) == {"at": 5.0, "event": "answer", "reason": 'a "line"\nbreak'}
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_has_grown_is_set_aside_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_events, "LARGEST", 2_000)
    for number in range(300):
        note_event({"event": "answer", "number": number})
    sizes = [one.stat().st_size for one in path.parent.iterdir()]
    assert len(sizes) <= 2
    assert max(sizes) < 2_100
    last = [*set_aside(path).read_text().splitlines(), *(path.read_text().splitlines() if path.exists() else [])]
    assert json.loads(last[-1])["number"] == 299


def test_a_place_that_cannot_be_written_is_said_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(EVENTS, str(tmp_path / "missing" / "events.jsonl"))
    with caplog.at_level(logging.WARNING):
        note_event({"event": "answer"})
    assert "cannot be written" in caplog.text


def _many(number: int) -> None:
    for _ in range(200):
        note_event({"event": "answer", "reason": str(number) * 500})


def test_lines_of_several_processes_do_not_mix(path: Path) -> None:
    writers = [multiprocessing.get_context("fork").Process(target=_many, args=(number,)) for number in range(4)]
    for one in writers:
        one.start()
    for one in writers:
        one.join(60)
    assert [one.exitcode for one in writers] == [0, 0, 0, 0]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 800
    assert {len(set(line["reason"])) for line in lines} == {1}
