"""Names and plans: what cannot be is refused before a key is made."""

import pytest

from federated.errors import ReleaseError
from federated.release import Plan, Quorum
from federated.release.roles import channel_of, check_channel, check_file, group_of


@pytest.mark.parametrize("name", ["dev", "canary", "stable", "support-stable", "a", "x" * 64, "0day", "face"])
def test_channels(name: str) -> None:
    check_channel(name)
    assert channel_of(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "Dev", "a b", "a.b", "../a", "-a", "x" * 65, "root", "targets", "snapshot", "timestamp", "v3", "latest",
     "null", "deadbeef", "stable\n"],
)  # fmt: skip
def test_no_channels(name: str) -> None:
    with pytest.raises(ReleaseError, match="cannot name a channel"):
        check_channel(name)


@pytest.mark.parametrize("name", ["int8.safetensors", "diff-from_3.bin", "A", "probes.json"])
def test_files(name: str) -> None:
    check_file(name)


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "a..b", "a\\b", "x" * 101, "a\n", "ä"])
def test_no_files(name: str) -> None:
    with pytest.raises(ReleaseError, match="cannot name a file"):
        check_file(name)


def test_a_bin_belongs_to_its_channel() -> None:
    assert channel_of("stable.bin-3f") == "stable"


@pytest.mark.parametrize(
    ("role", "group"), [("root", "root"), ("targets", "targets"), ("snapshot", "online"), ("dev", "channels/dev")]
)
def test_keys_that_belong_together_lie_together(role: str, group: str) -> None:
    assert group_of(role) == group


@pytest.mark.parametrize(("threshold", "keys"), [(0, 1), (2, 1), (1, 33)])
def test_no_quorum(threshold: int, keys: int) -> None:
    with pytest.raises(ReleaseError, match=f"{threshold} of {keys} signatures; expected"):
        Quorum(threshold, keys)


def test_plan_by_default() -> None:
    plan = Plan()
    assert (plan.quorum("root"), plan.quorum("stable")) == (Quorum(2, 3), Quorum(1, 1))
    assert [plan.days_of(role) for role in ("root", "targets", "stable", "snapshot", "timestamp")] == [
        365,
        180,
        90,
        14,
        3,
    ]


def test_plan_by_choice() -> None:
    plan = Plan(("live",), {"root": Quorum(1, 1), "live": Quorum(2, 2)}, {"live": 7})
    assert (plan.quorum("root"), plan.quorum("live"), plan.days_of("live")) == (Quorum(1, 1), Quorum(2, 2), 7)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"channels": ()}, "expected each once of root"),
        ({"channels": ("dev", "dev")}, "expected each once of root"),
        ({"channels": ("Dev",)}, "cannot name a channel"),
        ({"days": {"beta": 3}}, r"no role \['beta'\]"),
        ({"quorums": {"beta": Quorum()}}, r"no role \['beta'\]"),
        ({"days": {"root": 0}}, "at least one day"),
        ({"bins_past": -1}, "at least 0 files"),
        ({"bins": 1}, "1 hash bins; expected a power of two"),
        ({"bins": 100}, "100 hash bins; expected a power of two"),
        ({"bins": 2**21}, "hash bins; expected a power of two"),
    ],
)
def test_no_plan(wrong: dict, message: str) -> None:
    with pytest.raises(ReleaseError, match=message):
        Plan(**wrong)
