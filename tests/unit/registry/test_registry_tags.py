from datetime import UTC, datetime, timedelta, timezone

import pytest

from federated.errors import RegistryError, VersionNotFound


def test_a_tag_names_its_version_for_good(registry, publish):
    first = publish(b"one", channel="dev")
    registry.tag("dev", "Release-1.0")
    publish(b"two", round_number=1, channel="dev")
    assert registry.get("Release-1.0").version_id == first
    assert registry.get("v0").tags == ("Release-1.0",)
    assert registry.tags() == {"Release-1.0": first}


def test_a_tag_does_not_move(registry, publish):
    publish(b"one")
    publish(b"two", round_number=1)
    registry.tag("v0", "keep")
    with pytest.raises(RegistryError, match="does not move; choose another name, or remove it first"):
        registry.tag("v1", "keep")


def test_a_channel_is_no_tag(registry, publish):
    publish(b"one", channel="pilot")
    with pytest.raises(RegistryError, match="is a channel"):
        registry.tag("v0", "pilot")


@pytest.mark.parametrize(
    "name", ["", "a b", "-x", "..", "a..b", "../x", "/etc", "a/b", "x" * 65, "latest", "null", "v3", "V3", "ABCDEF12"]
)
def test_bad_tag_is_refused(registry, publish, name):
    publish(b"one")
    with pytest.raises(RegistryError, match="tag"):
        registry.tag("v0", name)
    assert registry.tags() == {}


def test_removed_tag_is_gone(registry, publish):
    publish(b"one")
    registry.tag("v0", "keep")
    registry.untag("keep")
    with pytest.raises(VersionNotFound):
        registry.get("keep")
    with pytest.raises(RegistryError, match="no tag 'keep'; the tags are: none"):
        registry.untag("keep")


NOON = datetime(2026, 2, 1, 12, tzinfo=UTC)


def test_device_reports_keep_first_and_last(registry, publish):
    version_id = publish(b"one")
    for hours in (1, 0, 3, 2):
        registry.devices.report("pump 7", "v0", at=NOON + timedelta(hours=hours))
    (holding,) = registry.devices.holdings()
    assert (holding.device_id, holding.version_id) == ("pump 7", version_id)
    assert (holding.first_at, holding.last_at) == (NOON, NOON + timedelta(hours=3))
    assert [entry.action for entry in registry.audit.entries()].count("device") == 4


def test_a_device_s_last_holding_is_what_it_holds(registry, publish):
    first, second = publish(b"one"), publish(b"two", round_number=1)
    registry.devices.report("a", second, at=NOON + timedelta(days=1))
    registry.devices.report("a", first, at=NOON)
    registry.devices.report("b", first, at=NOON)
    assert [one.version_id for one in registry.devices.holdings("a")] == [first, second]
    assert len(registry.devices.holdings()) == 3


def test_times_of_any_zone_are_one_time(registry, publish):
    publish(b"one")
    registry.devices.report("a", "v0", at=NOON.astimezone(timezone(timedelta(hours=9))))
    assert registry.devices.holdings()[0].first_at == NOON


@pytest.mark.parametrize(("device", "at"), [("", NOON), ("a\nb", NOON), ("a", datetime(2026, 1, 1))])
def test_bad_report_is_refused(registry, publish, device, at):
    publish(b"one")
    with pytest.raises(RegistryError, match=r"device"):
        registry.devices.report(device, "v0", at=at)
    assert registry.devices.holdings() == []


def test_report_of_an_unknown_version(registry):
    with pytest.raises(VersionNotFound):
        registry.devices.report("a", "v0", at=NOON)
