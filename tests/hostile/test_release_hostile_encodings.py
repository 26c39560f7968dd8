"""Files of encoded weights that want to do harm: each is refused by the library's own error, before it costs much."""

import json
import re
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import zstandard

from federated.errors import EndlessData, UntrustedRelease, WrongContent
from federated.manifest import canonical_json, sha256_hex
from federated.release.codecs import FULL, decode, encode, twin
from federated.wire import Limits
from tests.unit.release.weights import encoded, factors

WEIGHTS, HELD = encoded(factors(1)), encoded(factors(2))
SMALL = Limits(max_bytes=100_000, max_header_bytes=4_000, max_tensors=16)
ZSTD = zstandard.ZstdCompressor(level=1)


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body of a file, unpacked."""
    _, _, length = struct.unpack_from("<4sHI", data)
    header = zstandard.ZstdDecompressor().decompress(data[10 : 10 + length])
    return json.loads(header), zstandard.ZstdDecompressor().decompress(data[10 + length :])


def joined(
    header: object, body: bytes | None, *, packed: bytes = b"", magic: bytes = b"FPRC", version: int = 1
) -> bytes:
    raw = header if isinstance(header, bytes) else canonical_json(header)
    head = ZSTD.compress(raw)
    return struct.pack("<4sHI", magic, version, len(head)) + head + (packed if body is None else ZSTD.compress(body))


def refused(
    data: bytes, message: str, held: bytes | None = None, *, kind: type[UntrustedRelease] = WrongContent
) -> None:
    with pytest.raises(kind, match=message):
        decode(data, held, limits=SMALL)


def edited(name: str, held: bytes | None = None, **changes: Any) -> bytes:
    header, body = parts(encode(WEIGHTS, name, held).data)
    return joined({**header, **changes}, body)


def test_an_honest_file_put_together_by_hand_is_taken() -> None:
    assert decode(edited("int4"), limits=SMALL) == encode(WEIGHTS, "int4").weights


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "of 0 bytes; expected at least 10"),
        (joined({}, b"", magic=b"PK\x03\x04"), r"begin with b'PK.*this library reads b'FPRC'"),
        (joined({}, b"", version=2), "format 2; this library reads b'FPRC', format 1: upgrade"),
        (struct.pack("<4sHI", b"FPRC", 1, 50), "a header of 50 bytes, and 0 follow: the file is cut short"),
        (struct.pack("<4sHI", b"FPRC", 1, 3) + b"abc", "the header is no zstd frame"),
        (joined(b"[]", b""), "the header of encoded weights is a JSON list"),
        (joined(b'{"codec":1,"codec":2}', b""), "duplicate key"),
        (joined({"codec": "int4"}, b""), "the header of encoded weights has"),
    ],
)
def test_what_is_no_such_file(data: bytes, message: str) -> None:
    refused(data, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": "INT4"}, "has codec 'INT4'"),
        ({"codec": 4}, "has codec 4"),
        ({"codec": "zip"}, "encoded by 'zip', which this library does not know: upgrade"),
        ({"result": ""}, "has result ''"),
        ({"source": "x"}, "has source 'x'"),
        ({"source": "a" * 64}, "int4 starts from weights aaaaaaaaaaaa; none are held"),
        ({"numbers": []}, "has numbers"),
        ({"numbers": {"shift": 1.5}}, "expected whole ones"),
        ({"numbers": {"shift": True}}, "expected whole ones"),
        ({"numbers": {}}, "no finite number, or out of range"),
        ({"numbers": {"shift": 101}}, "no finite number, or out of range"),
        ({"numbers": {"shift": -(2**31) + 1}}, "no finite number, or out of range"),
        ({"tensors": {}}, "has tensors {}; expected a list"),
        ({"tensors": ["a"]}, "have a tensor 'a'"),
        ({"tensors": [["a"]]}, r"have a tensor \['a'\]"),
        ({"tensors": [["a" * 513, "F32", 1]]}, "expected its name, dtype and shape"),
        ({"tensors": [["a", "F8", 1]]}, "has dtype 'F8'"),
        ({"tensors": [["a", "F32", 0]]}, r"has shape \[0\]"),
        ({"tensors": [["a", "F32", -1]]}, r"has shape \[-1\]"),
        ({"tensors": [["a", "F32", 1.0]]}, r"has shape \[1.0\]"),
        ({"tensors": [["a", "F32", *[1] * 9]]}, "has shape"),
        ({"tensors": [["b", "F32", 1], ["a", "F32", 1]]}, "once and in order"),
        ({"tensors": [["a", "F32", 1], ["a", "F32", 1]]}, "once and in order"),
        ({"tensors": [["a", "F32", 4]]}, r"is said to have \d+ bytes; its shapes need 4"),
        ({"result": "0" * 64}, "gives weights with SHA-256"),
    ],
)
def test_headers_that_say_something_else(changes: dict[str, Any], message: str) -> None:
    refused(edited("int4", **changes), message)


def test_a_name_that_no_tensor_can_have() -> None:
    header, body = parts(encode(encoded({"x": np.ones(4, dtype=np.float32)}), "lossless").data)
    refused(joined({**header, "tensors": [["../x", "F32", 4]]}, body), "hold tensors that cannot be")


@pytest.mark.parametrize("changes", [{"source": ""}, {"tensors": [["a", "F32", 1]]}, {"source": "c" * 64}])
def test_diffs_that_start_elsewhere(changes: dict[str, Any]) -> None:
    refused(edited("diff-int2", HELD, **changes), "starts from weights", HELD)


def test_a_diff_without_what_it_starts_from() -> None:
    data = encode(WEIGHTS, "diff", HELD).data
    refused(data, f"diff starts from weights {sha256_hex(HELD)[:12]}; none are held")
    refused(data, f"{sha256_hex(WEIGHTS)[:12]} are held", WEIGHTS)


def test_held_bytes_that_are_no_weights() -> None:
    header, body = parts(encode(WEIGHTS, "diff", HELD).data)
    refused(joined({**header, "source": sha256_hex(b"junk")}, body), "held weights are no canonical weights", b"junk")


def test_held_weights_that_are_not_finite() -> None:
    odd = encoded({"x": np.array([np.inf, 0.0], dtype=np.float32)})
    header, body = parts(
        encode(
            encoded({"x": np.ones(2, dtype=np.float32)}), "recode-int4", encoded({"x": np.zeros(2, dtype=np.float32)})
        ).data
    )
    refused(joined({**header, "source": sha256_hex(odd)}, body), "tensor x holds NaN or infinity", odd)


def _bits(value: float) -> int:
    return int(np.float16(value).view(np.uint16))


@pytest.mark.parametrize("codec", [*(one for one in FULL if one.startswith("int")), "diff-int2", "recode-int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_scales_that_are_no_scales(codec: str, value: float) -> None:
    held = None if codec.startswith("int") else HELD
    header, body = parts(encode(WEIGHTS, codec, held).data)
    count = sum(-(-array.size // 64) for array in factors().values())
    scales = np.frombuffer(body[: 2 * count], dtype=np.uint8).reshape(2, count).copy()
    scales[:, 3] = [_bits(value) & 255, _bits(value) >> 8]
    refused(joined(header, scales.tobytes() + body[2 * count :]), "no finite number", held)


@pytest.mark.parametrize("codec", ["int4", "int8", "diff-int2", "recode-int4"])
def test_codes_that_no_level_has(codec: str) -> None:
    held = None if codec.startswith("int") else HELD
    header, body = parts(encode(WEIGHTS, codec, held).data)
    count = sum(-(-array.size // 64) for array in factors().values())
    refused(joined(header, body[: 2 * count] + b"\xff" * (len(body) - 2 * count)), "a code beyond|no finite", held)


def test_steps_that_lead_beyond_float32_end_at_the_largest_code() -> None:
    """No warning, no infinity: what is beyond all codes is the largest one, everywhere."""
    top = encoded({"x": np.full(64, 3.4e38, dtype=np.float32)})
    zero = encoded({"x": np.zeros(64, dtype=np.float32)})
    header, body = parts(encode(encoded({"x": np.full(64, 1e30, dtype=np.float32)}), "diff-int4", zero).data)
    far = joined({**header, "source": sha256_hex(top), "numbers": {**header["numbers"], "shift": 100}}, body)
    assert sha256_hex(decode(far, top, limits=SMALL)) == header["result"]


def bomb(nbytes: int) -> bytes:
    """A zstd frame of a few bytes that says and holds that many zeros."""
    return ZSTD.compress(bytes(nbytes))


LARGE = 2**26


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda head: joined(head, None, packed=bomb(LARGE)), WrongContent, f"said to have {LARGE} bytes; its shapes"),
        (lambda head: joined(b" " * LARGE, b""), EndlessData, f"a header of {LARGE} bytes"),
        (lambda head: joined({**head, "tensors": [["a", "F32", LARGE]]}, b""), EndlessData, "1 tensors of 268435456"),
        (lambda head: joined({**head, "tensors": [["a", "F32", *[2**31 - 1] * 8]]}, b""), EndlessData, "1 tensors of"),
        (
            lambda head: joined({**head, "tensors": [[f"t{n:02}", "F32", 1] for n in range(17)]}, b""),
            EndlessData,
            "17 tensors of 68 bytes",
        ),
    ],
)
def test_bombs_cost_nothing(
    make: Callable[[dict[str, Any]], bytes], kind: type[UntrustedRelease], message: str
) -> None:
    """Sizes are refused before anything of that size is made."""
    data = make(parts(encode(WEIGHTS, "int4").data)[0])
    tracemalloc.start()
    try:
        refused(data, re.escape(message), kind=kind)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_body_that_holds_more_than_it_says() -> None:
    """The size in the frame is right, and what follows is more, or less."""
    header, body = parts(encode(WEIGHTS, "int4").data)
    unsaid = zstandard.ZstdCompressor(write_content_size=False).compress(body)
    refused(joined(header, None, packed=unsaid), "does not say how large it is")
    whole = ZSTD.compress(body)
    refused(joined(header, None, packed=whole + b"more"), "cannot be decompressed")
    refused(joined(header, None, packed=whole[:-1]), "cannot be decompressed")
    refused(joined(header, None, packed=whole + whole), "cannot be decompressed")
    refused(joined(header, body + b"\0"), "its shapes need")


def test_held_weights_beyond_the_limit() -> None:
    data = encode(WEIGHTS, "diff", HELD).data
    with pytest.raises(EndlessData, match="held weights of"):
        decode(data, HELD, limits=Limits(max_bytes=len(HELD) - 1))


def test_twins_of_hostile_files_are_not_made() -> None:
    diff = encode(WEIGHTS, "diff-int2", HELD)
    assert decode(twin(diff, HELD).data, limits=SMALL) == diff.weights
