"""How much a receiver is willing to read.

Every allocation that decoding makes is bounded by these numbers before it is made. They are a receiver's own choice
and no part of the format: raise them for very large adapters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from federated.errors import ConfigError

__all__ = ["DEFAULT_LIMITS", "OWN_LIMITS", "Limits"]


@dataclass(frozen=True)
class Limits:
    """Bounds on one packet or one adapter.

    Decoding copies no tensor: beside the packet itself, of at most ``max_bytes``, it holds a parsed header, some tens
    of times ``max_header_bytes``.

    Args:
        max_bytes: size of the whole packet or adapter, in bytes.
        max_header_bytes: size of each JSON header (the packet's own and the safetensors one), in bytes.
        max_tensors: number of tensors.
        max_norm: L2 norm of an update over all tensors together, in adapter units; 0.0 means no bound.

    Raises:
        ConfigError: if a size is not a positive integer, or the norm is negative or not finite.
    """

    max_bytes: int = 512 * 2**20
    max_header_bytes: int = 2**20
    max_tensors: int = 8192
    max_norm: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_header_bytes", "max_tensors"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"limit {name} is {value!r}; expected an integer of at least 1")
        if not (math.isfinite(self.max_norm) and self.max_norm >= 0):
            raise ConfigError(f"limit max_norm is {self.max_norm!r}; expected 0 (no bound) or a positive number")


DEFAULT_LIMITS = Limits()
"""What is used where a caller names no limits: 512 MiB, headers of 1 MiB, 8192 tensors, no norm bound."""

OWN_LIMITS = Limits(max_bytes=2**40, max_header_bytes=2**28, max_tensors=2**20)
"""For what a process stored itself and reads again: an adapter of any size, with all that is kept beside it."""
