"""Tokens as text: whole characters, all of the text, nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federated.device.streaming import Detokenizer, StopTexts, TextStream


def decode(ids: Sequence[int]) -> str:
    """Tokens are bytes."""
    return bytes(ids).decode("utf-8", errors="replace")


@given(st.text(max_size=40))
def test_all_pieces_are_the_text_and_no_piece_is_half_a_character(text: str) -> None:
    stream = Detokenizer(decode)
    pieces = [stream.add(one) for one in text.encode()]
    assert "".join(pieces) + stream.rest() == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(st.binary(max_size=60))
def test_bytes_that_are_no_text_arrive_as_they_decode(data: bytes) -> None:
    stream = Detokenizer(decode)
    pieces = [stream.add(one) for one in data]
    assert "".join(pieces) + stream.rest() == decode(data)


def test_a_character_is_given_out_once_it_is_whole() -> None:
    stream = Detokenizer(decode)
    assert [stream.add(one) for one in "aé€!".encode()] == ["a", "", "é", "", "", "€", "!"]


def test_spaces_between_words_depend_on_neighbours() -> None:
    """As in tokenizers that drop the space in front of the first word."""
    words = ["one", "two", "three"]
    stream = Detokenizer(lambda ids: " ".join(words[one] for one in ids))
    assert [stream.add(one) for one in (0, 1, 2)] == ["one", " two", " three"]


@given(st.text(alphabet="ab", max_size=30), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop_text(text: str, stops: list[str]) -> None:
    stream, made, stopped = StopTexts(stops), "", False
    for letter in text:
        piece, stopped = stream.add(letter)
        made += piece
        if stopped:
            break
    else:
        made += stream.rest()
    # letter by letter the stop text that is complete first wins, and of those that end together the longest
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    assert stopped == bool(ends)
    assert made == (text[: min(ends)[0] + min(ends)[1]] if ends else text)


def test_what_may_be_a_stop_text_is_kept_back() -> None:
    stream = StopTexts(["\nuser:"])
    assert [stream.add(piece) for piece in ("hello\n", "us", "a", "b\nuser", ": x")] == [
        ("hello", False), ("", False), ("\nusa", False), ("b", False), ("", True)
    ]  # fmt: skip


@pytest.mark.parametrize("last", [True, False])
def test_the_end_gives_out_what_was_kept_back(last: bool) -> None:
    stream = TextStream(decode, ["END"])
    pieces = [stream.add(one)[0] for one in b"go EN"]
    if last:
        pieces.append(stream.add(0xC3, last=True)[0])
    else:
        stream.add(0xC3)
        pieces.append(stream.end())
    assert "".join(pieces) == "go EN\ufffd"


def test_a_stop_text_in_the_last_token_still_ends_the_text() -> None:
    stream = TextStream(decode, ["b"])
    assert stream.add(ord("a")) == ("a", False)
    assert stream.add(ord("b"), last=True) == ("", True)


def test_a_stop_text_that_is_completed_at_the_end_is_left_out() -> None:
    stream = TextStream(decode, ["\ufffd"])
    assert stream.add(0xC3) == ("", False)
    assert stream.end() == ""
