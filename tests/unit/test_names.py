"""What a client and a device may be called."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federated.errors import ConfigError
from federated.names import check_device_name, usable_client_id


@pytest.mark.parametrize("name", ["north", "clinic-north", "partition-0", "a", "A.b_c-1", "x" * 64, "7"])
def test_a_plain_name_is_taken(name: str) -> None:
    assert check_device_name(name) == name
    assert usable_client_id(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        ".",
        "..",
        "../../root",
        "a/b",
        "a\\b",
        "a..b",
        "a.",
        ".hidden",
        "-rf",
        "_a",
        "a b",
        "a\n",
        "a\0",
        "north\u200b",  # a space of no width
        "n\u043erth",  # a Cyrillic o
        "north\u202egpj",  # turns the text around
        "\uff4eorth",  # a wide n
        "nörth",
        "\ud800",
        "x" * 65,
        "x" * 10**6,
    ],
    ids=lambda name: ascii(name[:12]),
)
def test_an_odd_name_is_refused_shortly(name: str) -> None:
    with pytest.raises(ConfigError, match="is no name for a device") as caught:
        check_device_name(name)
    assert len(str(caught.value)) < 400
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()


@given(st.text())
def test_what_is_taken_is_usable_and_one_part_of_a_path(name: str) -> None:
    try:
        check_device_name(name)
    except ConfigError:
        return
    assert usable_client_id(name)
    assert not set(name) & set('/\\:*?"<>|\0')


@pytest.mark.parametrize("name", ["", "a\nb", "a\0", "x" * 201, "\u200b"])
def test_a_client_needs_a_name_that_can_be_shown(name: str) -> None:
    assert not usable_client_id(name)


def test_a_client_that_nobody_enrolled_may_use_its_own_letters() -> None:
    assert usable_client_id("Klinik Nörd")
