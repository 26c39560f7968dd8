import pytest

from federated.errors import RegistryError, VersionNotFound
from federated.registry.names import check_channel_name


def test_latest_is_the_newest_published(registry, publish):
    publish(b"one", round_number=5)
    newest = publish(b"two", round_number=1)
    assert registry.get("latest").version_id == newest


def test_number_is_the_round_of_the_newest_run(registry, publish):
    publish(b"one", round_number=1)
    publish(b"two", round_number=1, run_id="run-b")
    publish(b"three", round_number=2)
    assert registry.get("v1").manifest.run_id == "run-b"


def test_number_of_a_named_run(registry, publish):
    wanted = publish(b"one", round_number=1)
    publish(b"two", round_number=1, run_id="run-b")
    assert registry.get("run-a:v1").version_id == wanted


def test_run_id_with_a_colon(registry, publish):
    wanted = publish(b"one", run_id="a:v2")
    assert registry.get("a:v2:v0").version_id == wanted


def test_newest_of_two_with_one_number_wins(registry, publish):
    publish(b"one", round_number=1)
    again = publish(b"two", round_number=1)
    assert registry.get("v1").version_id == again


def test_id_and_its_beginning_in_any_case(registry, publish):
    version_id = publish(b"one")
    names = [version_id, version_id[:6], version_id[:10].upper()]
    assert {registry.get(name).version_id for name in names} == {version_id}


def test_ambiguous_beginning_is_refused(registry, publish, monkeypatch):
    import re

    from federated.registry import names

    monkeypatch.setattr(names, "_PREFIX", re.compile("[0-9a-f]{1,64}"))
    ids = [publish(bytes([number]), round_number=number) for number in range(17)]
    twice = next(one[0] for one in ids if sum(other[0] == one[0] for other in ids) > 1)
    with pytest.raises(VersionNotFound, match="more than one"):
        registry.get(twice)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9", "run run-a has no v9; it has v0 to v0"),
        ("run-z:v1", "there is no run 'run-z'"),
        ("ffffffffff", "no version's id begins with"),
        ("stable", r"a channel \(dev\)"),
        ("abcd", "no version is named 'abcd'"),
        ("", "at least 6 hexadecimal"),
        ("../../etc", "no version is named"),
        ("v99999999999999999999", "no version is named"),
        ("\ud800:v1", "no version is named"),
        ("v\u0663", "no version is named"),
    ],
)
def test_unknown_name_says_what_there_is(registry, publish, name, message):
    publish(b"one", channel="dev")
    with pytest.raises(VersionNotFound, match=message):
        registry.get(name)


@pytest.mark.parametrize("name", ["latest", "v1", "run-a:v1"])
def test_empty_registry_says_so(registry, name):
    with pytest.raises(VersionNotFound, match="holds no versions yet"):
        registry.get(name)


def test_unknown_channel_in_a_registry_without_channels(registry):
    with pytest.raises(VersionNotFound, match="none yet"):
        registry.weights("stable")


@pytest.mark.parametrize("name", ["", "Dev", "a b", "-x", "a" * 65, "dev\n", "latest", "v3", "abcdef12"])
def test_bad_channel_name_is_refused(name):
    with pytest.raises(RegistryError, match="channel"):
        check_channel_name(name)


@pytest.mark.parametrize("name", ["dev", "canary-2", "0", "vnext", "cafe"])
def test_good_channel_name_moves(registry, publish, name):
    version_id = publish(b"one", channel=name)
    assert registry.get(name).version_id == version_id
