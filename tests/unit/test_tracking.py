"""Trackers keep every event, whole and as valid JSON."""

import builtins
import errno
import importlib.util
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from federated.errors import ConfigError, DataError, StorageFull
from federated.tracking import (
    JsonlTracker,
    MemoryTracker,
    MultiTracker,
    TensorBoardTracker,
    Tracker,
    plain_event,
    read_events,
)


def clock() -> float:
    return 12.5


@pytest.mark.parametrize(
    "make", [lambda p: MemoryTracker(), lambda p: JsonlTracker(p / "m"), lambda p: MultiTracker([])]
)
def test_all_are_trackers(tmp_path: Path, make: object) -> None:
    tracker = make(tmp_path)  # type: ignore[operator]
    assert isinstance(tracker, Tracker)
    tracker.close()
    tracker.close()


def test_event_is_stamped_once() -> None:
    assert plain_event({"event": "end"}, clock=clock)["time"] == 12.5
    assert plain_event({"event": "end", "time": 1.0}, clock=clock)["time"] == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float32("nan")])
def test_number_that_is_not_finite_becomes_null_and_is_noted(value: float) -> None:
    event = plain_event({"a": value, "b": {"c": [1.0, value]}}, clock=clock)
    assert event["a"] is None
    assert event["b"] == {"c": [1.0, None]}
    assert event["not_finite"] == ["a", "b.c[1]"]


def test_finite_event_has_no_note() -> None:
    assert "not_finite" not in plain_event({"a": 1.0})


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), 0.5])
def test_numpy_numbers_become_plain(value: float) -> None:
    assert type(plain_event({"a": value})["a"]) is float


def test_value_that_is_no_plain_data_is_named() -> None:
    with pytest.raises(TypeError, match=r"event key a\.b: found a bytes"):
        plain_event({"a": {"b": b"x"}})


def test_lines_are_on_disk_before_close(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "deep" / "metrics.jsonl", clock=clock)
    tracker.emit({"event": "end", "message": "größer\nzwei"})
    assert read_events(tracker.path) == [{"event": "end", "message": "größer\nzwei", "time": 12.5}]
    tracker.close()


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.emit({"event": "round", "train_loss": float("nan"), "text": "\ud800"})
    tracker.close()
    (line,) = tracker.path.read_text(encoding="utf-8").splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["train_loss"] is None


def test_resumed_run_appends_and_mends_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "run"}\n{"event": "rou')
    tracker = JsonlTracker(path, clock=clock)
    tracker.emit({"event": "end"})
    tracker.close()
    assert [event["event"] for event in read_events(path)] == ["run", "end"]


def test_half_a_line_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "run"}\n{"event": "rou')
    assert read_events(path) == [{"event": "run"}]


@pytest.mark.parametrize("line", ["nonsense\n", "[1]\n"])
def test_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "run"}\n' + line)
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        read_events(path)


def test_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_events(tmp_path / "metrics.jsonl")


class _FullDisk:
    """A raw file on a disk with room for a few more bytes."""

    def __init__(self, raw: object, room: int) -> None:
        self._raw, self._room = raw, room

    def write(self, data: memoryview) -> int:
        if self._room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = bytes(data[: self._room])
        self._room -= len(part)
        return self._raw.write(part)  # type: ignore[attr-defined, no-any-return]

    def __getattr__(self, name: str) -> object:
        return getattr(self._raw, name)


def test_full_disk_keeps_whole_lines_only(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl", clock=clock)
    tracker.emit({"event": "run"})
    tracker._file = _FullDisk(tracker._file, room=10)  # type: ignore[assignment]
    with pytest.raises(StorageFull, match="no space left"):
        tracker.emit({"event": "round"})
    tracker.close()
    assert tracker.path.read_bytes().endswith(b"}\n")
    assert [event["event"] for event in read_events(tracker.path)] == ["run"]


def test_memory_tracker_copies_and_selects() -> None:
    tracker, cohort = MemoryTracker(clock=clock), ["a"]
    tracker.emit({"event": "round_start", "cohort": cohort})
    tracker.emit({"event": "end"})
    cohort.append("b")
    assert tracker.of("round_start") == [{"event": "round_start", "cohort": ["a"], "time": 12.5}]


def test_multi_tracker_gives_all_the_same_time() -> None:
    ticks = iter([1.0, 2.0])
    first, second = MemoryTracker(), MemoryTracker()
    MultiTracker([first, second], clock=lambda: next(ticks)).emit({"event": "end"})
    assert first.events == second.events == [{"event": "end", "time": 1.0}]


def test_multi_tracker_closes_all_and_reports_the_first_failure() -> None:
    closed: list[str] = []

    class Broken(MemoryTracker):
        def close(self) -> None:
            raise OSError("first")

    class Fine(MemoryTracker):
        def close(self) -> None:
            closed.append("fine")

    with pytest.raises(OSError, match="first"):
        MultiTracker([Broken(), Fine()]).close()
    assert closed == ["fine"]


def test_tensorboard_missing_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"federated-peft\[tensorboard\]"):
        TensorBoardTracker(tmp_path)


def test_tensorboard_starts_nothing_before_the_first_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_tensorboard(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("torch.utils.tensorboard"):
            pytest.fail("imported too early")
        return real_import(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", no_tensorboard)
    threads = threading.active_count()
    tracker = TensorBoardTracker(tmp_path)
    tracker.emit({"event": "run", "clients": 3})
    tracker.emit({"event": "round_start", "round_number": 1})
    assert threading.active_count() == threads
    tracker.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_writes_each_number_at_its_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tracker = TensorBoardTracker(tmp_path)
    tracker.emit({"event": "round", "round_number": 2, "train_loss": 0.5, "evaluation": {"loss": 0.75}})
    tracker.emit({"event": "final", "evaluation": {"loss": 0.25}})
    tracker.emit({"event": "baseline", "name": "null", "evaluation": {"loss": 1.0}})
    tracker.close()
    tracker.close()
    assert _scalars(tmp_path) == {
        "round/train_loss": [(2, 0.5)],
        "held_out/loss": [(1, 0.75), (2, 0.25)],
        "baseline_null/loss": [(2, 1.0)],
    }


def _scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {tag: [(item.step, item.value) for item in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
