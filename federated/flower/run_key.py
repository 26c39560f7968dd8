"""The key of a run's task tokens, kept with the run: a round that is done again asks with the tokens that it had.

A client that had answered knows the token again and sends the same bytes, instead of training and spending privacy a
second time. Whoever reads the key can make tokens, so only its owner may; it is in no config, record or message.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from federated.errors import ConfigError
from federated.privacy.private_file import read_private, write_private

__all__ = ["FILE", "kept_key"]

FILE = "tasks.key"
_BYTES = 32


def kept_key(folder: Path) -> tuple[bytes, bool]:
    """The key in a run's folder; made there when there is none.

    Args:
        folder: of the run.

    Returns:
        32 bytes, and whether they are new.

    Raises:
        ConfigError: if the file cannot be read or written, or is damaged.
        PrivacyError: if others can read it.
    """
    path = folder / FILE
    try:
        key = read_private(path, "the key of the run's task tokens")
        if key is None:
            key = secrets.token_bytes(_BYTES)
            write_private(path, key)
            return key, True
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; the run's task tokens are made with it") from None
    if len(key) != _BYTES:
        raise ConfigError(
            f"{path} is damaged: {len(key)} bytes, expected {_BYTES}. Put it back, or remove it: the run goes on "
            "with a new key, and clients that had answered the round that is done again train once more"
        )
    return key, False
