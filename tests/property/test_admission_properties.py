"""Whatever arrives, admission gives an update that was asked for or a refusal with a code, and nothing else."""

import json
import struct
import tracemalloc
from dataclasses import replace
from typing import Any

from hypothesis import event, given, settings
from hypothesis import strategies as st

from federated.errors import UpdateRejected
from federated.manifest import canonical_json
from federated.wire import REASONS, Admitted, Expectation, admit, encode_tensors
from federated.wire.signing import SIGNED_PREFIX, sign_envelope
from simulations import fuzz_admission as tool

PAYLOAD = encode_tensors(tool.TENSORS)
HEADER: dict[str, Any] = json.loads(canonical_json(sign_envelope(tool.envelope_of(PAYLOAD), tool.KEY).to_dict()))
ENTRIES: dict[str, Any] = json.loads(PAYLOAD[8 : 8 + struct.unpack_from("<Q", PAYLOAD)[0]])
DATA = PAYLOAD[-sum(one.nbytes for one in tool.LAYOUT) :]
EXPECTED = st.sampled_from([tool.SIGNED, tool.UNSIGNED])

LEAVES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=20)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def written(value: Any) -> bytes:
    """As an attacker writes it: sorted, but whatever is in it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def packed(header: bytes, payload: bytes) -> bytes:
    return struct.pack("<4sHI", b"FPFT", 1, len(header)) + header + payload


def signed(header: dict[str, Any]) -> dict[str, Any]:
    """What a hostile device that is enrolled makes of any header: its signature fits."""
    rest = {name: value for name, value in header.items() if name != "signature"}
    return {**header, "signature": tool.KEY.sign(SIGNED_PREFIX + written(rest)).hex()}


def judged(data: bytes, expected: Expectation) -> Admitted | str:
    """Admitted, or the code of a refusal that is fit to be shown; any other exception fails the test."""
    try:
        admitted = admit(data, expected, layout=tool.LAYOUT, limits=tool.LIMITS)
    except UpdateRejected as error:
        assert error.reason in REASONS
        assert error.client_id == "clinic"
        assert str(error).isprintable()
        event(error.reason)
        return error.reason
    assert tool.tried(data, expected) == ("admitted", "")
    event("admitted")
    return admitted


@given(st.binary(max_size=2000), EXPECTED)
@settings(max_examples=150, deadline=None)
def test_arbitrary_bytes(data: bytes, expected: Expectation) -> None:
    assert judged(data, expected) == "bad_encoding"


@given(st.binary(max_size=400), st.integers(0, 2**64 - 1), EXPECTED)
@settings(max_examples=150, deadline=None)
def test_arbitrary_payloads_that_are_sealed_and_signed(body: bytes, length: int, expected: Expectation) -> None:
    for payload in (body, struct.pack("<Q", length) + body, struct.pack("<Q", len(body) // 2) + body):
        header = canonical_json(sign_envelope(tool.envelope_of(payload), tool.KEY).to_dict())
        assert judged(packed(header, payload), expected) == "bad_encoding"


@given(st.sampled_from(sorted(HEADER)), VALUES, st.booleans(), EXPECTED)
@settings(max_examples=150, deadline=None)
def test_any_value_in_any_field_of_the_envelope(name: str, value: Any, resign: bool, expected: Expectation) -> None:
    header = {**HEADER, name: value}
    found = judged(packed(written(signed(header) if resign else header), PAYLOAD), expected)
    if isinstance(found, Admitted) and expected is tool.SIGNED:
        assert resign or header == HEADER
        assert name in ("counter", "num_examples", "signature") or header[name] == HEADER[name]


@given(st.sampled_from(["spec", "layout", "module"]), st.data(), VALUES, EXPECTED)
@settings(max_examples=150, deadline=None)
def test_any_value_deeper_in_the_envelope(where: str, data: st.DataObject, value: Any, expected: Expectation) -> None:
    header = json.loads(json.dumps(HEADER))
    part = {"spec": header["spec"], "layout": header["layout"][0], "module": header["spec"]["modules"][0]}[where]
    name = data.draw(st.sampled_from([*sorted(part), "more"]))
    part[name] = value
    found = judged(packed(written(signed(header)), PAYLOAD), expected)
    assert isinstance(found, str) or header == HEADER


@given(st.sampled_from(sorted(ENTRIES)), st.sampled_from(["dtype", "shape", "data_offsets", "more"]), VALUES, EXPECTED)
@settings(max_examples=120, deadline=None)
def test_any_value_in_the_tensors_header(name: str, part: str, value: Any, expected: Expectation) -> None:
    entries = {**ENTRIES, name: {**ENTRIES[name], part: value}}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    payload = struct.pack("<Q", len(text)) + text + DATA
    header = canonical_json(sign_envelope(tool.envelope_of(payload), tool.KEY).to_dict())
    found = judged(packed(header, payload), expected)
    assert found in ("bad_encoding", "layout_mismatch") or entries == ENTRIES


@given(st.binary(min_size=len(DATA), max_size=len(DATA)), EXPECTED)
@settings(max_examples=150, deadline=None)
def test_any_bits_for_numbers(data: bytes, expected: Expectation) -> None:
    payload = PAYLOAD[: -len(DATA)] + data
    header = canonical_json(sign_envelope(tool.envelope_of(payload), tool.KEY).to_dict())
    found = judged(packed(header, payload), expected)
    assert isinstance(found, Admitted) or found in ("not_finite", "norm_exceeded")


@given(st.binary(max_size=80) | st.binary(min_size=64, max_size=64))
@settings(max_examples=150, deadline=None)
def test_any_bytes_for_a_signature(signature: bytes) -> None:
    header = {**HEADER, "signature": signature.hex()}
    assert judged(packed(written(header), PAYLOAD), tool.SIGNED) == "bad_signature"


@given(st.lists(st.tuples(st.integers(0, 4000), st.binary(max_size=4), st.integers(0, 4)), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_a_signed_packet_with_any_bytes_changed_is_refused(edits: list[tuple[int, bytes, int]]) -> None:
    """Every byte counts: neither header, nor payload, nor signature can be changed on the way."""
    whole = packed(canonical_json(HEADER), PAYLOAD)
    changed = bytearray(whole)
    for place, data, cut in edits:
        changed[place % len(whole) : place % len(whole) + cut] = data
    found = judged(bytes(changed), tool.SIGNED)
    assert isinstance(found, str) or bytes(changed) == whole


@given(st.sampled_from([b"[" * 60_000, b'"' * 60_000, b'{"a":' * 12_000, b"1" * 60_000, b"\\" * 60_000]), EXPECTED)
@settings(max_examples=20, deadline=None)
def test_memory_is_bounded_by_the_limits(text: bytes, expected: Expectation) -> None:
    """Within ten times what a header may have, whatever lengths are claimed."""
    text += b" " * (-len(text) % 8)
    payload = struct.pack("<Q", len(text)) + text
    header = canonical_json(sign_envelope(tool.envelope_of(payload), tool.KEY).to_dict())
    tracemalloc.start()
    try:
        for data in (
            packed(text, PAYLOAD),
            packed(header, payload),
            packed(header, struct.pack("<Q", 2**63) + payload),
        ):
            assert isinstance(judged(data, expected), str)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * tool.LIMITS.max_header_bytes


def test_the_long_search_finds_nothing_and_reaches_every_code() -> None:
    found = tool.fuzz(lambda so_far: so_far.cases < 2500, seed=3)
    assert found.faults == []
    assert found.peak < 4 * tool.LIMITS.max_bytes
    behind = {"norm_exceeded", "not_finite", "layout_mismatch", "bad_signature", "payload_digest_mismatch", "admitted"}
    assert behind <= found.codes.keys()


def test_the_long_search_would_find_a_foreign_exception(monkeypatch: Any) -> None:
    def breaks(*_: Any, **__: Any) -> None:
        raise KeyError("F4")

    monkeypatch.setattr("simulations.fuzz_admission.admit", breaks)
    found = tool.fuzz(lambda so_far: so_far.cases < 2, seed=0)
    assert [fault.partition(":")[0] for fault in found.faults] == ["KeyError", "KeyError"]


def test_the_long_search_would_find_what_should_not_be_admitted(monkeypatch: Any) -> None:
    monkeypatch.setattr("simulations.fuzz_admission.LIMITS", replace(tool.LIMITS, max_norm=1e-3))
    honest = packed(canonical_json(HEADER), PAYLOAD)
    admitted = admit(honest, tool.SIGNED, layout=tool.LAYOUT)
    monkeypatch.setattr("simulations.fuzz_admission.admit", lambda *_, **__: admitted)
    assert tool.tried(honest, tool.SIGNED) == ("admitted", "admitted with other tensors, or beyond the norm")
