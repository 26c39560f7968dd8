"""Channels move by compare-and-set, roll back by their history, and wait for approvals."""

import json

import pytest

from federated.errors import BaseMismatch, ChannelConflict, NotApproved, RegistryError, VersionNotFound
from federated.registry import ANYWHERE


@pytest.fixture
def three(publish):
    ids = [publish(b"0")]
    for number in (1, 2):
        ids.append(publish(str(number).encode(), round_number=number, parent=ids[-1]))
    return ids


@pytest.fixture
def stable(registry, three):
    """The channel, promoted to all three in turn."""
    channel = registry.channel("stable")
    for version_id in three:
        channel.promote(version_id)
    return channel


def test_new_channel_expects_nothing(registry, publish):
    version_id = publish(b"one")
    assert registry.channel("pilot").promote("v0", expected=None).channels == ("pilot",)
    assert registry.channels() == {"pilot": version_id}


@pytest.mark.parametrize("name", ["dev", "canary", "stable"])
def test_the_usual_channels_need_not_be_made(registry, publish, name):
    publish(b"one")
    registry.channel(name).promote("v0")
    assert name in registry.channels()


@pytest.mark.parametrize("do", ["promote", "approve", "rollback"])
def test_a_channel_that_nobody_made_is_a_typing_error(registry, publish, do):
    publish(b"one")
    channel = registry.channel("stabel")
    calls = {
        "promote": lambda: channel.promote("v0"),
        "approve": lambda: channel.approve("v0", name="Ann"),
        "rollback": lambda: channel.rollback(),
    }
    with pytest.raises(RegistryError, match=r"no channel 'stabel'; expected one of canary, dev, stable"):
        calls[do]()


def test_rollback_goes_one_back(registry, stable, three):
    assert stable.rollback().version_id == three[1]
    assert registry.channels() == {"stable": three[1]}
    assert len(registry.versions()) == 3


def test_rollbacks_walk_back_and_never_return(stable, three):
    assert [stable.rollback().version_id for _ in range(2)] == [three[1], three[0]]
    with pytest.raises(RegistryError, match="pointed at nothing else before"):
        stable.rollback()


def test_promoting_after_a_rollback_leaves_out_what_was_rolled_back(stable, three, publish):
    stable.rollback()
    newest = publish(b"3", round_number=3, parent=three[1])
    stable.promote(newest)
    assert stable.rollback().version_id == three[1]
    assert stable.rollback().version_id == three[0]


def test_rollback_to_a_version_skips_those_between(stable, three):
    assert stable.rollback("v0").version_id == three[0]
    with pytest.raises(RegistryError, match="nothing else before"):
        stable.rollback()


def test_rollback_to_where_it_never_was_is_none(stable, publish):
    publish(b"other", round_number=7)
    with pytest.raises(RegistryError, match="is no rollback; promote it"):
        stable.rollback("v7")


def test_rollback_to_where_it_is(stable):
    with pytest.raises(RegistryError, match="already"):
        stable.rollback("v2")


def test_rollback_of_a_channel_that_points_nowhere(registry, publish):
    publish(b"one")
    with pytest.raises(RegistryError, match="points at nothing yet"):
        registry.channel("stable").rollback()


def test_rollback_is_compared_too(stable, three):
    with pytest.raises(ChannelConflict, match="moved meanwhile"):
        stable.rollback(expected=three[0])
    assert stable.rollback(expected=three[2]).version_id == three[1]


def test_history_is_newest_first(stable, three):
    stable.rollback()
    assert [(move.action, move.version_id) for move in stable.history()] == [
        ("rollback", three[1]), ("promote", three[2]), ("promote", three[1]), ("promote", three[0]),
    ]  # fmt: skip
    assert {move.actor for move in stable.history()} == {"unnamed"}


@pytest.mark.parametrize("expected", [None, "c" * 64])
def test_conflict_names_what_was_found(registry, publish, expected):
    version_id = publish(b"one", channel="stable")
    with pytest.raises(ChannelConflict, match=f"points at {version_id}, expected"):
        registry.channel("stable").promote("latest", expected=expected)


def test_conflict_on_a_channel_that_is_not_there(registry, publish):
    publish(b"one")
    with pytest.raises(ChannelConflict, match="points at nothing"):
        registry.channel("stable").promote("latest", expected="c" * 64)


def test_channel_keeps_its_base(registry, publish):
    first = publish(b"one", channel="stable")
    publish(b"two", base_digest="c" * 64, run_id="run-b")
    with pytest.raises(BaseMismatch, match="use another channel"):
        registry.channel("stable").promote("latest", expected=first)
    assert registry.channels() == {"stable": first}


def test_unknown_version(registry):
    with pytest.raises(VersionNotFound):
        registry.channel("stable").promote("v1")


@pytest.mark.parametrize("name", ["Stable!", "../stable", "/stable", "a" * 65])
@pytest.mark.parametrize("expected", [None, ANYWHERE])
def test_malformed_channel(registry, publish, name, expected):
    publish(b"one")
    with pytest.raises(RegistryError, match="no channel name"):
        registry.channel(name).promote("v0", expected=expected)


def test_records_list_their_channels(registry, publish):
    publish(b"one", channel="stable")
    registry.channel("dev").promote("v0", expected=None)
    assert registry.get("v0").channels == ("dev", "stable")


def test_too_few_approvals_are_refused_with_who_approved(registry, three):
    stable = registry.channel("stable")
    stable.require(2)
    with pytest.raises(NotApproved, match=r"requires 2 approvals.* has 0 \(nobody yet\)"):
        stable.promote("v1")
    assert stable.approve("v1", name="Ann") == ["Ann"]
    with pytest.raises(NotApproved, match=r"has 1 \(Ann\); somebody else"):
        stable.promote("v1")
    assert registry.channels() == {}
    assert stable.approve("v1", name="Bob") == ["Ann", "Bob"]
    stable.promote("v1")
    assert json.loads(registry.audit.entries()[-1].details)["approved_by"] == ["Ann", "Bob"]


@pytest.mark.parametrize("again", ["Ann", "ann", " ANN ", "Ann\u00a0"])
def test_the_same_person_counts_once(registry, three, again):
    stable = registry.channel("stable")
    stable.require(2)
    for name in ("Ann", again):
        stable.approve("v1", name=name)
    assert stable.approvers("v1") == ["Ann"]
    with pytest.raises(NotApproved):
        stable.promote("v1")


def test_approvals_are_of_one_version_and_one_channel(registry, three):
    stable = registry.channel("stable")
    stable.require(1)
    stable.approve("v1", name="Ann")
    registry.channel("canary").approve("v2", name="Ann")
    with pytest.raises(NotApproved):
        stable.promote("v2")


@pytest.mark.parametrize("name", ["", " ", "\x1b[31m"])
def test_a_person_has_a_name(registry, three, name):
    with pytest.raises(RegistryError, match="who approves"):
        registry.channel("stable").approve("v1", name=name)


def test_publishing_to_a_channel_that_requires_approvals_is_refused(registry, publish):
    registry.channel("stable").require(1)
    with pytest.raises(NotApproved):
        publish(b"one", channel="stable")
    assert registry.versions() == []


def test_a_rollback_needs_no_approval(registry, stable, three):
    stable.require(2)
    assert stable.rollback().version_id == three[1]


def test_a_requirement_can_be_lifted_and_makes_the_channel(registry, three):
    pilot = registry.channel("pilot")
    pilot.require(1)
    assert [(one.name, one.version_id, one.approvals) for one in registry.channel_states()] == [("pilot", None, 1)]
    pilot.require(0)
    assert pilot.promote("v0").channels == ("pilot",)
    details = [json.loads(entry.details) for entry in registry.audit.entries() if entry.action == "require"]
    assert details == [{"approvals": 1, "before": 0}, {"approvals": 0, "before": 1}]


@pytest.mark.parametrize(
    ("channel", "number", "message"),
    [
        ("stable", -1, "0 to 100"),
        ("stable", 101, "0 to 100"),
        ("dev", 1, "by themselves"),
        ("../x", 1, "no channel name"),
    ],
)
def test_a_requirement_that_makes_no_sense(registry, channel, number, message):
    with pytest.raises(RegistryError, match=message):
        registry.channel(channel).require(number)
