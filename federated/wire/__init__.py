"""Updates and adapters as bytes: encode, decode, and decide whether to let them in.

Numpy, safetensors and cryptography only: neither torch nor a database is imported, so that a gateway or a small device
can check what it receives. Nothing here trusts its input: `decode_tensors` and `decode_packet` raise `WireError` and
nothing else whatever the bytes, `admit` raises `UpdateRejected` with a code of `REASONS`. The format is specified in
``docs/wire-format.md``. It compresses nothing and opens no connection.
"""

from __future__ import annotations

from federated.wire.admission import Admitted, admit, bad_positions, seal_update
from federated.wire.codec import decode_packet, decode_tensors, encode_packet, encode_tensors
from federated.wire.envelope import Expectation, check_content, check_envelope, read_envelope
from federated.wire.limits import DEFAULT_LIMITS, OWN_LIMITS, Limits
from federated.wire.positions import decode_positions, encode_positions, positions_bytes
from federated.wire.reasons import REASONS
from federated.wire.signing import SigningKey, read_signing_key

__all__ = [
    "Admitted",
    "DEFAULT_LIMITS",
    "OWN_LIMITS",
    "Expectation",
    "Limits",
    "REASONS",
    "SigningKey",
    "admit",
    "bad_positions",
    "check_content",
    "check_envelope",
    "decode_packet",
    "decode_positions",
    "decode_tensors",
    "encode_packet",
    "encode_positions",
    "encode_tensors",
    "positions_bytes",
    "read_envelope",
    "read_signing_key",
    "seal_update",
]
