"""One line of text: what is made is read, and nothing else is."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federated.deployment.invitations import Invitation, check_door, decoded, encoded, new_token, parse_invitation
from federated.errors import ConfigError, DeploymentError

TOKEN = bytes(range(32))
MADE = Invitation("https://door.example.org:8443", "north", TOKEN, "ab" * 32, datetime(2026, 5, 1, 12, tzinfo=UTC))


def line(**changed: Any) -> str:
    fields = json.loads(decoded(MADE.text.removeprefix("fedpeft1.")))
    fields |= changed
    kept = {key: value for key, value in fields.items() if value is not ...}
    return "fedpeft1." + encoded(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode())


def test_what_is_made_is_read() -> None:
    assert parse_invitation(MADE.text) == MADE
    assert parse_invitation(f"  {MADE.text}\n") == MADE


def test_it_is_one_word_of_ascii() -> None:
    assert MADE.text.isascii()
    assert len(MADE.text.split()) == 1
    assert len(MADE.text) < 500


def test_the_token_is_not_shown_by_accident() -> None:
    assert "token" not in repr(MADE)
    assert encoded(TOKEN) not in f"{MADE!r} {MADE}"


def test_tokens_are_new_each_time() -> None:
    tokens = {new_token() for _ in range(50)}
    assert len(tokens) == 50
    assert {len(token) for token in tokens} == {32}


@pytest.mark.parametrize(
    "changed",
    [
        {"door": "http://door.example.org"},
        {"door": "https://user:word@door.example.org"},
        {"door": "https://door.example.org/elsewhere"},
        {"door": 7},
        {"door": ...},
        {"client_id": "../../root"},
        {"client_id": ""},
        {"client_id": None},
        {"client_id": "n\u043erth"},
        {"client_id": "x" * 65},
        {"token": encoded(TOKEN[:31])},
        {"token": encoded(TOKEN) + "="},
        {"token": "!" * 43},
        {"token": encoded(TOKEN)[:-1] + "9"},  # the same bytes by another spelling
        {"ca_sha256": "AB" * 32},
        {"ca_sha256": "ab" * 31},
        {"ca_sha256": "ab" * 32 + "\n"},
        {"expires": "1777636800"},
        {"expires": 1777636800.0},
        {"expires": True},
        {"expires": -1},
        {"expires": 10**30},
        {"more": 1},
        {"auto_approve": True},
    ],
    ids=str,
)
def test_what_is_changed_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(DeploymentError, match="this is no invitation"):
        parse_invitation(line(**changed))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fedpeft1.",
        "fedpeft2." + MADE.text.removeprefix("fedpeft1."),
        MADE.text[:-1],
        MADE.text[:50] + " " + MADE.text[50:],
        MADE.text + "=",
        MADE.text + MADE.text,
        "fedpeft1." + encoded(b"[]"),
        "fedpeft1." + encoded(b"null"),
        "fedpeft1." + encoded(b"[" * 1000),
        "fedpeft1." + encoded(b"\xff" * 100),
        "fedpeft1." + base64.b64encode(b"{}").decode(),
        "fedpeft1." + "A" * 10**6,
        "\ud800",
        "fedpeft1.\u0410\u0410",
        " " * 10**6,
    ],
    ids=lambda text: f"{text[:12]!a} {len(text)}",
)
def test_other_texts_are_refused_shortly(text: str) -> None:
    with pytest.raises(DeploymentError, match="this is no invitation") as caught:
        parse_invitation(text)
    assert len(str(caught.value)) < 250


def test_a_field_that_is_given_twice_is_refused() -> None:
    """Two readers could take different ones."""
    body = decoded(MADE.text.removeprefix("fedpeft1."))
    twice = body[:-1] + b',"client_id":"north"}'
    with pytest.raises(DeploymentError, match="this is no invitation"):
        parse_invitation("fedpeft1." + encoded(twice))


@given(st.text(max_size=300) | st.binary(max_size=300).map(encoded).map("fedpeft1.".__add__))
def test_no_text_breaks_the_reader(text: str) -> None:
    with pytest.raises(DeploymentError):
        parse_invitation(text)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://a", "https://a"),
        ("https://a/", "https://a"),
        ("https://a:443", "https://a"),
        ("https://a:443/", "https://a"),
        ("https://A.b:8443", "https://a.b:8443"),
        ("https://127.0.0.1:1", "https://127.0.0.1:1"),
        ("https://[::1]:8443", "https://[::1]:8443"),
    ],
)
def test_a_door_has_one_spelling(url: str, expected: str) -> None:
    assert check_door(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        "a",
        "http://a",
        "https://",
        "https://:8443",
        "https://a:port",
        "https://a:99999",
        "https://a:",
        "https://a/x",
        "https://a?x",
        "https://a#x",
        "https://a?",
        "https://u@a",
        "https://a b",
        "https://a\n",
        "https://\u0430",
        "https://[::1",
        "https://a%00",
        "file:///etc/passwd",
        "https://a//",
        "https://" + "a" * 10**6,
    ],
    ids=lambda url: ascii(url[:20]),
)
def test_what_is_no_door_is_refused_shortly(url: str) -> None:
    with pytest.raises(ConfigError, match="is no address of a door") as caught:
        check_door(url)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["A", "AB", "AA==", "A A", "AA\n", "+/", "\u0410\u0410", "AA="])
def test_bytes_have_one_spelling(text: str) -> None:
    assert decoded("AA") == b"\0"
    with pytest.raises(ValueError, match="base64url"):
        decoded(text)
