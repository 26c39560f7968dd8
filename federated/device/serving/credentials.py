"""Bearer tokens: where they come from, and comparing them without telling how much of one was right.

Never from the command line, which every user of the machine can read.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from federated.errors import DeviceError

__all__ = ["Tokens", "read_tokens"]

_SHORTEST = 16


class Tokens:
    """The tokens that open one listener; none at all leaves it open.

    Args:
        tokens: each at least 16 characters without spaces. Their digests are kept, not they themselves.

    Raises:
        DeviceError: for a token that is too short, or holds spaces or other than ASCII.
    """

    def __init__(self, tokens: Iterable[str] = ()) -> None:
        self._digests = tuple(_digest(_checked(token).encode()) for token in tokens)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def open(self, authorization: bytes | None) -> bool:
        """Whether the value of an ``Authorization`` header holds one of the tokens; always as slow."""
        scheme, _, given = (authorization or b"").partition(b" ")
        digest = _digest(given.strip())
        same = [hmac.compare_digest(digest, known) for known in self._digests]
        return not self._digests or (any(same) and scheme.lower() == b"bearer")


def read_tokens(file: Path | None, variable: str) -> Tokens:
    """The tokens of a file, one a line, else of an environment variable; lines that begin with ``#`` are left out.

    Raises:
        DeviceError: if the file cannot be read, or holds no token.
    """
    if file is None:
        return Tokens(filter(None, [os.environ.get(variable, "").strip()]))
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeError) as error:
        raise DeviceError(f"token file {file} cannot be read ({type(error).__name__}); give a text file") from None
    tokens = Tokens(line for line in lines if line and not line.startswith("#"))
    if not tokens:
        raise DeviceError(f"token file {file} holds no token; write one on a line of its own")
    return tokens


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def _checked(token: str) -> str:
    if len(token) < _SHORTEST or not token.isascii() or not token.isprintable() or " " in token:
        raise DeviceError(
            f"a token has {len(token)} characters; expected at least {_SHORTEST} of printable ASCII without spaces, "
            "such as `openssl rand -hex 32` makes"
        )
    return token
