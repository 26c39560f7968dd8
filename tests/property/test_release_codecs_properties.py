"""Laws of the release's codecs, on arbitrary weights and arbitrary bytes."""

import math
from contextlib import suppress

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.errors import UntrustedRelease
from federated.manifest import DTYPE_BYTES, RawTensor, sha256_hex
from federated.release import planes
from federated.release.codecs import DIFFS, FULL, LOSSLESS, TWINS, decode, encode, twin
from federated.wire import Limits, decode_tensors, encode_tensors

SMALL = Limits(max_bytes=20_000, max_header_bytes=4_000, max_tensors=8)
NAMES = st.text("abcXYZ01", min_size=1, max_size=4)
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, tuple[str, tuple[int, ...]]]:
    shapes = st.lists(st.integers(1, 9), max_size=3).map(tuple)
    return draw(st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), shapes), max_size=4))


@st.composite
def pairs(draw: st.DrawFn, *, finite: bool) -> tuple[bytes, bytes]:
    """Two weights of one layout, of any bits or of ordinary numbers."""
    layout = draw(layouts())
    return tuple(
        encode_tensors({name: draw(_tensor(dtype, shape, finite)) for name, (dtype, shape) in layout.items()})
        for _ in range(2)
    )


def _tensor(dtype: str, shape: tuple[int, ...], finite: bool) -> st.SearchStrategy[RawTensor]:
    size = math.prod(shape)
    if not finite or dtype in ("U8", "I64", "F64"):
        nbytes = size * DTYPE_BYTES[dtype]
        return st.binary(min_size=nbytes, max_size=nbytes).map(lambda data: RawTensor(dtype, shape, data))
    numbers = st.lists(st.floats(-1e4, 1e4, width=32), min_size=size, max_size=size)
    if dtype == "BF16":
        return numbers.map(lambda row: RawTensor(dtype, shape, (_bits(row) >> 16).astype("<u2").tobytes()))
    kind = np.float16 if dtype == "F16" else np.float32
    return numbers.map(lambda row: RawTensor.from_array(np.array(row, dtype=kind).reshape(shape)))


def _bits(row: list[float]) -> np.ndarray:
    return np.array(row, dtype=np.float32).view(np.uint32)


@given(pairs(finite=False))
@settings(max_examples=60, deadline=None)
def test_lossless_codecs_keep_every_bit(pair: tuple[bytes, bytes]) -> None:
    weights, held = pair
    assert decode(encode(weights, "lossless").data, limits=SMALL) == weights
    assert decode(encode(weights, "diff", held).data, held, limits=SMALL) == weights


@given(pairs(finite=True), st.sampled_from([*FULL, *DIFFS]))
@settings(max_examples=120, deadline=None)
def test_a_device_gets_what_the_publisher_says(pair: tuple[bytes, bytes], codec: str) -> None:
    weights, held = pair
    made = encode(weights, codec, held if codec in DIFFS else None)
    assert decode(made.data, held if codec in DIFFS else None, limits=SMALL) == made.weights
    assert decode_tensors(made.weights).keys() == decode_tensors(weights).keys()
    if codec in LOSSLESS:
        assert made.weights == weights
    if codec in TWINS:
        full = twin(made, held)
        assert decode(full.data, limits=SMALL) == made.weights


@given(pairs(finite=True), st.sampled_from(["int8", "int4"]))
@settings(max_examples=60, deadline=None)
def test_a_recode_leads_from_anywhere_to_the_full_file(pair: tuple[bytes, bytes], codec: str) -> None:
    weights, held = pair
    assert encode(weights, f"recode-{codec}", held).weights == encode(weights, codec).weights


@given(st.sampled_from([1, 2, 4, 8]), st.data())
@settings(max_examples=60, deadline=None)
def test_rows_of_numbers_come_back(width: int, data: st.DataObject) -> None:
    row = np.frombuffer(
        data.draw(st.binary(max_size=80).map(lambda raw: raw[: len(raw) // width * width])), f"<u{width}"
    )
    for there, back in ((planes.folded, planes.unfolded), (planes.ordered, planes.unordered)):
        np.testing.assert_array_equal(back(there(row)), row)
    np.testing.assert_array_equal(planes.unshuffled(planes.shuffled(row), width), row)


@given(st.sampled_from([1, 2, 4, 8]), st.data())
@settings(max_examples=60, deadline=None)
def test_packed_codes_come_back(bits: int, data: st.DataObject) -> None:
    codes = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40)), dtype=np.uint8)
    packed = planes.packed(codes, bits)
    assert len(packed) == planes.packed_size(codes.size, bits)
    np.testing.assert_array_equal(planes.unpacked(packed, codes.size, bits), codes)
    sliced = planes.sliced(codes)
    assert len(sliced) == planes.sliced_size(codes.size)
    np.testing.assert_array_equal(planes.unsliced(sliced, codes.size), codes)


@given(st.lists(st.floats(allow_nan=False, width=32), min_size=2, max_size=2))
def test_ordered_bits_are_in_the_order_of_floats(values: list[float]) -> None:
    low, high = sorted(values)
    keys = planes.ordered(np.array([low, high], dtype=np.float32).view(np.uint32))
    assert keys[0] < keys[1] or low == high


WEIGHTS = encode_tensors(
    {
        "a": RawTensor.from_array(np.linspace(-1, 1, 70, dtype=np.float32)),
        "n": RawTensor.from_array(np.arange(3)),
    }
)
HELD = encode_tensors(
    {
        "a": RawTensor.from_array(np.linspace(-1, 2, 70, dtype=np.float32)),
        "n": RawTensor.from_array(np.arange(3) * 7),
    }
)
FILES = [encode(WEIGHTS, codec, HELD if codec in DIFFS else None) for codec in (*FULL, *DIFFS)]


@given(st.binary(max_size=200))
@settings(max_examples=80, deadline=None)
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    for start in (b"", b"FPRC\x01\x00", FILES[0].data[:10]):
        with suppress(UntrustedRelease):
            raise AssertionError(decode(start + data, HELD, limits=SMALL))


@given(
    st.sampled_from(FILES),
    st.lists(
        st.tuples(st.floats(0, 1), st.sampled_from(["set", "cut", "insert"]), st.binary(max_size=3)),
        min_size=1,
        max_size=3,
    ),
)
@settings(max_examples=300, deadline=None)
def test_edited_files_are_refused_or_give_what_was_signed(file: object, edits: list[tuple[float, str, bytes]]) -> None:
    data = file.data
    for place, kind, new in edits:
        at = int(place * len(data))
        data = data[:at] + (b"" if kind == "cut" else new) + data[at + (0 if kind == "insert" else len(new)) :]
    with suppress(UntrustedRelease):
        assert sha256_hex(decode(data, HELD if file.source else None, limits=SMALL)) == file.result
