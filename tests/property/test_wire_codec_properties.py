"""Laws of the codec, on arbitrary tensors and arbitrary bytes."""

import math
from contextlib import suppress

from hypothesis import example, given, settings
from hypothesis import strategies as st

from federated.errors import UpdateRejected, WireError
from federated.manifest import DTYPE_BYTES, AdapterSpec, RawTensor, layout_of
from federated.wire import (
    Expectation,
    Limits,
    admit,
    decode_packet,
    decode_tensors,
    encode_packet,
    encode_tensors,
    seal_update,
)

SMALL = Limits(max_bytes=10_000, max_header_bytes=4_000, max_tensors=16)
NAMES = st.text("abcXYZ019_:/-", min_size=1, max_size=6).map("w.{}".format)


@st.composite
def raw_tensors(draw: st.DrawFn) -> RawTensor:
    """Any bits, so every NaN payload, both zeros and all subnormals come up."""
    dtype = draw(st.sampled_from(sorted(DTYPE_BYTES)))
    shape = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    size = math.prod(shape) * DTYPE_BYTES[dtype]
    return RawTensor(dtype, shape, draw(st.binary(min_size=size, max_size=size)))


MAPPINGS = st.dictionaries(NAMES, raw_tensors(), max_size=5)
LEAVES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
HEADERS = st.dictionaries(TEXTS, st.recursive(LEAVES | TEXTS, lambda inner: st.lists(inner, max_size=3)), max_size=4)


@given(MAPPINGS)
@example({"w": RawTensor("BF16", (2,), bytes.fromhex("817fffff"))})  # signalling and quiet NaN payloads
@example({"w": RawTensor("F16", (2,), bytes.fromhex("017cffff"))})
@example({"w": RawTensor("F32", (2,), bytes.fromhex("0100807fffffffff"))})
@settings(max_examples=60, deadline=None)
def test_tensors_come_back_bit_for_bit(tensors: dict[str, RawTensor]) -> None:
    assert decode_tensors(encode_tensors(tensors), SMALL) == tensors


@given(MAPPINGS, st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_one_set_of_tensors_has_one_encoding(tensors: dict[str, RawTensor], random: object) -> None:
    names = sorted(tensors)
    random.shuffle(names)  # type: ignore[attr-defined]
    assert encode_tensors({name: tensors[name] for name in names}) == encode_tensors(tensors)


@given(HEADERS, MAPPINGS)
@settings(max_examples=40, deadline=None)
def test_packets_come_back_whole(header: dict[str, object], tensors: dict[str, RawTensor]) -> None:
    assert decode_packet(encode_packet(header, tensors), SMALL)[:2] == (header, tensors)


@given(st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_arbitrary_bytes_raise_wire_error_or_are_canonical(data: bytes) -> None:
    with suppress(WireError):
        assert encode_tensors(decode_tensors(data, SMALL)) == data


SPEC = AdapterSpec("lora", 1, 1.0, use_rslora=False, modules=())
HONEST = {"a.factor_a": RawTensor("F32", (1, 2), bytes(8)), "b": RawTensor("BF16", (2,), bytes(4))}
EXPECTED = Expectation("run", 1, 1, "client", "token", "parent", "base", SPEC, "plan")
PACKET = seal_update(
    HONEST, run_id="run", client_id="client", round_number=1, phase=1, task_token="token", counter=1,  # noqa: S106
    parent_version="parent", base_digest="base", spec=SPEC, plan_digest="plan", num_examples=5,
)  # fmt: skip
EDITS = st.lists(
    st.tuples(st.integers(0, len(PACKET) - 1), st.sampled_from(["set", "cut", "insert"]), st.binary(max_size=3)),
    min_size=1,
    max_size=4,
)


@given(EDITS)
@settings(max_examples=150, deadline=None)
def test_a_damaged_update_is_admitted_unchanged_or_refused(edits: list[tuple[int, str, bytes]]) -> None:
    damaged = bytearray(PACKET)
    for place, kind, data in edits:
        damaged[place : place + {"set": len(data), "cut": 2, "insert": 0}[kind]] = data
    with suppress(UpdateRejected):
        admitted = admit(bytes(damaged), EXPECTED, layout=layout_of(HONEST), limits=SMALL)
        # what no digest covers in an unsigned envelope may differ: the counter, the examples, the signature
        assert admitted.tensors == HONEST
