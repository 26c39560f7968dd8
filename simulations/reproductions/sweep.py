"""Many federations for one comparison: several at a time, each written down as soon as it is finished, none run twice.

Called by the comparisons of this folder. A finished run is one line of a JSON Lines file, with ``key``, the text
that names the run, and ``found``, what was measured. Stop at any time, and start again to go on.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from federated.cli.apps import enter_app, load_client_app
from federated.cli.compose import compose
from federated.flower import simulate
from federated.tracking import read_events

__all__ = ["APP", "Found", "Sweep", "last_round", "markdown_table"]

APP = Path(__file__).resolve().parent.parent.parent
Found = dict[str, float]
_Work = TypeVar("_Work")


class Sweep:
    """What is done, and how to do the rest.

    Args:
        results: JSON Lines of finished runs; None keeps them in memory.
        workers: runs at a time, one core each.
        minutes: start no further run after that.

    Attributes:
        done: what was measured, by the run's key.
    """

    def __init__(self, results: Path | None, *, workers: int, minutes: float) -> None:
        self._results = results
        self._workers = workers
        self._end = time.monotonic() + 60 * minutes
        self.done: dict[str, Found] = {}
        if results is not None and results.is_file():
            lines = [json.loads(line) for line in results.read_text().splitlines()]
            self.done = {line["key"]: line["found"] for line in lines}

    def run(self, run: Callable[[_Work], tuple[str, Found]], works: Mapping[str, _Work]) -> bool:
        """Run what is not done yet; returns whether all of it is done now.

        Args:
            run: from a work to its key and what was measured; called in another process.
            works: by key.
        """
        missing = [work for key, work in works.items() if key not in self.done]
        if missing and time.monotonic() <= self._end:
            # A fresh process now and then, so that nothing piles up over hundreds of runs.
            with multiprocessing.get_context("spawn").Pool(self._workers, maxtasksperchild=20) as pool:
                for key, found in pool.imap_unordered(run, missing):
                    self._add(key, found)
                    if time.monotonic() > self._end:
                        print("out of time: start again to go on", file=sys.stderr)
                        break
        return all(key in self.done for key in works)

    def _add(self, key: str, found: Found) -> None:
        self.done[key] = found
        print(f"{key}: {found}", file=sys.stderr)
        if self._results is not None:
            with self._results.open("a") as file:
                file.write(json.dumps({"key": key, "found": found}) + "\n")


def last_round(overrides: Sequence[str]) -> Found:
    """One federation: the last adapter on all held-out examples together, and the processor time.

    Args:
        overrides: of ``conf/``; progress, workers and folders are set here.

    Returns:
        ``accuracy``, ``loss``, ``examples`` and ``cpu_seconds``, and ``epsilon`` where the last version names one (the
        largest of its accounts).
    """
    began, folder = time.process_time(), enter_app(APP)
    with tempfile.TemporaryDirectory(prefix="sweep-") as place:
        fixed = ["tracking.progress=false", "engine.workers=1", "round.evaluate_every=0", f"run_dir={place}/run"]
        made = simulate(compose(folder, [*overrides, *fixed]), load_client_app(folder))
        events = list(read_events(made.run_dir / "metrics.jsonl"))
    (final,) = (event for event in events if event["event"] == "final")
    spent = [_epsilon(event) for event in events if event["event"] == "round"]
    evaluation = final["evaluation"]
    return {
        "accuracy": round(evaluation["accuracy"], 4),
        "loss": round(evaluation["loss"], 4),
        "examples": evaluation["num_examples"],
        "cpu_seconds": round(time.process_time() - began, 1),
        **({"epsilon": round(spent[-1], 3)} if spent and spent[-1] else {}),
    }


def _epsilon(event: Mapping[str, Any]) -> float:
    accounts = event.get("privacy", {}).get("accounts", [])
    return max((account["epsilon"] for account in accounts), default=0.0)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a page."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
