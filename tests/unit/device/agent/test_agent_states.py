"""From a release to a committed version, and what a version that fails on the way leaves behind."""

import pytest

from federated.device import NULL
from federated.errors import DeviceError, ReleaseError
from federated.testing.releases import Mirror


def test_a_new_device_answers_with_null_and_opens_nothing(yard) -> None:
    with yard.started() as agent:
        assert (agent.active, agent.runtime, yard.opened) == (NULL, None, 0)
        assert not agent.poll()
        assert yard.book.trouble.startswith("NotReleased")


def test_a_release_goes_through_all_states(yard, time) -> None:
    version = yard.publish(1)
    with yard.started() as agent:
        assert agent.poll()
        assert (agent.active, agent.undecided, yard.answer) == (version, True, 1.0)
        agent.tick()
        assert agent.undecided
        time.forward(seconds=60)
        agent.tick()
        assert (agent.undecided, yard.book.good, yard.book.trail) == (False, (version,), (NULL,))
        assert list(yard.book.versions[version].times) == sorted(
            ["committed", "discovered", "downloading", "probation", "probing", "staged", "verified"]
        )
        assert yard.events[1:] == [
            "discovered", "downloading", "verified", "staged", "probing", "activated", "committed",
        ]  # fmt: skip
        assert agent.poll()
        assert len(yard.events) == 8  # nothing new, nothing done
    assert list((yard.state / "release" / "files").iterdir()) == []
    assert yard.events[-1] == "stopped"


def test_enough_requests_end_a_probation(yard) -> None:
    yard.publish(1)
    with yard.started() as agent:
        agent.poll()
        digest = agent.runtime.active.digest
        agent.health.success("another slot", 100)
        agent.health.success(digest, 19)
        agent.tick()
        assert agent.undecided
        agent.health.success(digest)
        agent.tick()
        assert not agent.undecided


def test_failing_requests_lead_back_and_are_remembered(yard) -> None:
    with yard.started() as agent:
        first = yard.settled(agent, 1)
        second = yard.publish(2)
        agent.poll()
        assert yard.answer == 2.0
        digest = agent.runtime.active.digest
        for _ in range(2):
            agent.health.failure(digest, "out of memory")
        agent.tick()
        assert yard.answer == 2.0  # as many as may fail
        agent.health.failure(digest, "out of memory")
        agent.tick()
        assert (agent.active, yard.answer, yard.state_of(second)) == (first, 1.0, "failed")
        assert "3 requests failed on probation, the last because: out of memory" in yard.book.versions[second].reason
        assert agent.poll()
        assert yard.answer == 1.0  # not tried again
        third = yard.settled(agent, 3)
        assert (agent.active, yard.answer) == (third, 3.0)


def test_failures_after_a_commit_change_nothing(yard, time) -> None:
    with yard.started() as agent:
        yard.settled(agent, 1)
        for _ in range(10):
            agent.health.failure(agent.runtime.active.digest, "x")
        time.forward(seconds=100)
        agent.tick()
        assert yard.answer == 1.0


@pytest.mark.parametrize("fault", [DeviceError("does not fit"), RuntimeError("CUDA out of memory"), MemoryError()])
def test_a_version_that_cannot_be_loaded_touches_nothing_that_serves(yard, fault) -> None:
    yard.backend.fails[2.0] = fault
    with yard.started() as agent:
        first = yard.settled(agent, 1)
        second = yard.publish(2)
        assert agent.poll()
        assert (agent.active, yard.answer, yard.state_of(second)) == (first, 1.0, "failed")
        assert yard.book.versions[second].code == "DeviceError"
        assert str(fault) in yard.book.versions[second].reason
        assert yard.backend.built == [1.0, 2.0]
        agent.poll()
        assert yard.backend.built == [1.0, 2.0]


def test_a_version_without_effect_is_refused(yard) -> None:
    yard.backend.answers[1.0] = 0.0
    version = yard.publish(1)
    with yard.started() as agent:
        agent.poll()
        assert (agent.active, yard.state_of(version)) == (NULL, "failed")
        assert "is loaded and has no effect" in yard.book.versions[version].reason


def test_what_stops_answering_right_on_probation_is_not_committed(yard, time) -> None:
    with yard.started() as agent:
        first = yard.settled(agent, 1)
        second = yard.publish(2)
        agent.poll()
        yard.backend.answers[2.0] = 0.0
        time.forward(seconds=61)
        agent.tick()
        assert (agent.active, yard.state_of(second), yard.answer) == (first, "failed", 1.0)


def test_another_base_is_known_before_anything_is_fetched(yard) -> None:
    with yard.started() as agent:
        yard.settled(agent, 1)
        mirror = Mirror.of(yard.publisher.folder)
        other = yard.publish(2, base_digest="c" * 64)
        assert agent.poll()
        assert (yard.state_of(other), yard.book.versions[other].code) == ("failed", "BaseMismatch")
        assert not (yard.state / "versions" / other).exists()
        assert mirror.requests == []


def test_another_base_on_a_new_device(yard) -> None:
    other = yard.publish(2, base_digest="c" * 64)
    with yard.started() as agent:
        assert agent.poll()
        assert (agent.active, yard.state_of(other), yard.book.versions[other].code) == (NULL, "failed", "BaseMismatch")


def test_a_newer_release_waits_for_the_end_of_a_probation(yard, time) -> None:
    first = yard.publish(1)
    with yard.started() as agent:
        agent.poll()
        second = yard.publish(2)
        assert agent.poll()
        assert (agent.active, yard.state_of(second)) == (first, None)
        time.forward(seconds=61)
        agent.tick()
        agent.poll()
        assert agent.active == second


def test_a_publishers_rollback_needs_no_fetch_and_no_probation(yard) -> None:
    with yard.started() as agent:
        first, _ = yard.settled(agent, 1), yard.settled(agent, 2)
        yard.publisher.rollback("stable", first)
        built = list(yard.backend.built)
        assert agent.poll()
        assert (agent.active, agent.undecided, yard.answer, yard.backend.built) == (first, False, 1.0, built)


def test_a_publishers_rollback_to_what_cannot_be_loaded_any_more(yard) -> None:
    with yard.started() as agent:
        first, second = yard.settled(agent, 1), yard.settled(agent, 2)
    yard.publisher.rollback("stable", first)
    yard.backend.fails[1.0] = RuntimeError("no")
    with yard.started() as agent:
        assert agent.poll()
        assert (agent.active, yard.answer, yard.state_of(first)) == (second, 2.0, "failed")


def test_equal_weights_under_two_names(yard, make) -> None:
    with yard.started() as agent:
        first = yard.settled(agent, 1)
        again = make(1, release_counter=2)
        yard.publisher.publish("stable", again)
        assert agent.poll()
        assert (agent.active, yard.answer, yard.book.trail[-1]) == (again.version_id, 1.0, first)


def test_the_way_back_is_previous_then_known_good_then_null(yard, time) -> None:
    with yard.started() as agent:
        first, second = yard.settled(agent, 1), yard.settled(agent, 2)
        third = yard.publish(3)
        agent.poll()
    yard.backend.fails[2.0] = RuntimeError("gone bad")
    with yard.started() as agent:  # nothing but the active one is in memory any more
        for _ in range(3):
            agent.health.failure(agent.runtime.active.digest, "x")
        agent.tick()
        assert (agent.active, yard.answer) == (first, 1.0)
        assert (yard.state_of(third), yard.state_of(second)) == ("failed", "committed")
        assert "passed_over" in yard.events


def test_the_way_back_ends_at_null(yard) -> None:
    first = yard.publish(1)
    with yard.started() as agent:
        agent.poll()
        for _ in range(3):
            agent.health.failure(agent.runtime.active.digest, "x")
        agent.tick()
        assert (agent.active, yard.answer, yard.state_of(first)) == (NULL, 0.0, "failed")


def test_old_versions_leave_the_disk(yard) -> None:
    with yard.started(capacity=2) as agent:
        versions = [yard.settled(agent, value) for value in (1, 2, 3)]
        held = {path.name for path in (yard.state / "versions").iterdir()}
        assert held == set(versions[1:])
        assert "dropped" in yard.events


def test_versions_that_fail_leave_the_disk_too(yard) -> None:
    with yard.started(capacity=2) as agent:
        first = yard.settled(agent, 1)
        for value in (2, 3, 4, 5):
            yard.backend.answers[value] = 0.0
            last = yard.publish(value)
            agent.poll()
        assert {path.name for path in (yard.state / "versions").iterdir()} == {first, last}


def test_a_missing_base_model_is_no_versions_fault(yard) -> None:
    version = yard.publish(1)
    yard.no_base = True
    with yard.started() as agent:
        assert not agent.poll()
        assert yard.state_of(version) == "discovered"
        assert "NoRuntime: the base model cannot be opened: the base is on a disk" in yard.book.trouble
        yard.no_base = False
        assert agent.poll()
        assert (agent.active, yard.book.trouble) == (version, "")


def test_one_agent_per_folder(yard) -> None:
    with yard.started() as agent, pytest.raises(DeviceError, match=r"held by another agent \(process \d+\)"):
        yard.agent().__enter__()
    with yard.started() as agent:
        assert agent.active == NULL


def test_a_full_disk_loses_nothing_that_serves(yard, monkeypatch) -> None:
    from federated.device import journal

    with yard.started() as agent:
        first = yard.settled(agent, 1)
        yard.publish(2)

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(journal, "write_file", full)
            with pytest.raises(ReleaseError, match="No space left"):
                agent.poll()
        assert (agent.active, yard.answer) == (first, 1.0)
        assert agent.poll()
        assert yard.answer == 2.0


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_full_disk_does_not_keep_a_failing_version_serving(yard, time, monkeypatch, by_hand) -> None:
    """What answers changes at once; the journal follows when there is room, and commits nothing that does not serve."""
    from federated.device import journal
    from federated.device.agent_commands import Mailbox

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with yard.started() as agent:
        first = yard.settled(agent, 1)
        second = yard.publish(2)
        agent.poll()
        if by_hand:
            Mailbox(yard.state / "commands").send("rollback", second)
        for _ in range(0 if by_hand else 3):
            agent.health.failure(agent.runtime.active.digest, "x")
        with monkeypatch.context() as patch:
            patch.setattr(journal, "write_file", full)
            for _ in range(3):
                with pytest.raises(ReleaseError, match="No space left"):
                    agent.tick()
                time.forward(seconds=100)
            assert (agent.active, yard.answer) == (second, 1.0)
        agent.tick()
        assert (agent.active, yard.answer, yard.state_of(second)) == (first, 1.0, "failed")


def test_a_rollback_that_the_disk_refused_is_written_down_later(yard, time, monkeypatch) -> None:
    """Also where the reply got through: what serves and what the journal says come together again."""
    from federated.device.journal import Journal

    with yard.started() as agent:
        first = yard.settled(agent, 1)
        second = yard.publish(2)
        agent.poll()
        real = Journal.enter

        def once(*args: object, **fields: object) -> None:
            monkeypatch.setattr(Journal, "enter", real)
            raise ReleaseError("cannot write the journal")

        monkeypatch.setattr(Journal, "enter", once)
        assert yard.command(agent, "rollback", second)[0] is False
        assert (agent.active, yard.answer, yard.state_of(second)) == (first, 1.0, "failed")


def test_what_failed_is_never_gone_back_to(yard) -> None:
    with yard.started() as agent:
        first, second = yard.settled(agent, 1), yard.settled(agent, 2)
        yard.command(agent, "activate", first)
        assert yard.book.trail == (NULL, second)
        agent._steps.give_up(second, DeviceError("found to be bad"))
        yard.command(agent, "rollback", first)
        assert (agent.active, yard.answer) == (NULL, 0.0)


def test_a_server_that_installs_others_meanwhile_cannot_push_a_version_out(yard, make) -> None:
    """While it is probed, and until it is routed to, a version is held like a request's."""
    with yard.started() as agent:
        yard.settled(agent, 1)
        yard.publish(2)
        others = iter(range(10, 20))
        real = yard.backend.predict

        def predict(handle, rows):
            for _ in range(6):
                other = make(next(others, 10))
                yard.runtime.install(other.manifest, other.weights, version_id=other.version_id)
            yard.backend.predict = real
            return real(handle, rows)

        yard.backend.predict = predict
        agent.poll()
        assert yard.answer == 2.0
