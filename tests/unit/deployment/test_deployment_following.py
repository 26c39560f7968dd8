"""A run that goes on in other processes is shown to its end, also over the end of one of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from federated.deployment import following
from federated.deployment.following import follow
from federated.tracking import MultiTracker


def written(path: Path, *statuses: str) -> Path:
    events: list[dict[str, Any]] = [{"event": "end", "status": status, "time": 5.0} for status in statuses]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_LOOK", 0.0)


def test_the_end_of_a_process_that_was_told_to_end_is_not_the_runs(tmp_path: Path) -> None:
    path = written(tmp_path / "m", "interrupted", "completed", "failed")
    assert follow(path, MultiTracker([]), going_on=lambda: True)["status"] == "completed"


def test_where_nobody_goes_on_it_is(tmp_path: Path) -> None:
    path = written(tmp_path / "m", "interrupted")
    assert follow(path, MultiTracker([]), going_on=lambda: False)["status"] == "interrupted"


def test_an_end_of_before_is_none(tmp_path: Path) -> None:
    assert follow(written(tmp_path / "m", "failed"), MultiTracker([]), going_on=lambda: False, since=6.0) == {}
