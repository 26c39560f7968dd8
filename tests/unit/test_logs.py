"""Log lines of our own processes, as text and as JSON, and what is not in them."""

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from federated.logs import LogTracker, set_up_logs
from federated.tracking import Tracker


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """What a process sets up for good must not outlive a test."""
    root, ours, main = logging.getLogger(), logging.getLogger("federated"), logging.getLogger("__main__")
    before = [(one, one.handlers[:], one.level, one.propagate) for one in (root, ours, main)]
    yield
    for one, handlers, level, propagate in before:
        one.handlers[:] = handlers
        one.setLevel(level)
        one.propagate = propagate
    logging.captureWarnings(False)


def lines(form: Any = "json", **given: Any) -> io.StringIO:
    stream = io.StringIO()
    set_up_logs("door", form, stream=stream, **given)
    return stream


def said(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_says_when_who_and_what() -> None:
    stream = lines()
    logging.getLogger("federated.deployment").info(
        "%s is %s", "north", "approved", extra={"client": "north", "round": 3}
    )
    (line,) = said(stream)
    assert line.pop("time").endswith("Z")
    assert line == {"level": "info", "process": "door", "message": "north is approved", "client": "north", "round": 3}


def test_text_is_as_people_read_it() -> None:
    stream = lines("text")
    logging.getLogger("federated.deployment").warning("a word", extra={"client": "north"})
    assert stream.getvalue().endswith(" door: a word\n")


def test_line_breaks_and_control_characters_stay_in_their_line() -> None:
    stream = lines()
    logging.getLogger("federated").warning('a\n{"level": "forged"}\x1b[31m\u2028\u202e')
    assert len(stream.getvalue().splitlines()) == 1
    assert stream.getvalue().isascii()
    assert "\x1b" not in stream.getvalue()
    assert said(stream)[0]["message"] == 'a\n{"level": "forged"}\x1b[31m\u2028\u202e'


def test_an_exceptions_text_is_not_told() -> None:
    stream = lines()
    try:
        raise ValueError("patient 17 has a cough")
    except ValueError:
        logging.getLogger("federated").exception("it failed")
    (line,) = said(stream)
    assert "cough" not in stream.getvalue()
    assert (line["error"], line["level"]) == ("ValueError", "error")
    assert line["at"][0].startswith(__file__)


def test_other_libraries_say_warnings_alone() -> None:
    stream = lines()
    logging.getLogger("httpx").info("chatter")
    logging.getLogger("httpx").warning("trouble")
    logging.getLogger("__main__").info("ours, as a program")
    assert [one["message"] for one in said(stream)] == ["trouble", "ours, as a program"]


def test_within_another_process_only_our_own_lines_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:]
    stream = lines(whole=False)
    logging.getLogger("flwr").warning("Flower's")
    logging.getLogger("federated.flower").info("ours")
    assert [one["message"] for one in said(stream)] == ["ours"]
    assert root.handlers == before


def test_setting_up_again_replaces(capsys: pytest.CaptureFixture[str]) -> None:
    first = lines()
    second = lines("text")
    logging.getLogger("federated").warning("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1


def test_what_json_cannot_hold_is_told_as_text() -> None:
    stream = lines()
    logging.getLogger("federated").warning("x", extra={"run": object})
    assert "class" in said(stream)[0]["run"]


def test_long_messages_are_cut() -> None:
    stream = lines()
    logging.getLogger("federated").warning("x" * 100_000)
    assert len(said(stream)[0]["message"]) == 4_000


def test_a_runs_events_become_lines_without_clients_words() -> None:
    stream = lines()
    tracker = LogTracker("flights")
    assert isinstance(tracker, Tracker)
    for event in (
        {"event": "run", "rounds": 3, "method": "fedit + sgd"},
        {"event": "round_start", "round_number": 1, "cohort": ["a", "b"]},
        {"event": "client", "round_number": 1, "client_id": "a", "status": "ok", "train_loss": 0.125},
        {"event": "client", "round_number": 1, "client_id": "b", "status": "failed", "reason": "DataError",
         "message": "x17"},
        {"event": "not_now", "client_id": "c", "condition": "charging"},
        {"event": "round", "round_number": 1, "participants": 1, "cohort": 2, "seconds": 4.5, "published": True,
         "version_id": "ab" * 32},
        {"event": "round", "round_number": 2, "participants": 0, "cohort": 2, "seconds": 4.5, "published": False},
        {"event": "warning", "message": "worse than before"},
        {"event": "final", "evaluation": {"loss": 1}},
        {"event": "end", "status": "completed", "message": ""},
    ):  # fmt: skip
        tracker.emit(event)
    tracker.close()
    found = [(one["level"], one["message"]) for one in said(stream)]
    assert found == [
        ("info", "flights: 3 rounds of fedit + sgd"),
        ("info", "round 1 asks 2 clients"),
        ("warning", "b: DataError"),
        ("info", "c: not now (charging)"),
        ("info", "round 1: 1 of 2 clients, 4.5 s, abababababab"),
        ("info", "round 2: 0 of 2 clients, 4.5 s, no new version"),
        ("warning", "worse than before"),
        ("info", "completed"),
    ]
    assert {one["run"] for one in said(stream)} == {"flights"}
    assert said(stream)[2]["client"] == "b"
    assert "x17" not in stream.getvalue()


def test_warnings_of_python_are_lines_too() -> None:
    code = "from federated.logs import set_up_logs; set_up_logs('door', 'json'); import warnings; warnings.warn('old')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "UserWarning: old" in json.loads(done.stderr)["message"]
