"""A publisher is killed at random moments; two publish at once: nothing published is lost, nothing half is shown."""

import random
import subprocess
import sys
import time

import pytest

from federated.registry import Registry
from simulations.benchmarks.registry import OPERATIONS, kill_many

PUBLISH = """
import sys
from pathlib import Path
from federated.manifest import AdapterSpec, VersionManifest, sha256_hex
from federated.registry import Registry

folder, run_id, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
spec = AdapterSpec("lora", 2, 4.0, False, ())
print("ready", flush=True)
if len(sys.argv) > 4:
    while not Path(sys.argv[4]).exists():
        pass
parent = None
with Registry.open(folder) as registry:
    for number in range(count):
        weights = f"{run_id} {number}".encode() * 4000
        manifest = VersionManifest(sha256_hex(weights), "b" * 64, spec, "fedit", run_id, number, parent=parent)
        parent = registry.publish(manifest, weights, training_state=weights[:1000], channel="dev")
        print(parent, flush=True)
"""


def start(folder, run_id, count, *more):
    command = [sys.executable, "-c", PUBLISH, str(folder), run_id, str(count), *map(str, more)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_after(folder, run_id, seconds):
    """Ids that were printed before the process was killed, some time after its first one."""
    process = start(folder, run_id, 100_000)
    with process:
        printed = [process.stdout.readline(), process.stdout.readline()]
        time.sleep(seconds)
        process.kill()
        printed += process.stdout.readlines()
    return [line.strip() for line in printed[1:] if line.endswith("\n") and len(line) == 65]


@pytest.mark.slow
def test_kills_lose_no_published_version_and_show_none_without_bytes(tmp_path):
    chance = random.Random(20260101)  # noqa: S311
    printed = []
    for number in range(8):
        printed += kill_after(tmp_path, f"run-{number}", chance.uniform(0.0, 0.06))
    with Registry.open(tmp_path, create=False) as registry:
        listed = {record.version_id for record in registry.versions()}
        assert set(printed) <= listed
        assert len(printed) >= 8
        assert registry.verify() == []
        assert registry.get("dev").version_id == registry.get("latest").version_id


@pytest.mark.slow
def test_two_processes_make_one_registry_and_lose_nothing(tmp_path):
    folder, go = tmp_path / "registry", tmp_path / "go"
    processes = [start(folder, run_id, 15, go) for run_id in ("run-a", "run-b")]
    for process in processes:
        process.stdout.readline()
    go.touch()
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    printed = [line for output, _ in results for line in output.split()]
    with Registry.open(folder, create=False) as registry:
        assert sorted(record.version_id for record in registry.versions()) == sorted(printed)
        for run_id in ("run-a", "run-b"):
            assert [record.number for record in registry.versions(run_id)] == list(range(15))
        assert registry.verify() == []


MOVE = """
import sys
from pathlib import Path
from federated.errors import ChannelConflict
from federated.registry import Registry

folder, go, expected, target = sys.argv[1:]
with Registry.open(folder) as registry:
    print("ready", flush=True)
    while not Path(go).exists():
        pass
    try:
        registry.channel("stable").promote(target, expected=expected)
        print("moved")
    except ChannelConflict:
        print("conflict")
"""


@pytest.mark.slow
def test_only_one_of_two_processes_moves_a_channel(tmp_path):
    folder, go = tmp_path / "registry", tmp_path / "go"
    with start(folder, "run-a", 3) as publisher:
        publisher.communicate(timeout=60)
    with Registry.open(folder) as registry:
        seen = registry.channel("stable").promote("v0", expected=None).version_id
    arguments = [[str(folder), str(go), seen, target] for target in ("v1", "v2")]
    processes = [
        subprocess.Popen([sys.executable, "-c", MOVE, *more], stdout=subprocess.PIPE, text=True) for more in arguments
    ]
    for process in processes:
        process.stdout.readline()
    go.touch()
    said = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert sorted(said) == ["conflict", "moved"]


@pytest.mark.slow
def test_ten_kills_of_all_that_writes_lose_nothing_and_leave_no_half_state(tmp_path):
    found = kill_many(tmp_path / "registry", kills=10, seed=20260101)
    assert (found.lost, found.faults) == ([], [])
    assert found.kills == 10
    assert set(found.by_operation) == set(OPERATIONS)
    assert min(found.by_operation.values()) >= 2
    assert found.inside > 0
