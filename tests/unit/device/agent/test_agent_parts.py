"""The agent's parts: configuration, journal, log, lock, rate, pace."""

import errno
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from federated.config import ModelConfig
from federated.device import DeviceConfig, device_config
from federated.device.agent_config import ReportConfig
from federated.device.agent_events import EventLog, read_events
from federated.device.agent_fetch import SteadySource
from federated.device.agent_lock import StateLock
from federated.device.agent_loop import Pace
from federated.device.journal import Book, Entry, Journal, read_book
from federated.device.shelf import Shelf
from federated.errors import ConfigError, DeviceError, ReleaseError, Unreachable
from federated.manifest import RawTensor, sha256_hex
from federated.release import FolderSource
from federated.testing.releases import Mirror
from federated.wire import encode_tensors

BLOCK = """
import sys
for name in ("torch", "sqlalchemy", "alembic", "transformers", "peft", "flwr"):
    sys.modules[name] = None
"""
MODULES = sorted(
    path.stem
    for path in (Path(__file__).parents[4] / "federated" / "device").glob("*.py")
    if path.stem.startswith("agent") or path.stem in ("journal", "shelf", "probes", "health")
)


@pytest.mark.parametrize("name", MODULES)
def test_imports_neither_torch_nor_sqlalchemy(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{BLOCK}import federated.device.{name}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# ---- configuration ---------------------------------------------------------------------------------------------------

LEAST = "device_id: shop-17\nsource: releases\nroot: root.json\nstate: state\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "device.yaml"
    path.write_text(text)
    return path


def test_relative_places_are_beside_the_file(tmp_path: Path) -> None:
    found = device_config(written(tmp_path, LEAST))
    assert (found.source, found.root, found.state) == (
        str(tmp_path / "releases"), tmp_path / "root.json", tmp_path / "state"
    )  # fmt: skip
    assert (found.channel, found.base, found.probation.requests) == ("stable", None, 20)


def test_all_that_can_be_said(tmp_path: Path) -> None:
    more = """
channel: canary
base: {source: tiny:bert}
poll_seconds: 60
retry_seconds: 1
jitter: 0
bandwidth: 20000
capacity: 2
probes: required
probation: {requests: 5, seconds: 10, failures: 0, boots: 2}
limits: {max_bytes: 1000}
report: {max_bytes: 5000, files: 1}
"""
    found = device_config(written(tmp_path, LEAST.replace("source: releases", "source: https://e.org/r") + more))
    assert (found.source, found.base, found.limits.max_bytes) == ("https://e.org/r", ModelConfig("tiny:bert"), 1000)
    assert (found.probation.boots, found.report.files) == (2, 1)


def test_the_example_of_the_docs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[4] / "docs" / "agent.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    found = device_config(written(tmp_path, example))
    least = {"device_id": "shop-17", "source": "https://releases.example.org", "root": "root.json", "base": found.base}
    defaults = replace(DeviceConfig(**least, state=found.state), root=found.root)
    assert found == defaults  # what the page shows is what holds where nobody says anything
    assert found.base == ModelConfig("asset:minilm")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LEAST + "chanel: dev\n", "chanel = 'dev': unknown key"),
        (LEAST + "probation: {request: 5}\n", "probation.request = 5: unknown key"),
        (LEAST + "jitter: 1\n", "jitter = 1: Input should be less than 1"),
        (LEAST + "capacity: 1\n", "capacity = 1: "),
        (LEAST + "poll_seconds: .nan\n", "poll_seconds = nan: "),
        (LEAST.replace("shop-17", "''"), "device_id: expected a name of up to 200 printable characters"),
        (LEAST.replace("device_id", "id"), "device_id"),
        ("- a\n", "expected keys and values such as 'channel: stable', found list"),
        ("1: a\n", "expected keys and values"),
        ("a: [\n", "cannot read the device's configuration"),
    ],
)
def test_what_is_refused_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as found:
        device_config(written(tmp_path, text))
    assert said in str(found.value)
    assert "\n" not in str(found.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the device's configuration: No such file"):
        device_config(tmp_path / "device.yaml")


# ---- journal ---------------------------------------------------------------------------------------------------------


def test_a_change_is_on_the_disk_before_it_counts(tmp_path: Path, time, monkeypatch) -> None:
    journal = Journal(tmp_path, time)
    journal.enter("v1", "staged", entry={"reason": "x" * 5000}, active="v1")
    assert read_book(tmp_path) == journal.book
    assert journal.book.versions["v1"].reason == "x" * 1000
    before = journal.book
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(ReleaseError, match="cannot write the journal: No space left"):
            journal.change(active="null")
    assert (journal.book, read_book(tmp_path)) == (before, before)
    assert [path.name for path in tmp_path.iterdir()] == ["journal.json"]


def test_each_write_is_flushed_with_its_folder(tmp_path: Path, time, monkeypatch) -> None:
    flushed: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(str(Path(f"/proc/self/fd/{fd}").readlink())), real(fd)))
    Journal(tmp_path, time).change(boots=1)
    assert len(flushed) == 2
    assert flushed[0].startswith(str(tmp_path / ".journal.json-"))
    assert flushed[1] == str(tmp_path)


def test_old_entries_go_and_needed_ones_stay(time) -> None:
    times = {f"v{number}": {"staged": f"2026-01-01T00:00:{number // 60:02}.{number:03}"} for number in range(150)}
    versions = {name: Entry(name, "failed", times=one) for name, one in times.items()}
    kept = Book(active="v0", pinned="v1", good=("v2",), trail=("v3",) * 20, versions=versions).bounded()
    assert len(kept.versions) == 100
    assert {"v0", "v1", "v2", "v3", "v149"} <= kept.versions.keys()
    assert "v4" not in kept.versions
    assert len(kept.trail) == 8


# ---- log -------------------------------------------------------------------------------------------------------------


def test_the_log_is_bounded_and_keeps_its_order(tmp_path: Path, time) -> None:
    log = EventLog(tmp_path, ReportConfig(max_bytes=4096, files=3), time)
    for number in range(400):
        log.add("tried", "v", number=number)
    found = read_events(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.1.jsonl", "events.2.jsonl", "events.jsonl"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3 * 4096
    numbers = [one["number"] for one in found]
    assert numbers == list(range(numbers[0], 400))
    assert len(numbers) > 60


def test_one_file_of_log(tmp_path: Path, time) -> None:
    log = EventLog(tmp_path, ReportConfig(max_bytes=4096, files=1), time)
    for number in range(100):
        log.add("tried", number=number)
    assert [path.name for path in tmp_path.iterdir()] == ["events.jsonl"]
    assert read_events(tmp_path)[-1]["number"] == 99


def test_a_line_that_was_cut_off_costs_itself_alone(tmp_path: Path, time) -> None:
    log = EventLog(tmp_path, ReportConfig(), time)
    log.add("one")
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'{"at": "2026')
    log.add("two")
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b"[1]\n")
    assert [one["event"] for one in read_events(tmp_path)] == ["one", "two"]
    assert read_events(tmp_path / "none") == []


def test_long_reasons_are_cut(tmp_path: Path, time) -> None:
    EventLog(tmp_path, ReportConfig(), time).add("failed", reason="x" * 5000)
    assert len(read_events(tmp_path)[0]["reason"]) == 1000


def test_a_log_that_cannot_be_written_stops_nothing(yard) -> None:
    (yard.state / "events.jsonl").mkdir(parents=True)
    yard.publish(1)
    with yard.started() as agent:
        assert agent.poll()
        assert yard.answer == 1.0


# ---- lock ------------------------------------------------------------------------------------------------------------


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    lock = StateLock(tmp_path / "state")
    assert not lock.is_held()
    hold = (
        "import sys; from pathlib import Path; from federated.device.agent_lock import StateLock\n"
        "lock = StateLock(Path(sys.argv[1])); lock.take(); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "state")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert lock.is_held()
        with pytest.raises(DeviceError, match=rf"held by another agent \(process {process.pid}\)"):
            lock.take()
        process.kill()
    assert not lock.is_held()
    lock.take()
    assert lock.is_held()
    lock.release()
    lock.release()
    assert not lock.is_held()


# ---- shelf -----------------------------------------------------------------------------------------------------------


def test_the_shelf_without_links(tmp_path: Path, make, monkeypatch) -> None:
    from federated.release import ReleaseRecord

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    one = make(1)
    record = ReleaseRecord(one.version_id, 1, one.manifest.base_digest, one.manifest.weights_digest)
    weights = tmp_path / "weights"
    weights.write_bytes(one.weights)
    shelf = Shelf(tmp_path / "versions")
    assert (shelf.ids(), shelf.get(one.version_id), shelf.record(one.version_id)) == ([], None, None)
    shelf.put(record, one.manifest, weights, b"probes")
    shelf.put(record, one.manifest, tmp_path / "none", None)  # it is there: nothing is touched
    found = shelf.get(one.version_id)
    assert found is not None
    assert (found.record, found.manifest, found.weights, found.probes) == (record, one.manifest, one.weights, b"probes")
    (tmp_path / "versions" / one.version_id / "probes.json").write_bytes(b"prober")
    assert shelf.get(one.version_id) is None
    (tmp_path / "versions" / ".staging-x").mkdir()
    shelf.sweep({one.version_id})
    assert [path.name for path in (tmp_path / "versions").iterdir()] == [one.version_id]
    shelf.sweep(())
    assert shelf.ids() == []
    with pytest.raises(ReleaseError, match="put a version on the shelf"):
        shelf.put(record, one.manifest, tmp_path / "none", None)
    assert shelf.ids() == []


def test_a_shelf_that_cannot_be_read(tmp_path: Path, make, monkeypatch) -> None:
    from federated.release import ReleaseRecord

    one = make(1)
    record = ReleaseRecord(one.version_id, 1, one.manifest.base_digest, one.manifest.weights_digest)
    (tmp_path / "weights").write_bytes(one.weights)
    shelf = Shelf(tmp_path / "versions")
    shelf.put(record, one.manifest, tmp_path / "weights", None)
    path = tmp_path / "versions" / one.version_id / "weights.safetensors"

    def refuse(_: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(ReleaseError, match="cannot read a version: Permission denied"):
            shelf.get(one.version_id)
        assert shelf.manifest(one.version_id) is None
    path.unlink()
    path.mkdir()
    assert shelf.get(one.version_id) is None
    assert shelf.manifest(one.version_id) == one.manifest


# ---- fetching --------------------------------------------------------------------------------------------------------


class Waits:
    """Waiting is what moves the time."""

    def __init__(self, stop_after: float = 1e9) -> None:
        self.seconds, self.stop_after = 0.0, stop_after

    def __call__(self, seconds: float) -> bool:
        self.seconds += seconds
        return self.seconds > self.stop_after

    def monotonic(self) -> float:
        return self.seconds


@pytest.mark.parametrize(("rate", "least", "most"), [(100_000, 8.9, 10.0), (1_000_000, 0.0, 0.1), (0, 0.0, 0.0)])
def test_a_rate_holds_over_all_files(rate: int, least: float, most: float) -> None:
    waits = Waits()
    source = SteadySource(
        Mirror({"a": b"x" * 400_000, "b": b"y" * 600_000}), rate, monotonic=waits.monotonic, wait=waits
    )
    assert len(b"".join(source.read("a"))) == 400_000
    assert b"".join(source.read_from("b", 100)) == b"y" * 599_900
    assert least <= waits.seconds <= most


def test_time_without_transfers_is_saved_up_for_one_second_alone() -> None:
    waits = Waits()
    source = SteadySource(Mirror({"a": b"x" * 300_000}), 100_000, monotonic=waits.monotonic, wait=waits)
    waits.seconds = 1000.0
    b"".join(source.read("a"))
    assert waits.seconds == pytest.approx(1002.0)


def test_a_transfer_can_be_told_to_stop(tmp_path: Path) -> None:
    waits = Waits(stop_after=2.0)
    (tmp_path / "a").write_bytes(b"x" * 10_000_000)
    source = SteadySource(FolderSource(tmp_path), 100_000, monotonic=waits.monotonic, wait=waits)
    with pytest.raises(Unreachable, match="was stopped here"):
        b"".join(source.read("a"))


def test_a_stopped_agent_goes_on_with_the_part_at_its_next_start(yard, monkeypatch) -> None:
    version = yard.publish(1, size=300_000)
    mirror = Mirror.of(yard.publisher.folder)
    name = next(one for one in mirror.files if one.endswith("weights.safetensors"))
    with yard.started(mirror) as agent:
        real = mirror._send

        def send(chunk: bytes) -> bytes:
            if mirror.requests[-1] == name and mirror.sent > 1_000_000:
                agent.stop()
            return real(chunk)

        monkeypatch.setattr(mirror, "_send", send)
        assert not agent.poll()
    parts = list((yard.state / "release" / "files" / version).glob(".*.part"))
    assert len(parts) == 1
    assert parts[0].stat().st_size > 900_000
    asked: list[tuple[str, int]] = []

    class Resumed(Mirror):
        def read_from(self, name: str, start: int) -> Any:
            asked.append((name, start))
            yield self.files[name][start:]

    whole = parts[0].stat().st_size
    with yard.started(Resumed(mirror.files)) as agent:
        assert agent.poll()
        assert yard.answer == 1.0
    assert (name, whole) in asked


def test_what_a_device_holds_makes_the_next_version_smaller(yard, make) -> None:
    from federated.release import Artefact, with_variants

    noise = np.random.default_rng(0).standard_normal((2, 50_000)).astype(np.float32)

    def version(number: int) -> Artefact:
        array = noise * np.float32(1 + 1e-4 * number)
        weights = encode_tensors({"layer.factor_a": RawTensor.from_array(array)})
        known = make(number).manifest
        return Artefact(replace(known, weights_digest=sha256_hex(weights)), weights)

    with yard.started() as agent:
        for number in (1, 2):
            made, _ = with_variants(version(number), held=yard.publisher.held("stable"))
            yard.publisher.publish("stable", made)
            assert agent.poll()
            yard.time.forward(seconds=61)
            agent.tick()
            assert agent.active == made.version_id
    told = [(one["way"], one["nbytes"]) for one in read_events(yard.state) if one["event"] == "verified"]
    assert [way for way, _ in told][1] == "diff"
    assert told[1][1] < told[0][1] * 0.8
    assert all(Shelf(yard.state / "versions").get(one) is not None for one in yard.book.good)


def test_what_is_larger_than_the_limit_is_not_fetched(yard) -> None:
    version = yard.publish(1, size=100_000)
    with yard.started(limits={"max_bytes": 10_000}) as agent:
        assert not agent.poll()
        assert (yard.state_of(version), yard.book.trouble.partition(":")[0]) == ("discovered", "EndlessData")


def test_looks_come_at_jittered_intervals_and_back_off(yard) -> None:
    config = yard.config(poll_seconds=100.0, retry_seconds=4.0, jitter=0.25)
    pace = Pace(config, random.Random(1))  # noqa: S311
    regular = [pace.after(True) for _ in range(500)]
    assert min(regular) >= 75
    assert max(regular) <= 125
    assert max(regular) - min(regular) > 40
    still = Pace(replace(config, jitter=0.0), random.Random(1))  # noqa: S311
    assert [still.after(False) for _ in range(7)] == [4, 8, 16, 32, 64, 100, 100]
    assert [still.after(True), still.after(False)] == [100, 4]
    assert [still.after(False) for _ in range(3000)][-1] == 100


# ---- status and report -----------------------------------------------------------------------------------------------


def test_a_report_says_what_was_held_and_what_failed(yard, time) -> None:
    from federated.device.agent_status import report_of

    assert report_of(yard.config(), time.now)["versions"] == []
    with yard.started() as agent:
        first = yard.settled(agent, 1)
        yard.backend.answers[2.0] = 0.0
        second = yard.publish(2)
        agent.poll()
        other = yard.publish(3, base_digest="c" * 64)
        agent.poll()
    time.forward(seconds=100)
    told = report_of(yard.config(), time.now)
    by_id = {one["version_id"]: one for one in told["versions"]}
    assert (told["device_id"], told["active"], told["stale"]) == ("shop-17", first, False)
    assert by_id[first]["held"] == {"from": "2026-11-20T12:00:00+00:00", "to": "2026-11-20T12:02:41+00:00"}
    assert (by_id[second]["state"], "no effect" in by_id[second]["reason"], "held" in by_id[second]) == (
        "failed", True, True
    )  # fmt: skip
    assert "held" not in by_id[other]
    yard_shelf = Shelf(yard.state / "versions")
    yard_shelf.drop(second)
    later = {one["version_id"]: one for one in report_of(yard.config(), time.now)["versions"]}
    assert later[second]["held"]["to"] == "2026-11-20T12:01:01+00:00"
    json.dumps(told)
