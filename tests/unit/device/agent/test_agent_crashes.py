"""Kills, crash loops, damaged files, missing networks: after each start something verified answers, or null."""

import json
from typing import Any

import pytest

from federated.device import NULL
from federated.device.agent_steps import Steps
from federated.errors import DeviceError, NoRuntime, ReleaseError, Unreachable
from federated.release import ReleaseClient, Source
from federated.testing.releases import Mirror


class Nothing:
    """No network."""

    label = "nothing"

    def read(self, name: str) -> Any:
        raise Unreachable("no network")
        yield b""


NO_NETWORK: Source = Nothing()


class Killed(BaseException):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, target: object, name: str, *, after: bool = False) -> None:
    real = getattr(target, name)

    def stop(*args: Any, **kwargs: Any) -> None:
        if after:
            real(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(target, name, stop)


def test_a_committed_version_serves_again_without_a_network(yard) -> None:
    with yard.started() as agent:
        version = yard.settled(agent, 1)
    with yard.started(NO_NETWORK) as agent:
        assert (agent.active, yard.answer) == (version, 1.0)
        assert not agent.poll()
        assert (agent.active, yard.answer) == (version, 1.0)
        assert yard.book.trouble == "Unreachable: no network"


def test_a_version_on_probation_is_on_probation_again(yard, time) -> None:
    version = yard.publish(1)
    with yard.agent() as agent:
        agent.poll()
        time.forward(seconds=50)
        yard.crash(agent)
        with yard.started() as again:
            assert (again.active, again.undecided, yard.answer) == (version, True, 1.0)
            time.forward(seconds=50)
            again.tick()
            assert again.undecided  # its time begins anew
            time.forward(seconds=11)
            again.tick()
            assert not again.undecided


def crashes(yard, count: int) -> None:
    for _ in range(count):
        agent = yard.agent()
        agent.__enter__()
        yard.crash(agent)


def test_a_crash_loop_on_probation_ends_on_the_last_known_good(yard) -> None:
    with yard.started() as agent:
        first = yard.settled(agent, 1)
        second = yard.publish(2)
        agent.poll()
        yard.crash(agent)
    crashes(yard, 3)
    assert yard.book.active == second
    with yard.started() as agent:
        assert (agent.active, yard.answer, yard.state_of(second)) == (first, 1.0, "failed")
        assert "3 starts in a row" in yard.book.versions[second].reason
        agent.poll()
        assert agent.active == first


def test_a_crash_loop_of_all_that_there_is_ends_at_null(yard) -> None:
    with yard.started() as agent:
        yard.settled(agent, 1)
        yard.settled(agent, 2)
        yard.crash(agent)
    for _ in range(8):
        crashes(yard, 1)
        if yard.book.active == NULL:
            break
    with yard.started() as agent:
        assert (agent.active, yard.answer) == (NULL, 0.0)
    assert {one.state for one in yard.book.versions.values()} == {"failed"}


def test_a_crash_while_going_back_in_a_crash_loop_is_no_dead_end(yard, monkeypatch) -> None:
    """Going back from a crash loop loads nothing before the journal has moved."""
    with yard.started() as agent:
        first = yard.settled(agent, 1)
        yard.settled(agent, 2)
        yard.crash(agent)
    crashes(yard, 3)
    kill_at(monkeypatch, Steps, "restore")
    for _ in range(4):
        with pytest.raises(Killed):
            yard.agent().__enter__()
    assert yard.book.active == NULL
    assert yard.state_of(first) == "failed"


def test_a_sign_of_health_ends_the_count(yard, time) -> None:
    with yard.started() as agent:
        version = yard.settled(agent, 1)
        yard.crash(agent)
    for _ in range(6):
        crashes(yard, 2)
        agent = yard.agent()
        agent.__enter__()
        agent.health.success(agent.runtime.active.digest)
        agent.tick()
        assert yard.book.boots == 0
        yard.crash(agent)
    with yard.started() as agent:
        assert agent.active == version


def test_orderly_ends_are_no_crashes(yard) -> None:
    with yard.started() as agent:
        version = yard.settled(agent, 1)
    for _ in range(6):
        with yard.started() as agent:
            assert agent.active == version


@pytest.mark.parametrize(
    ("state", "target", "name", "after"),
    [
        ("downloading", "federated.device.agent_fetch.Releases", "fetch", False),
        ("downloading", "federated.device.agent_fetch.Releases", "fetch", True),
        ("verified", "federated.device.shelf.Shelf", "put", False),
        ("verified", "federated.device.shelf.Shelf", "put", True),
        ("staged", "federated.device.agent_steps.Steps", "bring_up", False),
        ("probing", "federated.device.agent_bench.Bench", "_load", False),
        ("probing", "federated.device.agent_bench.Bench", "prove", True),
        ("probation", "federated.device.agent_steps.Steps", "_point", False),
        ("probation", "federated.device.agent_steps.Steps", "_point", True),
    ],
)
def test_a_kill_in_each_state_is_gone_on_from(yard, time, monkeypatch, state, target, name, after) -> None:
    with yard.started() as agent:
        first = yard.settled(agent, 1)
        second = yard.publish(2)
        with monkeypatch.context() as patch:
            module, _, cls = target.rpartition(".")
            kill_at(patch, getattr(__import__(module, fromlist=[cls]), cls), name, after=after)
            with pytest.raises(Killed):
                agent.poll()
        assert yard.state_of(second) == state
        yard.crash(agent)
        with yard.started() as again:
            on_probation = state == "probation"
            assert (again.active, yard.answer) == ((second, 2.0) if on_probation else (first, 1.0))
            assert again.poll()
            assert (again.active, yard.answer) == (second, 2.0)
            time.forward(seconds=61)
            again.tick()
            assert yard.state_of(second) == "committed"
    assert [path.name for path in (yard.state / "versions").iterdir() if path.name.startswith(".")] == []


def test_a_version_that_brings_the_device_down_while_it_is_probed(yard, monkeypatch) -> None:
    """It is blamed itself: what answered meanwhile loses none of its starts."""
    with yard.started() as agent:
        first = yard.settled(agent, 1)
    second = yard.publish(2)
    for number in range(5):
        agent = yard.agent()
        agent.__enter__()
        assert (agent.active, yard.answer) == (first, 1.0)
        with monkeypatch.context() as patch:
            kill_at(patch, type(agent._bench), "prove")
            if number < 3:
                with pytest.raises(Killed):
                    agent.poll()
            else:
                assert agent.poll()
                assert yard.state_of(second) == "failed"
        yard.crash(agent) if number < 3 else agent.__exit__(None, None, None)
        yard.reboot()
    assert "went down 3 times while this version was loaded and probed" in yard.book.versions[second].reason


def test_damaged_files_are_fetched_again(yard) -> None:
    with yard.started() as agent:
        first, second = yard.settled(agent, 1), yard.settled(agent, 2)
    weights = yard.state / "versions" / second / "weights.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with yard.started(NO_NETWORK) as agent:
        assert (agent.active, yard.answer, yard.state_of(second)) == (first, 1.0, "discovered")
    with yard.started() as agent:
        assert agent.poll()
        assert (agent.active, yard.answer) == (second, 2.0)
    assert weights.read_bytes() == data


@pytest.mark.parametrize("name", ["stored.json", "manifest.json", "weights.safetensors"])
def test_missing_files_are_damage(yard, name) -> None:
    with yard.started() as agent:
        version = yard.settled(agent, 1)
    (yard.state / "versions" / version / name).unlink()
    with yard.started() as agent:
        assert agent.active == NULL
        assert agent.poll()
        assert agent.active == version


def test_damaged_metadata_blame_no_version(yard) -> None:
    """Whether a version may run cannot be said then: null answers until the source has mended it."""
    with yard.started() as agent:
        version = yard.settled(agent, 1)
    (yard.state / "release" / "metadata" / "targets.json").write_bytes(b"{")
    with yard.started(NO_NETWORK) as agent:
        assert (agent.active, yard.state_of(version)) == (NULL, "committed")
    with yard.started() as agent:
        assert agent.poll()
        assert (agent.active, yard.answer) == (version, 1.0)


def test_a_damaged_journal_is_named(yard) -> None:
    with yard.started() as agent:
        yard.settled(agent, 1)
    path = yard.state / "journal.json"
    whole = json.loads(path.read_bytes())
    for damage in (b"", b"[1]", b"{", json.dumps(whole | {"format": 2}).encode()):
        path.write_bytes(damage)
        with pytest.raises(DeviceError, match=r"journal.json is no journal that this library reads .* put it away"):
            yard.agent().__enter__()
    path.unlink()
    with yard.started() as agent:
        assert agent.active == NULL
        assert agent.poll()
        assert yard.answer == 1.0


def test_a_base_that_is_missing_at_a_start_is_said(yard) -> None:
    with yard.started() as agent:
        version = yard.settled(agent, 1)
    yard.no_base = True
    for _ in range(6):
        with pytest.raises(NoRuntime, match="on a disk that is not there"):
            yard.agent().__enter__()
    yard.no_base = False
    with yard.started() as agent:
        assert agent.active == version  # none of these was a crash of it


def test_expired_metadata_refuse_what_is_new_and_keep_what_is_there(yard, time) -> None:
    from federated.device.agent_status import status_of

    with yard.started() as agent:
        version = yard.settled(agent, 1)
        assert not status_of(yard.config(), time.now).stale
        yard.publish(2)
        time.forward(days=4)  # the timestamp lasts three
        assert not agent.poll()
        assert yard.book.trouble.startswith("FreezeAttack")
        assert (agent.active, yard.answer) == (version, 1.0)
        assert yard.events[-1] == "stale"
        agent.poll()
        assert yard.events.count("stale") == 1
    assert status_of(yard.config(), time.now).stale
    with yard.started() as agent:
        assert (agent.active, yard.answer) == (version, 1.0)
        yard.publisher.renew()
        assert agent.poll()
        assert yard.answer == 2.0
        assert not status_of(yard.config(), time.now).stale


def test_a_device_that_was_off_knows_that_it_is_stale(yard, time) -> None:
    from federated.device.agent_status import status_of

    with yard.started() as agent:
        yard.settled(agent, 1)
    time.forward(days=4)
    found = status_of(yard.config(), time.now)
    assert (found.stale, found.running, found.book.trouble) == (True, False, "")


def test_a_revoked_version_is_left_at_once_and_never_returned_to(yard) -> None:
    with yard.started() as agent:
        first, second = yard.settled(agent, 1), yard.settled(agent, 2)
        yard.publisher.revoke_version(second)
        assert not agent.poll()
        assert (agent.active, yard.answer) == (NULL, 0.0)  # the floor is above both
        assert yard.book.versions[second].code == "BelowSecurityFloor"
        done, message = yard.command(agent, "activate", first[:8])
        assert not done
        assert "was revoked" in message
        assert yard.command(agent, "activate", "null") == (True, "null answers")
    with yard.started(NO_NETWORK) as agent:
        assert (agent.active, yard.answer) == (NULL, 0.0)


def test_a_version_that_was_revoked_while_the_device_was_down(yard) -> None:
    """As when a process died between seeing the floor and leaving the version."""
    with yard.started() as agent:
        version = yard.settled(agent, 1)
    yard.publisher.revoke_version(version)
    ReleaseClient(
        yard.publisher.trusted_root, str(yard.publisher.folder), yard.state / "release", clock=yard.time
    ).refresh()
    with yard.started(NO_NETWORK) as agent:
        assert (agent.active, yard.answer, yard.state_of(version)) == (NULL, 0.0, "failed")


def test_what_a_source_makes_up_is_tried_again_later(yard) -> None:
    with yard.started() as agent:
        first = yard.settled(agent, 1)
    second = yard.publish(2)
    mirror = Mirror.of(yard.publisher.folder)
    name = next(one for one in mirror.files if second in one and one.endswith("weights.safetensors"))
    data = mirror.files[name]
    mirror.files[name] = data[:-1] + bytes([data[-1] ^ 1])
    with yard.started(mirror) as agent:
        assert not agent.poll()
        assert (agent.active, yard.state_of(second)) == (first, "discovered")
        assert yard.book.trouble.startswith("WrongContent")
        mirror.files[name] = data
        assert agent.poll()
        assert (agent.active, yard.answer) == (second, 2.0)


def test_a_disk_that_refuses_at_a_start(yard) -> None:
    yard.state.parent.mkdir(exist_ok=True)
    yard.state.write_bytes(b"a file")
    with pytest.raises(ReleaseError, match="hold the device's state"):
        yard.agent().__enter__()
