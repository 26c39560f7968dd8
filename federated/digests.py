"""Canonical JSON and digests: equal values give equal bytes, and equal bytes one name.

`federated.manifest` hands these on to everybody.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

__all__ = ["canonical_json", "digest_of", "sha256_hex"]


def canonical_json(value: Any) -> bytes:
    """Encode as JSON with sorted keys, no spaces, UTF-8 and no NaN: equal values give equal bytes.

    >>> canonical_json({"b": 1, "a": [1.5, None]})
    b'{"a":[1.5,null],"b":1}'

    Raises:
        ValueError: for NaN or infinity, which JSON cannot carry.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_hex(data: bytes | memoryview) -> str:
    """SHA-256 of ``data`` as 64 lower-case hexadecimal characters."""
    return hashlib.sha256(data).hexdigest()


def digest_of(value: Any) -> str:
    """Digest of the canonical JSON of ``value``."""
    return sha256_hex(canonical_json(value))
