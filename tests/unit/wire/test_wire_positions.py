"""Positions in few bits: every set has one encoding of a size known beforehand, and nothing else is read."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.errors import WireError
from federated.wire import decode_positions, encode_positions, positions_bytes


@st.composite
def sets(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    size = draw(st.integers(1, 300))
    found = draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size))
    return np.array(sorted(found), dtype=np.int64), size


@given(sets())
@settings(max_examples=150, deadline=None)
def test_positions_come_back_and_take_the_size_that_was_said(drawn: tuple[np.ndarray, int]) -> None:
    positions, size = drawn
    data = encode_positions(positions, size)
    assert data.dtype == np.uint8
    assert len(data) == positions_bytes(len(positions), size)
    assert decode_positions(data, len(positions), size).tolist() == positions.tolist()


@given(st.binary(min_size=1, max_size=12), st.integers(1, 20), st.integers(1, 60))
@settings(max_examples=300, deadline=None)
def test_whatever_is_read_would_have_been_written_so(data: bytes, count: int, size: int) -> None:
    bits = np.frombuffer(data, dtype=np.uint8)
    try:
        positions = decode_positions(bits, count, size)
    except WireError:
        return
    assert encode_positions(positions, size).tobytes() == data


@pytest.mark.parametrize(("share", "bits"), [(1 / 2, 3), (1 / 4, 4), (1 / 16, 6), (1 / 64, 8)])
def test_a_position_takes_few_bits(share: float, bits: float) -> None:
    size = 2**16
    count = int(share * size)
    assert positions_bytes(count, size) * 8 / count == pytest.approx(bits, abs=0.02)
    assert bits <= 2 + math.log2(1 / share)


def encoded(*positions: int, size: int = 16) -> np.ndarray:
    return encode_positions(np.array(positions, dtype=np.int64), size)


def forged(lows: list[int], marks: list[int]) -> np.ndarray:
    """Two of 16 positions: three low bits of each, then four bits of high parts."""
    low = [value >> bit & 1 for value in lows for bit in range(3)]
    high = [int(index in marks) for index in range(3)]
    return np.concatenate([np.packbits(np.array(part, dtype=np.uint8), bitorder="little") for part in (low, high)])


def test_forged_bits_can_be_right() -> None:
    assert decode_positions(forged([3, 5], [0, 2]), 2, 16).tolist() == [3, 13]
    assert forged([3, 5], [0, 2]).tolist() == encoded(3, 13).tolist()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (forged([3, 3], [0, 1]), "repeated or out of order"),
        (forged([5, 3], [0, 1]), "repeated or out of order"),
        (forged([3, 5], [0]), "1 positions; expected 2"),
        (forged([3, 5], [0, 1, 2]), "3 positions; expected 2"),
        (encoded(3, 13)[:1], "1 bytes of positions; 2 of 16 take 2"),
        (np.append(encoded(3, 13), np.uint8(0)), "3 bytes of positions"),
        (encoded(3, 13) | np.array([0x80, 0], dtype=np.uint8), "bits beyond the last position"),
        (encoded(3, 13) | np.array([0, 0x80], dtype=np.uint8), "bits beyond the last position"),
    ],
    ids=[
        "repeated",
        "out of order",
        "too few",
        "too many",
        "short",
        "long",
        "padding of the low",
        "padding of the high",
    ],
)
def test_positions_that_nobody_would_write_are_refused(data: np.ndarray, message: str) -> None:
    with pytest.raises(WireError, match=message):
        decode_positions(data, 2, 16)


def test_a_position_out_of_range_is_refused() -> None:
    with pytest.raises(WireError, match="out of range; expected some in 0 to 12"):
        decode_positions(encoded(3, 13, size=14), 2, 13)


@pytest.mark.parametrize("positions", [[], [-1], [16], [3, 3], [5, 3]])
def test_positions_that_cannot_be_sent(positions: list[int]) -> None:
    with pytest.raises(WireError):
        encode_positions(np.array(positions, dtype=np.int64), 16)


@pytest.mark.parametrize(("count", "size"), [(0, 5), (6, 5), (-1, 5), (1, 0)])
def test_counts_that_no_array_has(count: int, size: int) -> None:
    with pytest.raises(WireError, match="positions in an array of"):
        positions_bytes(count, size)
