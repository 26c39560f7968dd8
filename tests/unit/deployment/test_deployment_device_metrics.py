"""A device's numbers in a file: what is counted, what is not believed, and when it is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from federated.deployment.device_metrics import EVENTS_FILE, METRICS_FILE, DeviceMetrics
from federated.device_events import set_aside

OK = {"event": "answer", "kind": "train", "outcome": "ok", "seconds": 2.0, "bytes_up": 100, "bytes_down": 90}
TRAINED = {"event": "trained", "run": "r", "round": 3, "seconds": 1.5, "steps": 12, "at": 50.0}


class Device:
    def __init__(self, folder: Path) -> None:
        self.events, self.file = folder / EVENTS_FILE, folder / METRICS_FILE
        self.now = 0.0
        self.restarts = {"supernode": 0, "launcher": 0}
        self.metrics = self.joined()

    def joined(self) -> DeviceMetrics:
        return DeviceMetrics(
            self.events.parent, restarts=lambda: self.restarts, pinned=True, clock=lambda: self.now
        )  # fmt: skip

    def note(self, *events: Any) -> None:
        with self.events.open("a") as file:
            file.writelines(one if isinstance(one, str) else json.dumps(one) + "\n" for one in events)

    def look(self, seconds: float = 5.0) -> dict[tuple[Any, ...], float]:
        self.now += seconds
        self.metrics.look()
        families = text_string_to_metric_families(self.file.read_text())
        return {
            (one.name.removeprefix("fedpeft_training_"), *one.labels.values()): one.value
            for family in families
            for one in family.samples
        }


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def test_a_device_that_did_nothing_has_numbers(device: Device) -> None:
    found = device.look()
    assert (found["trained_rounds_total",], found["pinned",], found["restarts_total", "launcher"]) == (0, 1, 0)


def test_messages_training_bytes_and_epsilon_are_counted(device: Device) -> None:
    device.note(OK, {**OK, "kind": "query", "bytes_up": 0}, TRAINED, {**TRAINED, "epsilon": 1.5, "target_delta": 1e-5})
    device.restarts["launcher"] = 2
    found = device.look()
    assert (found["messages_total", "train", "ok"], found["messages_total", "query", "ok"]) == (1, 1)
    assert (found["packet_bytes_total", "up"], found["packet_bytes_total", "down"]) == (100, 180)
    assert (found["trained_rounds_total",], found["steps_total",], found["last_trained_round",]) == (2, 24, 3)
    assert (found["seconds_total", "training"], found["seconds_total", "answering"]) == (3.0, 4.0)
    assert (found["epsilon", "1e-05"], found["last_trained_timestamp_seconds",]) == (1.5, 50.0)
    assert found["restarts_total", "launcher"] == 2


def test_refusals_and_not_now_are_counted_by_reason(device: Device) -> None:
    device.note(
        {**OK, "outcome": "refused", "reason": "ConfigError"}, {**OK, "outcome": "not_now", "reason": "not_now"}
    )
    found = device.look()
    assert (found["refusals_total", "ConfigError"], found["refusals_total", "not_now"]) == (1, 1)
    assert found["messages_total", "train", "not_now"] == 1


def test_what_an_app_makes_up_is_bounded(device: Device) -> None:
    device.note(*({**OK, "kind": f"k{n}", "outcome": "refused", "reason": f"r{n}" * 99} for n in range(100)))
    device.note(*({**TRAINED, "epsilon": 1, "target_delta": n / 1000} for n in range(1, 100)))
    found = device.look()
    assert sum(key[0] == "refusals_total" for key in found) == 21
    assert sum(key[0] == "epsilon" for key in found) == 20
    assert found["messages_total", "other", "refused"] == 100


def test_lines_that_are_none_are_passed_over(device: Device) -> None:
    device.note("{\n", "[1]\n", "\x00\n", {**OK, "seconds": "long", "bytes_up": None, "kind": []}, OK, '{"event": "ans')
    assert device.look()["messages_total", "train", "ok"] == 1
    device.note('wer", "kind": "train", "outcome": "ok"}\n')
    assert device.look()["messages_total", "train", "ok"] == 2


def test_a_line_without_an_end_does_not_stop_the_count(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("federated.deployment.device_metrics._LARGEST", 1_000)
    device.note("x" * 5_000 + "\n", OK)
    for _ in range(8):
        found = device.look()
    assert found["messages_total", "train", "ok"] == 1


def test_a_file_that_was_set_aside_is_read_to_its_end(device: Device) -> None:
    device.note(OK)
    device.look()
    device.note(OK)
    device.events.replace(set_aside(device.events))
    device.note(OK)
    assert device.look()["messages_total", "train", "ok"] == 3


def test_counters_begin_anew_with_the_process_and_what_holds_is_kept(device: Device) -> None:
    device.note(OK, {**TRAINED, "epsilon": 1.5, "target_delta": 1e-5})
    device.metrics = device.joined()
    device.note(OK)
    found = device.look()
    assert (found["messages_total", "train", "ok"], found["trained_rounds_total",]) == (1, 0)
    assert (found["epsilon", "1e-05"], found["last_trained_round",]) == (1.5, 3)


def test_it_is_written_when_something_changed_and_once_a_minute(device: Device) -> None:
    device.look()
    first = device.file.stat().st_ino
    device.note(OK)
    device.look(1.0)
    assert device.file.stat().st_ino == first  # too soon
    device.look()
    second = device.file.stat().st_ino
    assert second != first
    device.look()
    assert device.file.stat().st_ino == second  # nothing new
    device.look(60.0)
    assert device.file.stat().st_ino != second


def test_others_may_read_the_numbers_and_nobody_finds_half_of_them(device: Device) -> None:
    device.look()
    assert device.file.stat().st_mode & 0o044
    assert [path.name for path in device.file.parent.iterdir()] == [METRICS_FILE]


def test_the_documentation_names_every_metric(device: Device) -> None:
    page = (Path(__file__).parents[3] / "docs" / "observability.md").read_text()
    device.look()
    found = {one.name for one in text_string_to_metric_families(device.file.read_text())}
    assert set(re.findall(r"`(fedpeft_training_[a-z_]+?)(?:_total)?`", page)) == found
