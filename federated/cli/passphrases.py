"""Where the passphrases of private keys come from: a file, the environment or a prompt; never the command line."""

from __future__ import annotations

import os
import re
import sys
from getpass import getpass
from pathlib import Path

from federated.errors import SigningKeyError

__all__ = ["VARIABLE", "Passphrases"]

VARIABLE = "FEDPEFT_PASSPHRASE"
"""Of all keys; ``FEDPEFT_PASSPHRASE_ROOT_1`` is that of root-1 alone."""


class Passphrases:
    """Answers for one command; called with a key's name, and whether the key is new.

    Args:
        file: holds the passphrase of all keys in its first line; None asks the environment, then the user.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._last = b""

    def __call__(self, name: str, new: bool) -> bytes:
        """One key's passphrase.

        Raises:
            SigningKeyError: if there is nobody to ask, or the file cannot be read.
        """
        if self._file is not None:
            return self._from_file(self._file)
        own = f"{VARIABLE}_{re.sub('[^A-Z0-9]', '_', name.upper())}"
        found = os.environ.get(own) or os.environ.get(VARIABLE)
        return found.encode() if found else self._asked(name, new)

    @staticmethod
    def _from_file(path: Path) -> bytes:
        try:
            line = path.read_bytes().partition(b"\n")[0].rstrip(b"\r")
        except OSError as error:
            raise SigningKeyError(f"cannot read the passphrase from {path}: {error.strerror}") from error
        if not line:
            raise SigningKeyError(f"the first line of {path} is empty; expected a passphrase")
        return line

    def _asked(self, name: str, new: bool) -> bytes:
        """From the terminal; an empty answer repeats the last one."""
        if not sys.stdin.isatty():
            raise SigningKeyError(
                f"key {name} needs a passphrase and there is no terminal to ask at; set {VARIABLE}, or pass "
                f"--passphrase-file FILE"
            )
        hint = " (Enter: the same as before)" if self._last else ""
        answer = getpass(f"{'New passphrase' if new else 'Passphrase'} of {name}{hint}: ").encode()
        if answer and new and getpass("Once more: ").encode() != answer:
            raise SigningKeyError(f"key {name}: the two passphrases differ; nothing was made of it, start again")
        self._last = answer or self._last
        return self._last
