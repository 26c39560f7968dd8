"""The same search as `simulations.fuzz_admission`, led by coverage: atheris (libFuzzer) looks for new paths by itself.

    pip install atheris
    python -m simulations.fuzz_admission_guided CORPUS [libFuzzer's options, such as -max_total_time=300 -seed=1]

The first byte of an input chooses what the rest is: a whole packet, a payload that is sealed and signed, or the text of
a header in front of the right payload. Without that, digest and signature would keep the search out of all that is
behind them. CORPUS is a folder; it is filled with good packets where it is empty, and keeps what opened new paths. What
should not be ends the run with the input that did it. Cases by reason code are printed as JSON now and then: libFuzzer
ends the process by itself, without a word of ours.
"""

from __future__ import annotations

import json
import struct
import sys
from collections import Counter
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["federated.wire", "federated.manifest", "json"]):
    import federated.wire  # noqa: F401 - loaded here to be watched

from federated.manifest import canonical_json
from federated.wire import encode_tensors
from federated.wire.signing import sign_envelope
from simulations.fuzz_admission import KEY, SIGNED, TENSORS, UNSIGNED, envelope_of, tried

__all__ = ["main"]

CODES: Counter[str] = Counter()
REPORT_EVERY = 1000
GOOD = encode_tensors(TENSORS)


def packet_of(data: bytes) -> bytes:
    """The packet that an input stands for."""
    kind, rest = data[:1], data[1:]
    if kind == b"p":
        return packed(header_of(rest), rest)
    return packed(rest, GOOD) if kind == b"h" else rest


def header_of(payload: bytes) -> bytes:
    """The right envelope around a payload, signed."""
    return canonical_json(sign_envelope(envelope_of(payload), KEY).to_dict())


def packed(header: bytes, payload: bytes) -> bytes:
    """A packet of two parts."""
    return struct.pack("<4sHI", b"FPFT", 1, len(header)) + header + payload


def one(data: bytes) -> None:
    """Try one input.

    Raises:
        AssertionError: if something happens that should not.
    """
    for expected in (SIGNED, UNSIGNED):
        code, fault = tried(packet_of(data), expected)
        CODES[code] += 1
        if fault:
            raise AssertionError(fault)
    if CODES.total() % REPORT_EVERY == 0:
        print(json.dumps({"cases": CODES.total(), "by_reason": dict(CODES.most_common())}), flush=True)


def main() -> None:
    """Fill the corpus, and search until libFuzzer's options say that it is enough."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        seeds = (packed(header_of(GOOD), GOOD), b"p" + GOOD, b"h" + header_of(GOOD))
        for number, seed in enumerate(seeds):
            (folder / f"good-{number}").write_bytes(seed)
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
