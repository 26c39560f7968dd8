import pytest

from federated.errors import BaseMismatch, ChannelConflict, RegistryError, VersionNotFound


def test_new_channel_expects_nothing(registry, publish):
    version_id = publish(b"one")
    assert registry.move_channel("stable", "v0", expected=None).channels == ("stable",)
    assert registry.channels() == {"stable": version_id}


def test_rollback_moves_the_pointer_only(registry, publish):
    first = publish(b"one", channel="stable")
    second = publish(b"two", round_number=1, parent=first, channel="stable")
    registry.move_channel("stable", first, expected=second)
    assert registry.get("stable").version_id == first
    assert len(registry.versions()) == 2


@pytest.mark.parametrize("expected", [None, "c" * 64])
def test_conflict_names_what_was_found(registry, publish, expected):
    version_id = publish(b"one", channel="stable")
    with pytest.raises(ChannelConflict, match=f"points at {version_id}, expected"):
        registry.move_channel("stable", "latest", expected=expected)


def test_conflict_on_a_channel_that_is_not_there(registry, publish):
    publish(b"one")
    with pytest.raises(ChannelConflict, match="points at nothing"):
        registry.move_channel("stable", "latest", expected="c" * 64)


def test_channel_keeps_its_base(registry, publish):
    first = publish(b"one", channel="stable")
    publish(b"two", base_digest="c" * 64, run_id="run-b")
    with pytest.raises(BaseMismatch, match="use another channel"):
        registry.move_channel("stable", "latest", expected=first)
    assert registry.channels() == {"stable": first}


def test_unknown_version(registry):
    with pytest.raises(VersionNotFound):
        registry.move_channel("stable", "v1", expected=None)


def test_malformed_channel(registry, publish):
    publish(b"one")
    with pytest.raises(RegistryError, match="no channel name"):
        registry.move_channel("Stable!", "v0", expected=None)


def test_records_list_their_channels(registry, publish):
    publish(b"one", channel="stable")
    registry.move_channel("dev", "v0", expected=None)
    assert registry.get("v0").channels == ("dev", "stable")
