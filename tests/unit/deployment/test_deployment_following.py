"""A run is shown as its events are written down: each once, whole lines only, until it ends."""

import json
import threading
import time
from pathlib import Path
from typing import Any

from federated.deployment.following import follow
from federated.tracking import MemoryTracker


def line(event: str, **more: Any) -> str:
    return json.dumps({"event": event, "time": 100.0, **more}) + "\n"


def test_each_event_is_shown_once_to_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line("run") + line("round", round_number=1) + line("end", status="completed"))
    tracker = MemoryTracker()
    end = follow(path, tracker, going_on=lambda: True)
    assert [event["event"] for event in tracker.events] == ["run", "round", "end"]
    assert end["status"] == "completed"


def test_an_end_of_an_earlier_attempt_is_not_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line("end", status="interrupted") + line("end", status="completed", time=300.0))
    assert follow(path, MemoryTracker(), going_on=lambda: True, since=200.0)["status"] == "completed"


def test_lines_are_taken_as_they_come_and_half_of_one_waits(tmp_path: Path) -> None:
    path, tracker = tmp_path / "metrics.jsonl", MemoryTracker()
    whole = line("round", round_number=1)

    def write() -> None:
        time.sleep(0.3)
        with path.open("a") as file:
            for part in (line("run"), whole[:20], whole[20:], line("end", status="completed")):
                file.write(part)
                file.flush()
                time.sleep(0.3)

    writer = threading.Thread(target=write)
    writer.start()
    follow(path, tracker, going_on=lambda: True)
    writer.join()
    assert [event["event"] for event in tracker.events] == ["run", "round", "end"]


def test_a_run_that_is_gone_is_not_waited_for(tmp_path: Path) -> None:
    assert follow(tmp_path / "metrics.jsonl", MemoryTracker(), going_on=lambda: False) == {}


def written(path: Path, *statuses: str) -> Path:
    events: list[dict[str, Any]] = [{"event": "end", "status": status, "time": 5.0} for status in statuses]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def test_the_end_of_a_process_that_was_told_to_end_is_not_the_runs(tmp_path: Path) -> None:
    path = written(tmp_path / "m", "interrupted", "completed", "failed")
    assert follow(path, MemoryTracker(), going_on=lambda: True)["status"] == "completed"


def test_where_nobody_goes_on_it_is(tmp_path: Path) -> None:
    path = written(tmp_path / "m", "interrupted")
    assert follow(path, MemoryTracker(), going_on=lambda: False)["status"] == "interrupted"


def test_an_end_of_before_is_none(tmp_path: Path) -> None:
    assert follow(written(tmp_path / "m", "failed"), MemoryTracker(), going_on=lambda: False, since=6.0) == {}
