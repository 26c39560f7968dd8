"""What people ask of a device by hand, with an agent and without; what the channel may do afterwards."""

import pytest

from federated.device import NULL
from federated.device.agent_commands import Mailbox
from federated.errors import DeviceError


@pytest.fixture
def mailbox(yard) -> Mailbox:
    return Mailbox(yard.state / "commands")


def test_a_rollback_holds_until_the_channel_moves(yard) -> None:
    with yard.started() as agent:
        first, second = yard.settled(agent, 1), yard.settled(agent, 2)
        assert yard.command(agent, "rollback", second) == (True, f"{first[:12]} answers again")
        assert (agent.active, yard.answer, yard.state_of(second)) == (first, 1.0, "committed")
        assert agent.poll()
        assert agent.active == first
        third = yard.settled(agent, 3)
        assert (agent.active, yard.book.declined) == (third, "")
        assert yard.command(agent, "rollback", third)[0]
        assert agent.active == first  # and not the second, which was rolled back from


def test_rollbacks_end_at_null(yard) -> None:
    with yard.started() as agent:
        first = yard.settled(agent, 1)
        assert yard.command(agent, "rollback", first) == (True, "null answers again")
        assert yard.answer == 0.0
        assert yard.command(agent, "rollback", NULL) == (
            True, "the null adapter answers; there is nothing to go back to"
        )  # fmt: skip
        agent.poll()
        assert agent.active == NULL


def test_a_rollback_that_was_done_is_not_done_again(yard, mailbox, monkeypatch) -> None:
    """A kill between the deed and the reply."""
    with yard.started() as agent:
        first, second = yard.settled(agent, 1), yard.settled(agent, 2)
        name = mailbox.send("rollback", second)
        agent._steps.leave(declined=second)
        agent.tick()
        assert (agent.active, mailbox.waiting()) == (first, [])
        assert yard.book.replies[-1].message == f"{second[:12]} does not answer any more; {first[:12]} does"
        with monkeypatch.context() as patch:  # and one between the reply and taking the file away
            patch.setattr(Mailbox, "done", lambda *_: None)
            name = mailbox.send("rollback", first)
            agent.tick()
        assert (agent.active, mailbox.waiting()) == (NULL, [name])
        agent.tick()
        assert (agent.active, mailbox.waiting()) == (NULL, [])
        assert [one.name for one in yard.book.replies].count(name) == 1


def test_a_version_on_probation_that_is_rolled_back_has_failed(yard) -> None:
    with yard.started() as agent:
        first = yard.settled(agent, 1)
        second = yard.publish(2)
        agent.poll()
        assert yard.command(agent, "rollback", second)[0]
        assert (agent.active, yard.state_of(second)) == (first, "failed")
        assert yard.book.versions[second].reason == "rolled back by hand on probation"


def test_commands_wait_for_an_agent_and_come_before_anything_serves(yard, mailbox) -> None:
    with yard.started() as agent:
        first, second = yard.settled(agent, 1), yard.settled(agent, 2)
    built = len(yard.backend.built)
    mailbox.send("rollback", second)
    with yard.started() as agent:
        assert (agent.active, yard.answer) == (first, 1.0)
        assert yard.backend.built[built:] == [1.0]  # the one that was rolled back from was not even loaded


def test_a_start_does_not_wait_for_the_source(yard, mailbox) -> None:
    with yard.started() as agent:
        first = yard.settled(agent, 1)
    second = yard.publish(2)
    mailbox.send("install", "")
    mailbox.send("pin", "")
    with yard.started() as agent:
        assert (agent.active, len(mailbox.waiting())) == (first, 2)
        agent.tick()
        assert (agent.active, yard.book.pinned) == (second, second)


def test_activate_by_hand(yard) -> None:
    with yard.started() as agent:
        first, second = yard.settled(agent, 1), yard.settled(agent, 2)
        assert yard.command(agent, "activate", first[:10]) == (True, f"{first[:12]} answers")
        assert (yard.answer, agent.undecided, yard.book.declined) == (1.0, False, second)
        agent.poll()
        assert agent.active == first
        assert yard.command(agent, "activate", "null") == (True, "null answers")
        assert yard.answer == 0.0
        assert yard.command(agent, "activate", second) == (True, f"{second[:12]} answers")
        assert yard.book.declined == ""


@pytest.mark.parametrize("name", ["", "zz"])
def test_names_that_mean_nothing(yard, name) -> None:
    with yard.started() as agent:
        first = yard.settled(agent, 1)
        done, message = yard.command(agent, "activate", name)
        assert (done, message) == (
            False, f"0 versions on this device begin with {name!r}; found {first[:12]}"
        )  # fmt: skip


def test_a_failed_version_is_tried_again_by_hand_alone(yard) -> None:
    with yard.started() as agent:
        yard.settled(agent, 1)
        second = yard.publish(2)
        yard.backend.answers[2.0] = 0.0
        agent.poll()
        done, message = yard.command(agent, "activate", second)
        assert not done
        assert message.startswith(f"{second[:12]} was not activated: the adapter is loaded and has no effect")
        del yard.backend.answers[2.0]
        agent.poll()
        assert yard.state_of(second) == "failed"
        assert yard.command(agent, "activate", second) == (True, f"{second[:12]} answers on probation")


def test_install_the_current_version_though_it_failed(yard) -> None:
    with yard.started() as agent:
        version = yard.publish(1)
        yard.backend.fails[1.0] = RuntimeError("not now")
        agent.poll()
        assert yard.state_of(version) == "failed"
        assert not yard.command(agent, "install")[0]
        yard.backend.fails.clear()
        assert yard.command(agent, "install") == (True, f"{version[:12]} answers on probation")
        assert yard.command(agent, "install") == (True, f"{version[:12]} answers on probation")


def test_install_an_older_version_of_the_channel(yard) -> None:
    first = yard.publish(1)
    with yard.started() as agent:
        second = yard.settled(agent, 2)
        assert yard.command(agent, "install", first) == (True, f"{first[:12]} answers on probation")
        assert (agent.active, yard.book.declined) == (first, second)
        agent.poll()
        assert agent.active == first
        assert yard.command(agent, "unpin") == (True, "the device follows its channel")
        yard.time.forward(seconds=61)
        agent.tick()
        agent.poll()
        assert agent.active == second


def test_install_what_nobody_released(yard) -> None:
    with yard.started() as agent:
        first = yard.settled(agent, 1)
        done, message = yard.command(agent, "install", "a" * 64)
        assert not done
        assert "nobody who may sign for channel 'stable' signed" in message
        done, message = yard.command(agent, "install", "v2")
        assert "is no version's id" in message
        assert agent.active == first


def test_install_while_the_source_breaks_off(yard, monkeypatch) -> None:
    from federated.device.agent_fetch import Releases
    from federated.errors import Unreachable

    def broken(*_: object) -> None:
        raise Unreachable("cut off")

    yard.publish(1)
    monkeypatch.setattr(Releases, "fetch", broken)
    with yard.started() as agent:
        assert yard.command(agent, "install") == (False, "Unreachable: cut off")


def test_a_pin_holds_against_the_channel_and_against_other_verbs(yard) -> None:
    with yard.started() as agent:
        first = yard.settled(agent, 1)
        assert yard.command(agent, "pin") == (
            True, f"the device stays at {first[:12]}, whatever is released"
        )  # fmt: skip
        second = yard.publish(2)
        assert agent.poll()
        assert (agent.active, yard.state_of(second), yard.book.offered) == (first, None, second)
        for verb, argument in (("install", ""), ("activate", "null")):
            done, message = yard.command(agent, verb, argument)
            assert (done, message.partition(";")[0]) == (False, f"the device is pinned at {first[:12]}")
        assert yard.command(agent, "unpin")[0]
        assert agent.poll()
        assert agent.active == second


def test_pin_something_else(yard) -> None:
    with yard.started() as agent:
        first, second = yard.settled(agent, 1), yard.settled(agent, 2)
        assert yard.command(agent, "pin", first[:8])[0]
        assert (agent.active, yard.book.pinned) == (first, first)
        assert yard.command(agent, "pin", "null")[0]
        assert (agent.active, yard.answer) == (NULL, 0.0)
        agent.poll()
        assert agent.active == NULL
        assert yard.command(agent, "unpin")[0]
        agent.poll()
        assert agent.active == second


def test_a_rollback_ends_a_pin(yard) -> None:
    with yard.started() as agent:
        first, second = yard.settled(agent, 1), yard.settled(agent, 2)
        yard.command(agent, "pin")
        assert yard.command(agent, "rollback", second)[0]
        assert (agent.active, yard.book.pinned) == (first, "")
        agent.poll()
        assert agent.active == first


def test_a_pinned_version_is_left_when_it_is_revoked(yard) -> None:
    with yard.started() as agent:
        first = yard.settled(agent, 1)
        yard.command(agent, "pin")
        yard.publisher.revoke_version(first)
        agent.poll()
        assert agent.active == NULL


@pytest.mark.parametrize(
    "data", [b"", b"{}", b'{"verb": "erase", "version": ""}', b'{"verb": "pin", "version": 3}', b"[]"]
)
def test_a_file_that_is_no_command_is_answered_and_taken_away(yard, mailbox, data) -> None:
    with yard.started() as agent:
        name = mailbox.send("pin")
        (yard.state / "commands" / f"{name}.json").write_bytes(data)
        agent.tick()
        assert (mailbox.waiting(), yard.book.replies[-1].done) == ([], False)
        assert "expected one of install, activate, rollback, pin, unpin" in yard.book.replies[-1].message
    (yard.state / "commands" / f"{mailbox.send('pin')}.json").write_bytes(data)
    with yard.started():
        assert mailbox.waiting() == []


def test_other_files_are_passed_over(yard, mailbox) -> None:
    mailbox.send("pin")
    (yard.state / "commands" / "notes.json").write_bytes(b"{}")
    with yard.started() as agent:
        agent.tick()
    assert (yard.state / "commands" / "notes.json").exists()


def test_commands_are_carried_out_in_their_order(mailbox) -> None:
    names = [mailbox.send("pin", now=lambda: 5), mailbox.send("pin", now=lambda: 10**18), mailbox.send("pin")]
    assert mailbox.waiting() == names


def test_a_command_that_cannot_be_read_is_answered(yard, mailbox) -> None:
    with yard.started() as agent:
        name = mailbox.send("pin")
        path = yard.state / "commands" / f"{name}.json"
        path.unlink()
        path.mkdir()
        with pytest.raises(Exception, match="take a command away"):
            agent.tick()
        assert yard.book.replies[-1].name == name
        path.rmdir()
        path.write_bytes(b"")
        agent.tick()
        assert mailbox.waiting() == []


def test_replies_are_bounded(yard) -> None:
    with yard.started() as agent:
        for _ in range(30):
            yard.command(agent, "unpin")
    assert len(yard.book.replies) == 20


def test_bring_up_of_a_version_that_is_not_here(yard) -> None:
    with yard.started() as agent:
        assert not agent._steps.bring_up("a" * 64)
        with pytest.raises(DeviceError, match="is not on this device"):
            agent._steps.switch("b" * 64)


def test_a_version_that_is_set_aside_in_its_probation_begins_anew(yard) -> None:
    with yard.started() as agent:
        first = yard.settled(agent, 1)
        second = yard.publish(2)
        agent.poll()
        assert yard.command(agent, "activate", first)[0]
        assert (agent.active, yard.state_of(second)) == (first, "staged")
        assert yard.command(agent, "activate", second) == (True, f"{second[:12]} answers on probation")
        assert yard.command(agent, "activate", second) == (True, f"{second[:12]} answers on probation")
