"""What must not end the service: null, worn media, a disk that takes nothing more, and what nobody foresaw."""

import errno
import fcntl
import os
import shutil
import subprocess
import threading
import time as seconds
from pathlib import Path
from typing import Any

import pytest

from federated.device import NULL
from federated.device.agent_lock import StateLock
from federated.device.agent_loop import run
from federated.errors import DeviceError, NoRuntime, ReleaseError, Unreachable


class Nothing:
    """No network."""

    label = "nothing"

    def read(self, name: str) -> Any:
        raise Unreachable("no network")
        yield b""


def test_null_answers_after_a_start_too(yard) -> None:
    """Whoever serves waits for a runtime: also the null adapter needs its base opened."""
    with yard.started() as agent:
        yard.settled(agent, 1)
        assert yard.command(agent, "activate", "null")[0]
    with yard.started(Nothing()) as agent:
        assert (agent.active, agent.runtime, yard.answer) == (NULL, yard.runtime, 0.0)


def test_null_answers_where_the_only_version_is_damaged(yard) -> None:
    with yard.started() as agent:
        version = yard.settled(agent, 1)
    (yard.state / "versions" / version / "weights.safetensors").write_bytes(b"other")
    with yard.started(Nothing()) as agent:
        assert (agent.active, agent.runtime, yard.answer) == (NULL, yard.runtime, 0.0)


def test_null_answers_by_whatever_record_leads_to_a_base(yard, monkeypatch) -> None:
    with yard.started() as agent:
        first, second = yard.settled(agent, 1), yard.settled(agent, 2)
        assert yard.command(agent, "activate", "null")[0]
    for version, damage in ((second, b"{"), (first, b"")):
        (yard.state / "versions" / version / "manifest.json").write_bytes(damage)
        with yard.started(Nothing()) as agent:
            assert (agent.runtime is None) == (version == first)  # none is left then
    shutil.rmtree(yard.state / "versions")
    with yard.started() as agent:
        assert yard.command(agent, "install")[0]
    with yard.agent(Nothing()) as agent:
        assert yard.command(agent, "activate", "null")[0]
    with monkeypatch.context() as patch:
        patch.setattr(yard, "runtime_of", lambda _: (_ for _ in ()).throw(DeviceError("no recipe")))
        with yard.started(Nothing()) as agent:
            assert (agent.active, agent.runtime) == (NULL, None)
    yard.no_base = True
    with pytest.raises(NoRuntime, match="not there"):
        yard.agent().__enter__()


@pytest.mark.parametrize("name", ["stored.json", "manifest.json", "weights.safetensors"])
def test_a_file_that_cannot_be_read_is_damage(yard, name) -> None:
    with yard.started() as agent:
        first, second = yard.settled(agent, 1), yard.settled(agent, 2)
    file = yard.state / "versions" / second / name
    file.unlink()
    file.mkdir()
    with yard.started(Nothing()) as agent:
        assert (agent.active, yard.answer) == (first, 1.0)
    with yard.started() as agent:
        assert agent.poll()
        assert (agent.active, yard.answer) == (second, 2.0)


def test_a_version_that_may_not_be_read_now_is_passed_over_and_not_thrown_away(yard, monkeypatch) -> None:
    with yard.started() as agent:
        first, second = yard.settled(agent, 1), yard.settled(agent, 2)
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if second in str(path) and path.name == "weights.safetensors":
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        with yard.started(Nothing()) as agent:
            assert (agent.active, yard.answer, yard.state_of(second)) == (first, 1.0, "committed")
            agent.tick()
    with yard.started() as agent:
        assert agent.poll()
        assert (agent.active, yard.answer) == (second, 2.0)
        assert yard.events.count("downloading") == 2  # it was here all the time


@pytest.fixture
def small(yard, tmp_path):
    """The state folder on a disk of its own; gives a function that mounts it anew with other options."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root and mount(8)")
    yard.state = tmp_path / "disk" / "state"
    yard.state.parent.mkdir()

    def mount(*options: str) -> None:
        done = subprocess.run(["mount", *options, str(yard.state.parent)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"this machine does not let root mount a tmpfs: {done.stderr.decode().strip()}")

    mount("-t", "tmpfs", "-o", "size=512k", "tmpfs")
    yield mount
    subprocess.run(["umount", "--lazy", str(yard.state.parent)], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        while shutil.disk_usage(disk).free:
            file.write(bytes(4096))


def test_a_start_on_a_full_disk_serves(yard, small, time) -> None:
    with yard.started() as agent:
        version = yard.settled(agent, 1)
        yard.crash(agent)
    fill(yard.state.parent)
    agent = yard.agent()
    agent.__enter__()
    assert (agent.active, yard.answer, yard.book.boots) == (version, 1.0, 0)
    (yard.state.parent / "filler").unlink()
    time.forward(seconds=61)
    agent.tick()
    agent.__exit__(None, None, None)
    assert yard.book.boots == 0


def test_a_start_on_a_full_disk_goes_back_from_what_is_damaged(yard, small) -> None:
    with yard.started() as agent:
        first, second = yard.settled(agent, 1), yard.settled(agent, 2)
    (yard.state / "versions" / second / "weights.safetensors").write_bytes(b"other")
    fill(yard.state.parent)
    with yard.agent(Nothing()) as agent:
        yard.runtime = agent.runtime
        assert (agent.active, yard.answer) == (second, 1.0)  # the journal could not be written yet
        with pytest.raises(ReleaseError, match="No space left"):
            agent.tick()
        (yard.state.parent / "filler").unlink()
        agent.tick()
        assert (agent.active, yard.answer, yard.state_of(second)) == (first, 1.0, "discovered")


def test_a_start_on_a_disk_that_is_read_only_serves(yard, small) -> None:
    with yard.started() as agent:
        version = yard.settled(agent, 1)
    small("-o", "remount,ro")
    agent = yard.agent(Nothing())
    yard.reboot()
    agent.__enter__()
    assert (agent.active, yard.answer) == (version, 1.0)
    with pytest.raises(DeviceError, match="held by another agent"):
        yard.agent().__enter__()
    yard.crash(agent)


def test_no_base_on_a_full_disk_is_said(yard, small) -> None:
    with yard.started() as agent:
        yard.settled(agent, 1)
    fill(yard.state.parent)
    yard.no_base = True
    with pytest.raises(NoRuntime):
        yard.agent().__enter__()


def test_what_nobody_foresaw_ends_no_agent(yard, monkeypatch, caplog) -> None:
    """Started again and again, an agent that ends would blame the version that serves."""
    with yard.started() as agent:
        version = yard.settled(agent, 1)
    yard.publish(2)
    agent = yard.agent()
    yard.reboot()

    def fetch(*_: Any) -> None:
        agent.stop()
        raise RecursionError("deep")

    monkeypatch.setattr(agent._releases, "fetch", fetch)
    assert not run(agent)
    assert (yard.book.active, yard.book.boots, yard.answer) == (version, 0, 1.0)
    assert "RecursionError: deep" in caplog.text


def test_what_nobody_foresaw_in_a_command_is_answered(yard, monkeypatch) -> None:
    with yard.started() as agent:
        monkeypatch.setattr(agent._verbs, "_carry_out", lambda _: 1 // 0)
        assert yard.command(agent, "rollback") == (False, "unforeseen: ZeroDivisionError, see the agent's log")
        (yard.state / "commands" / f"{'0' * 20}-{'a' * 8}.json").write_text("[" * 4096)
        agent.tick()
        assert "expected one of install" in yard.book.replies[-1].message


def test_no_memory_for_the_base_is_not_the_versions_fault(yard, monkeypatch) -> None:
    version = yard.publish(1)
    with yard.started() as agent, monkeypatch.context() as patch:
        patch.setattr(agent._bench, "_runtime_of", lambda _: (_ for _ in ()).throw(MemoryError("16 GB")))
        assert not agent.poll()
        assert yard.state_of(version) == "discovered"
        assert "the base model cannot be opened: MemoryError: 16 GB" in yard.book.trouble
        patch.setattr(agent._bench, "_runtime_of", yard.runtime_of)
        assert agent.poll()
        assert yard.answer == 1.0


def test_a_command_that_cannot_be_taken_away_keeps_no_version_on_probation(yard, time) -> None:
    version = yard.publish(1)
    with yard.started() as agent:
        agent.poll()
        (yard.state / "commands" / f"{'0' * 20}-{'a' * 8}.json").mkdir(parents=True)
        time.forward(seconds=61)
        with pytest.raises(ReleaseError, match="take a command away"):
            agent.tick()
        assert yard.state_of(version) == "committed"


def test_a_look_at_the_lock_keeps_no_agent_from_starting(yard) -> None:
    yard.state.mkdir()
    (yard.state / "agent.lock").touch()
    with (yard.state / "agent.lock").open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.05, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        lock = StateLock(yard.state)
        lock.take()
        assert lock.is_held()
        seconds.sleep(0.1)
    lock.release()
    assert not lock.is_held()


def test_what_killed_writers_left_is_removed_at_a_start(yard) -> None:
    with yard.started() as agent:
        yard.settled(agent, 1)
    ours = [yard.state / name / f".one-{'0' * 16}.tmp" for name in ("", "release/metadata", "release/metadata/roots")]
    theirs = yard.state / "commands" / f".one-{'0' * 16}.tmp"  # somebody may be writing it
    for path in (*ours, theirs):
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"half")
    with yard.started():
        assert [path.exists() for path in (*ours, theirs)] == [False, False, False, True]
