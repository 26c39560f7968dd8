"""Whole numbers as bytes that compress well, and back: bytes sorted by their place, signs folded, bits packed.

Numbers are little-endian whatever the machine. Nothing here is lossy or trusts a length: `unshuffled` and `unpacked`
are given bytes that `federated.release.frame` has counted. Called by the codecs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "folded",
    "ordered",
    "packed",
    "packed_size",
    "shuffled",
    "sliced",
    "sliced_size",
    "unfolded",
    "unordered",
    "unpacked",
    "unshuffled",
    "unsliced",
]

Numbers = npt.NDArray[Any]


def shuffled(numbers: Numbers) -> bytes:
    """The first bytes of all numbers, then the second ones: equal exponents lie side by side."""
    width = numbers.dtype.itemsize
    little = np.ascontiguousarray(numbers, dtype=numbers.dtype.newbyteorder("<"))
    return little.view(np.uint8).reshape(-1, width).T.tobytes()


def unshuffled(data: bytes | memoryview, width: int) -> Numbers:
    """The reverse: unsigned numbers of ``width`` bytes."""
    rows = np.frombuffer(data, dtype=np.uint8).reshape(width, -1)
    return np.ascontiguousarray(rows.T).view(f"<u{width}").reshape(-1)


def ordered(bits: Numbers) -> Numbers:
    """A float's bits as an unsigned number that grows with the float, so that near floats are near numbers."""
    top = _top(bits)
    return np.where(bits & top, ~bits, bits | top)


def unordered(numbers: Numbers) -> Numbers:
    """The reverse of `ordered`."""
    top = _top(numbers)
    return np.where(numbers & top, numbers ^ top, ~numbers)


def folded(numbers: Numbers) -> Numbers:
    """Differences modulo 2**n as small numbers (zig-zag): 0, -1, 1, -2 ... become 0, 1, 2, 3 ...

    Args:
        numbers: unsigned, any width.
    """
    shift = 8 * numbers.dtype.itemsize - 1
    return (numbers << 1) ^ (-(numbers >> shift))


def unfolded(numbers: Numbers) -> Numbers:
    """The reverse of `folded`."""
    return (numbers >> 1) ^ (-(numbers & 1))


def packed_size(count: int, bits: int) -> int:
    """Bytes of ``count`` packed codes."""
    return -(-count * bits // 8)


def packed(codes: npt.NDArray[np.uint8], bits: int) -> bytes:
    """Codes below 2**bits, several to a byte, the first in the lowest bits.

    Args:
        codes: one to a byte.
        bits: 1, 2, 4 or 8.
    """
    per = 8 // bits
    rows = np.zeros((packed_size(codes.size, bits), per), dtype=np.uint8)
    rows.reshape(-1)[: codes.size] = codes
    made = np.zeros(len(rows), dtype=np.uint8)
    for place in range(per):
        made |= rows[:, place] << (place * bits)
    return made.tobytes()


def unpacked(data: bytes | memoryview, count: int, bits: int) -> npt.NDArray[np.uint8]:
    """The reverse of `packed`: the first ``count`` codes."""
    whole = np.frombuffer(data, dtype=np.uint8)
    places = np.arange(0, 8, bits, dtype=np.uint8)
    return ((whole[:, None] >> places) & np.uint8(2**bits - 1)).reshape(-1)[:count]


def sliced_size(count: int) -> int:
    """Bytes of ``count`` sliced numbers."""
    return 8 * packed_size(count, 1)


def sliced(numbers: npt.NDArray[np.uint8]) -> bytes:
    """The highest bits of all numbers, then the next ones: where most are small, most bytes are zero."""
    return b"".join(np.packbits((numbers >> place) & 1).tobytes() for place in range(7, -1, -1))


def unsliced(data: bytes | memoryview, count: int) -> npt.NDArray[np.uint8]:
    """The reverse of `sliced`."""
    made = np.zeros(count, dtype=np.uint8)
    for row in np.frombuffer(data, dtype=np.uint8).reshape(8, -1):
        made = (made << np.uint8(1)) | np.unpackbits(row, count=count)
    return made


def _top(numbers: Numbers) -> Any:
    return numbers.dtype.type(1 << (8 * numbers.dtype.itemsize - 1))
