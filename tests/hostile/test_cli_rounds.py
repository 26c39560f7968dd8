"""A federation in which no round works: the command says so, and what is published stays."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.hostile.conftest import APP, TINY


def test_no_round_meets_its_quorum(refused: Callable[..., str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = refused("simulate", APP, *TINY, "rounds=2", "round.max_norm=1e-9", f"run_dir={run}")
    assert line.startswith("no round from 1 to 2 moved the global adapter, for want of good updates; ")
    assert str(run / "report.html") in line
    events = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert events[-1]["status"] == "failed"
    assert {event["reason"] for event in events if event["event"] == "client"} == {"norm_exceeded"}
    assert [version["round_number"] for version in json.loads((run / "versions.json").read_text())] == [0]
    assert "norm" in (run / "report.html").read_text()
