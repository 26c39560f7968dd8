"""Throw damaged updates at admission for a long time, and look that nothing but its own refusals comes out.

    python -m simulations.fuzz_admission [--minutes M | --cases N] [--seed N]

Every case starts from a packet that would be admitted and changes it: bytes anywhere, fields of the envelope, the
tensors' header, their values, the signature. Most of the changed ones are sealed and signed again, as a hostile device
that is enrolled can do, so that what lies behind digest and signature is reached. The gate must admit or raise
`UpdateRejected`; what it admits must be the expected tensors, finite and within the bound. Every 16th case is watched
for memory.

Printed are the cases by reason code and every foreign exception, with the packet in hexadecimal. The last line is one
JSON object; the exit code is 1 when there was anything that should not be. One seed and ``--cases`` repeat a run. That
the process grows a little over many cases is the watch's doing: without it 25 000 cases leave nothing behind.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import struct
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from federated.errors import UpdateRejected
from federated.manifest import AdapterSpec, Envelope, ModuleSpec, RawTensor, canonical_json, layout_of, sha256_hex
from federated.wire import Admitted, Expectation, Limits, admit, encode_tensors
from federated.wire.signing import sign_envelope, signed_bytes

__all__ = ["Found", "damaged", "envelope_of", "fuzz", "main", "tried"]

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))
SPEC = AdapterSpec("lora", 2, 4.0, use_rslora=True, modules=(ModuleSpec("q", 5, 3, 2, 4.0),))
TENSORS = {
    "q.factor_a": RawTensor.from_array(np.linspace(-1, 1, 10).reshape(2, 5).astype("<f4")),
    "q.factor_b": RawTensor.from_array(np.linspace(-2, 2, 6).reshape(3, 2).astype("<f4")),
    "head.bias": RawTensor("BF16", (3,), bytes.fromhex("803f80bf0040")),
    "head.scale": RawTensor("F16", (), bytes.fromhex("003e")),
    "sparse:positions": RawTensor("U8", (3,), b"\x01\x02\x03"),
    "steps": RawTensor("I64", (1,), (7).to_bytes(8, "little")),
}
LAYOUT = layout_of(TENSORS)
LIMITS = Limits(max_bytes=256 * 1024, max_header_bytes=64 * 1024, max_tensors=64, max_norm=100.0)
SIGNED = Expectation(
    "run", 3, 1, "clinic", "token", "v" * 64, "b" * 64, SPEC, "p" * 64,
    max_examples=1000, last_counter=2, update_key=KEY.public_key().public_bytes_raw(),
)  # fmt: skip
UNSIGNED = replace(SIGNED, update_key=None)
MEMORY_EVERY = 16
_PREFIX = struct.Struct("<4sHI")
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.0, -0.0, 1.5, 1e308, 5e-324, "", "x",
    "0" * 128, "../../etc/passwd", "\u202e", "\x00", "é" * 40, "f" * 64, [], [[]], {}, {"a": {}}, [0, 24], ["F32"],
    "F32", "F4", [2, 5], [2.0, 5], [-2, 5], [2**31, 2**31], [1] * 9, "y" * 5000,
)  # fmt: skip
"""What is put in place of fields."""
NEAR: tuple[Any, ...] = (2, 3, 4, 1000, 1001, "run", "clinic", "token", "safetensors", "v" * 64)
"""The same, of which some are right somewhere."""
TEXTS = (b"NaN", b"-Infinity", b"1e999", b"[" * 40, b'"\\ud800"', b"\xff", b'{"a":1,"a":2}', b"1" * 400, b"-0", b"1.0")
"""What is put in place of a value as text, because JSON's writer would not write it."""


@dataclass
class Found:
    """What a run of many cases gave.

    Args:
        codes: cases by reason code, and those that were ``admitted``.
        faults: what should not be, in words, with the packet in hexadecimal.
        peak: largest memory of a watched case beside the packet itself, in bytes.
        slowest: seconds of the slowest case.
    """

    codes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    peak: int = 0
    slowest: float = 0.0

    @property
    def cases(self) -> int:
        """How many."""
        return sum(self.codes.values())


def envelope_of(payload: bytes) -> Envelope:
    """The right envelope for a payload."""
    place = ("run", "clinic", 3, 1, "token", 3, "v" * 64, "b" * 64)
    return Envelope(*place, SPEC, "p" * 64, LAYOUT, 10, sha256_hex(payload))


def damaged(chance: random.Random) -> bytes:
    """One packet, changed somewhere."""
    payload = encode_tensors(TENSORS)
    if chance.random() < 0.5:
        payload = chance.choice((_other_values, _other_entries, _other_bytes))(payload, chance)
    named = payload if chance.random() < 0.8 else encode_tensors(TENSORS)
    text = canonical_json(sign_envelope(envelope_of(named), KEY if chance.random() < 0.9 else OTHER).to_dict())
    if chance.random() < 0.5:
        text = _other_envelope(json.loads(text), chance)
    packet = _PREFIX.pack(b"FPFT", 1, len(text)) + text + payload
    return _other_bytes(packet, chance) if chance.random() < 0.3 else packet


def _other_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bytes set, cut out, repeated, put in, or cut off."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place, size = chance.randrange(len(changed) + 1), chance.choice((1, 1, 2, 4, 8, 100))
        new = chance.choice(
            (chance.randbytes(size), b"\x00" * size, b"\xff" * size, bytes(changed[place : place + size]))
        )
        kind = chance.choice(("set", "set", "cut", "insert", "end", "front"))
        if kind == "end":
            del changed[place:]
        elif chance.random() < 0.01:
            changed += bytes(chance.choice((1000, LIMITS.max_bytes)))
        elif kind == "front":  # lengths stand there
            changed[: len(new)] = new
        else:
            changed[place : place + (0 if kind == "insert" else size)] = b"" if kind == "cut" else new
    return bytes(changed)


def _other_values(payload: bytes, chance: random.Random) -> bytes:
    """Tensors of the right form with other numbers, or of another form with all that follows from it right."""
    tensors = dict(TENSORS)
    name = chance.choice(list(tensors))
    one = tensors[name]
    kind = chance.choice(("bits", "bits", "missing", "more", "dtype", "shape"))
    if kind == "bits":
        tensors[name] = replace(one, data=_bits(bytes(one.data), chance))
    elif kind == "missing":
        del tensors[name]
    elif kind == "more":
        tensors[chance.choice(("base.weight", "q.base_layer.weight", f"{name}.more"))] = one
    elif kind == "dtype":
        tensors[name] = RawTensor("U8", (len(one.data),), one.data)
    else:
        tensors[name] = replace(one, shape=(*one.shape, 1))
    return encode_tensors(tensors) if payload else payload


def _bits(data: bytes, chance: random.Random) -> bytes:
    return chance.choice((chance.randbytes(len(data)), b"\xff" * len(data), bytes(len(data)), b"\x7f" * len(data)))


def _other_entries(payload: bytes, chance: random.Random) -> bytes:
    """The tensors' header with something else in it, its length right."""
    (length,) = struct.unpack_from("<Q", payload)
    entries: dict[str, Any] = json.loads(payload[8 : 8 + length])
    name = chance.choice(list(entries))
    kind = chance.choice(("field", "field", "drop", "more", "rename", "order", "text"))
    if kind == "field":
        entries[name][chance.choice(list(entries[name]))] = chance.choice(VALUES)
    elif kind == "drop":
        del entries[name][chance.choice(list(entries[name]))]
    elif kind == "more":
        entries[name][chance.choice(("note", "", "data_offset"))] = chance.choice(VALUES)
    elif kind == "rename":
        entries[chance.choice(("", "../x", "__metadata__", "a\x00", "n" * 600, name.upper()))] = entries.pop(name)
    elif kind == "order":
        entries = dict(reversed(entries.items()))
    text = json.dumps(entries, separators=(",", ":")).encode()
    if kind == "text":
        text = text.replace(b'"F32"', chance.choice(TEXTS), 1)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + payload[8 + length :]


def _other_envelope(header: dict[str, Any], chance: random.Random) -> bytes:
    """The envelope with other fields: signed again as it then is, or not; as canonical JSON, or as it comes."""
    for _ in range(chance.randint(1, 2)):
        part = chance.choice((header, header, header, header.get("spec"), _first(header.get("layout"))))
        if type(part) is not dict:  # changed before
            part = header
        name = chance.choice([*part, "more"])
        if chance.random() < 0.2:
            part.pop(name, None)
        else:
            part[name] = chance.choice((*VALUES, *NEAR))
    if chance.random() < 0.4:
        header["signature"] = _signature_of(header, chance)
    text = _written(header, chance)
    return text.replace(b'"codec":"safetensors"', b'"codec":' + chance.choice(TEXTS)) if chance.random() < 0.1 else text


def _first(layout: Any) -> Any:
    return layout[0] if type(layout) is list and layout else None


def _signature_of(header: dict[str, Any], chance: random.Random) -> Any:
    """What a hostile device signs: whatever stands there, or something that is no signature at all."""
    if chance.random() < 0.2:
        return chance.choice(VALUES)
    plain = {name: value for name, value in header.items() if name != "signature"}
    prefix = signed_bytes(envelope_of(b"")).partition(b"\n")[0] + b"\n"
    return KEY.sign(
        prefix + json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    ).hex()


def _written(header: dict[str, Any], chance: random.Random) -> bytes:
    canonical = chance.random() < 0.9
    separators = (",", ":") if canonical else (", ", ": ")
    return json.dumps(header, sort_keys=canonical, separators=separators, ensure_ascii=False).encode()


def _fault_of(admitted: Admitted, expected: Expectation) -> str:
    """What is wrong with an update that was let in; empty for nothing."""
    envelope = admitted.envelope
    place = (
        "run_id",
        "round_number",
        "phase",
        "client_id",
        "task_token",
        "parent_version",
        "base_digest",
        "plan_digest",
    )
    wrong = [name for name in place if getattr(envelope, name) != getattr(expected, name)]
    if wrong or envelope.spec != expected.spec or not 1 <= envelope.num_examples <= expected.max_examples:
        return f"admitted with another {wrong or 'spec or number of examples'}"
    if layout_of(admitted.tensors) != LAYOUT or not 0 <= admitted.norm <= LIMITS.max_norm:
        return "admitted with other tensors, or beyond the norm"
    if not all(np.isfinite(one.array).all() for one in admitted.tensors.values()):
        return "admitted with a number that is not finite"
    if expected.update_key is not None:  # raises where it does not fit
        KEY.public_key().verify(bytes.fromhex(envelope.signature or ""), signed_bytes(envelope))
    return ""


def tried(packet: bytes, expected: Expectation) -> tuple[str, str]:
    """Let one packet meet the gate: its code, and what is wrong with that; empty where nothing is."""
    try:
        return "admitted", _fault_of(admit(packet, expected, layout=LAYOUT, limits=LIMITS), expected)
    except UpdateRejected as error:
        return error.reason, "" if str(error).isprintable() and len(str(error)) < 2000 else "a message that is unfit"
    except BaseException as error:  # noqa: BLE001 - this is what is looked for
        return "exception", f"{type(error).__name__}: {error}"


def fuzz(go_on: Callable[[Found], bool], *, seed: int) -> Found:
    """Try cases for as long as ``go_on`` says.

    Args:
        go_on: asked before each case.
        seed: of all that is changed.
    """
    chance, found = random.Random(seed), Found()  # noqa: S311 - which bytes are damaged
    while go_on(found):
        packet, expected = damaged(chance), SIGNED if chance.random() < 0.7 else UNSIGNED
        watched = found.cases % MEMORY_EVERY == 0
        if watched:
            tracemalloc.start()
        start = time.perf_counter()
        code, fault = tried(packet, expected)
        found.slowest = max(found.slowest, time.perf_counter() - start)
        if watched:
            found.peak = max(found.peak, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        found.codes[code] += 1
        if fault:
            found.faults.append(f"{fault}: {packet.hex()}")
    return found


def main() -> None:
    """Run, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long")
    parser.add_argument("--cases", type=int, default=0, help="so many, however long that takes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    end = start + 60 * options.minutes
    limit = (lambda found: found.cases < options.cases) if options.cases else (lambda _: time.monotonic() < end)
    found = fuzz(limit, seed=options.seed)
    for code, count in found.codes.most_common():
        print(f"{count:10,}  {code}")
    for fault in found.faults[:20]:
        print(fault)
    record = {
        "cases": found.cases,
        "seconds": round(time.monotonic() - start, 1),
        "by_reason": dict(found.codes.most_common()),
        "exceptions": found.codes["exception"],
        "faults": len(found.faults),
        "peak_memory_bytes": found.peak,
        "resident_growth_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before,
        "slowest_seconds": round(found.slowest, 4),
        "seed": options.seed,
    }
    print(json.dumps(record))
    sys.exit(1 if found.faults else 0)


if __name__ == "__main__":
    main()
