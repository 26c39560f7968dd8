"""Which entries of a flat array are sent: ascending positions in few bits, in a size that is known beforehand.

``count`` different positions below ``size`` are cut at bit ``l = floor(log2(size / count))`` (Elias 1974, Fano 1971).
The ``l`` low bits of each stand one after the other. Of the high parts, which never fall, the ``i``-th sets bit
``high + i`` of a field of ``count + ((size - 1) >> l)`` bits. That is ``2 + l`` bits or so for a position: 4 where a
quarter is sent, 8 where it is one in 64; a bitmap would need 4 and 64, plain integers 32. Bits are in little-endian
order, and each of the two fields is filled up to whole bytes with zeros.

A receiver knows ``count`` and ``size``, and so the number of bytes. One set of positions has exactly one encoding.
numpy only: `federated.sparse` makes tensors of it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from federated.errors import WireError

__all__ = ["decode_positions", "encode_positions", "positions_bytes"]

Bits = npt.NDArray[np.uint8]


def positions_bytes(count: int, size: int) -> int:
    """Bytes of ``count`` positions below ``size``.

    >>> positions_bytes(250, 1000), positions_bytes(1, 1)
    (126, 1)

    Raises:
        WireError: unless ``1 <= count <= size``.
    """
    return sum((bits + 7) // 8 for bits in _fields(count, size))


def encode_positions(positions: npt.NDArray[np.int64], size: int) -> Bits:
    """Encode positions.

    Args:
        positions: int64 [count], ascending, all different, in ``[0, size)``.
        size: of the array that they point into.

    Returns:
        uint8 [`positions_bytes`].

    Raises:
        WireError: for positions that are not like that.
    """
    _check(positions, size)
    count, low = len(positions), _low_bits(len(positions), size)
    lows = (positions[:, None] >> np.arange(low)) & 1
    marks = np.zeros(_fields(count, size)[1], dtype=np.uint8)
    marks[(positions >> low) + np.arange(count)] = 1
    return np.concatenate([_packed(lows.astype(np.uint8).ravel()), _packed(marks)])


def decode_positions(data: Bits, count: int, size: int) -> npt.NDArray[np.int64]:
    """Decode positions, from anybody.

    Args:
        data: uint8.
        count: how many the receiver expects.
        size: of the array that they point into.

    Returns:
        int64 [count], ascending, all different, in ``[0, size)``.

    Raises:
        WireError: for anything that `encode_positions` would not have written for that count and size.
    """
    low_field, high_field = _fields(count, size)
    start = (low_field + 7) // 8
    if len(data) != positions_bytes(count, size):
        raise WireError(f"{len(data)} bytes of positions; {count} of {size} take {positions_bytes(count, size)}")
    lows, marks = _unpacked(data[:start], low_field), _unpacked(data[start:], high_field)
    ones = np.flatnonzero(marks)
    if len(ones) != count:
        raise WireError(f"{len(ones)} positions; expected {count}")
    low = _low_bits(count, size)
    values = lows.reshape(count, low).astype(np.int64) @ (np.int64(1) << np.arange(low, dtype=np.int64))
    positions: npt.NDArray[np.int64] = ((ones - np.arange(count)) << low) + values
    _check(positions, size)
    return positions


def _low_bits(count: int, size: int) -> int:
    return (size // count).bit_length() - 1


def _fields(count: int, size: int) -> tuple[int, int]:
    """Bits of the two fields."""
    if not 1 <= count <= size:
        raise WireError(f"{count} positions in an array of {size}; expected 1 to {size}")
    low = _low_bits(count, size)
    return count * low, count + ((size - 1) >> low)


def _check(positions: npt.NDArray[np.int64], size: int) -> None:
    if not len(positions) or positions[0] < 0 or positions[-1] >= size:
        raise WireError(f"a position is out of range; expected some in 0 to {size - 1}")
    if not (positions[1:] > positions[:-1]).all():
        raise WireError("positions are repeated or out of order; expected them ascending")


def _packed(bits: Bits) -> Bits:
    return np.packbits(bits, bitorder="little")


def _unpacked(data: Bits, count: int) -> Bits:
    bits = np.unpackbits(data, bitorder="little")
    if bits[count:].any():
        raise WireError("bits beyond the last position are set; expected zeros")
    return bits[:count]
