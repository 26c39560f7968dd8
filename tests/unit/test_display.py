"""The display shows what events say, on a terminal and in a log, and starts nothing too early."""

import io
import threading
from collections.abc import Iterator

import pytest
from rich.console import Console

from federated.display import LiveDisplay
from federated.tracking import Tracker

RUN = {"event": "run", "name": "airlines", "rounds": 2}
START = {"event": "round_start", "round_number": 1, "cohort": ["delta", "[red]united[/red]"]}
OK = {"event": "client", "round_number": 1, "client_id": "delta", "status": "ok", "train_loss": 0.5, "seconds": 2.0}
REFUSED = {"event": "client", "round_number": 1, "client_id": "[red]united[/red]", "status": "refused",
           "reason": "not_finite", "message": "not_finite: tensor a holds NaN"}  # fmt: skip
ROUND = {"event": "round", "round_number": 1, "participants": 1, "cohort": 2, "published": True, "train_loss": 0.5,
         "seconds": 2.5, "refused": [{}], "evaluation": {"loss": 1.25, "accuracy": 0.4}}  # fmt: skip
FINAL = {"event": "final", "evaluation": {"loss": 0.75, "accuracy": 0.8}}
WARNING = {"event": "warning", "message": "the last adapter is worse"}
BASELINE = {"event": "baseline", "name": "null", "evaluation": {"loss": 1.25, "accuracy": 0.375}}
END = {"event": "end", "status": "completed", "message": None}


def _console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, height=40, color_system=None, _environ={})


def _text(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def live() -> Iterator[LiveDisplay]:
    display = LiveDisplay(_console(terminal=True))
    yield display
    display.close()


def _screen(display: LiveDisplay) -> str:
    console = _console(terminal=False)
    console.print(display)
    return _text(console)


def test_display_is_a_tracker(live: LiveDisplay) -> None:
    assert isinstance(live, Tracker)


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (ROUND, "round 1/2: 1 of 2 clients, train loss 0.5000, before it held-out loss 1.2500, accuracy 40.0%, 2.5 s"),
        (REFUSED, "round 1: [red]united[/red] refused: not_finite: tensor a holds NaN"),
        ({**REFUSED, "status": "late", "reason": "late", "message": None}, "round 1: [red]united[/red] late: late"),
        (FINAL, "final: held-out loss 0.7500, accuracy 80.0%"),
        ({**RUN, "notes": ["left out: [b]tiny[/b]"]}, "left out: [b]tiny[/b]"),
        (WARNING, "warning: the last adapter is worse"),
        (BASELINE, "baseline null: loss 1.2500, accuracy 37.5%"),
        (END, "completed"),
        ({**END, "status": "failed", "message": "disk full"}, "failed"),
    ],
)
def test_log_gets_one_plain_line(event: dict, line: str) -> None:
    console = _console(terminal=False)
    display = LiveDisplay(console)
    display.emit(RUN)
    display.emit(event)
    assert _text(console) == line + "\n"


@pytest.mark.parametrize("event", [RUN, START, OK])
def test_log_is_silent_about_good_clients(event: dict) -> None:
    console = _console(terminal=False)
    LiveDisplay(console).emit(event)
    assert _text(console) == ""


def test_round_without_quorum_says_so_in_a_log() -> None:
    console = _console(terminal=False)
    LiveDisplay(console).emit({**ROUND, "published": False})
    assert "the global adapter stayed as it was" in _text(console)


def test_no_thread_before_the_first_round(live: LiveDisplay) -> None:
    before = threading.active_count()
    live.emit(RUN)
    assert threading.active_count() == before


def test_no_thread_without_a_terminal() -> None:
    before = threading.active_count()
    LiveDisplay(_console(terminal=False)).emit(START)
    assert threading.active_count() == before


def test_close_at_any_moment_ends_the_thread(live: LiveDisplay) -> None:
    before = threading.active_count()
    live.emit(START)
    live.close()
    live.close()
    assert threading.active_count() == before


def test_events_after_close_are_ignored(live: LiveDisplay) -> None:
    live.close()
    before = threading.active_count()
    live.emit(START)
    assert threading.active_count() == before


def test_end_stops_the_display(live: LiveDisplay) -> None:
    before = threading.active_count()
    for event in (RUN, START, OK, ROUND, END):
        live.emit(event)
    assert threading.active_count() == before


def test_screen_in_mid_round(live: LiveDisplay) -> None:
    for event in (RUN, START, REFUSED):
        live.emit(event)
    screen = _screen(live)
    assert "round 1 of 2, 1 of 2 clients" in screen
    assert "[red]united[/red]" in screen
    assert "not_finite: tensor a holds NaN" in screen
    assert "waiting" in screen


def test_held_out_numbers_stand_at_the_round_that_made_them(live: LiveDisplay) -> None:
    for event in (RUN, START, OK, ROUND, FINAL, BASELINE):
        live.emit(event)
    rows = {line.split()[0]: line for line in _screen(live).splitlines() if line.split()}
    assert "40.0%" in rows["start"]
    assert "80.0%" in rows["1"]
    assert "37.5%" in rows["null"]


def test_many_clients_are_cut_and_trouble_comes_first(live: LiveDisplay) -> None:
    live.emit({**START, "cohort": [f"c{index:02}" for index in range(30)]})
    for index in range(29):
        live.emit({**OK, "client_id": f"c{index:02}"})
    live.emit({**REFUSED, "client_id": "c29"})
    screen = _screen(live)
    assert "and 20 more" in screen
    assert screen.index("c29") < screen.index("c00")


def test_round_without_quorum_is_marked(live: LiveDisplay) -> None:
    live.emit({**ROUND, "published": False})
    assert "the global adapter stayed as it was" in _screen(live)


def test_screen_keeps_a_warning_below_the_rounds(live: LiveDisplay) -> None:
    for event in (RUN, START, OK, ROUND, FINAL, WARNING):
        live.emit(event)
    assert _screen(live).splitlines()[-1] == "warning: the last adapter is worse"
