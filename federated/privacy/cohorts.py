"""Cohorts that nobody can foresee: each client of a fixed population independently, by a secret key of the run.

Amplification by sampling holds for whoever does not know who was sampled. So the key comes from the operating system
and is in no config, record, message or log: only in one file of the run's folder that its owner alone can read. Each
draw uses a number that is written down before, so that no cohort comes twice, even where a round is run again after a
crash: two releases of one cohort are not two independent samples.

The population is fixed with the key. A client that comes later takes no part; one that is drawn and not there is one
that does not answer.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

from federated.errors import PrivacyError
from federated.privacy.private_file import read_private, write_private

__all__ = ["PoissonCohorts", "open_cohort"]

_SCALE = 2**64


def open_cohort(present: Collection[str], *, fraction: float, seed: int, round_number: int) -> tuple[str, ...]:
    """A cohort that anybody can foresee, sorted by name; it may be empty, and no amplification is claimed for it.

    Whether a client is in it depends on its own name alone. Of a list that is cut after so many, whoever leaves brings
    another one in: the sum would change by two contributions where the account has one.

    Args:
        present: who is there.
        fraction: about what share of them, in (0, 1].
        seed: of the run.
        round_number: 1-based.
    """

    def place(name: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{seed}\0cohort\0{round_number}\0{name}".encode()).digest()[:8])

    return tuple(name for name in sorted(present) if place(name) < fraction * _SCALE)


class PoissonCohorts:
    """Poisson sampling of clients from a secret key.

    Args:
        population: all clients that may ever be drawn.
        key: at least 16 secret bytes; default: 32 from the operating system.
        path: file that keeps it, mode 0600; None keeps it in memory only.
        drawn: cohorts that were drawn before.

    Raises:
        PrivacyError: without clients, for a key that can be guessed, or a file that cannot be written.

    Privacy: the key and the number of draws decide each cohort; never log this object's parts.
    """

    def __init__(
        self, population: Collection[str], *, key: bytes | None = None, path: Path | None = None, drawn: int = 0
    ) -> None:
        self._key = secrets.token_bytes(32) if key is None else key
        if not population or len(self._key) < 16:
            raise PrivacyError("cohorts by a secret key need at least one client and a key of 16 bytes")
        self.population = tuple(sorted(set(population)))
        self._path = path
        self._drawn = drawn
        self._write()

    def __repr__(self) -> str:
        return f"PoissonCohorts({len(self.population)} clients)"

    @classmethod
    def of_run(cls, path: Path, population: Collection[str]) -> Self:
        """Those that the file keeps, or new ones for this population when there is none.

        Raises:
            PrivacyError: if the file cannot be read, others can read it, or it is damaged.
        """
        try:
            text = read_private(path, "the key of the run's cohorts")
        except OSError as error:
            raise PrivacyError(f"{path}: {error.strerror}; the run's cohorts cannot be drawn without it") from None
        if text is None:
            return cls(population, path=path)
        try:
            kept: dict[str, Any] = json.loads(text)
            names, drawn = [str(name) for name in kept["population"]], int(kept["drawn"])
            return cls(names, key=bytes.fromhex(kept["key"]), path=path, drawn=drawn)
        except (ValueError, KeyError, TypeError):
            raise PrivacyError(f"{path} is damaged: the run's cohorts cannot be drawn; start a new run") from None

    def draw(self, fraction: float) -> tuple[str, ...]:
        """The next cohort, sorted by name; it may be empty.

        Args:
            fraction: with which probability each client is in it, in (0, 1].

        Raises:
            PrivacyError: if the draw cannot be written down; nobody is drawn then.
        """
        self._drawn += 1
        self._write()
        return tuple(name for name in self.population if self._chance(name) < fraction * _SCALE)

    def _chance(self, client_id: str) -> int:
        message = f"{self._drawn}\0{client_id}".encode()
        return int.from_bytes(hmac.new(self._key, message, hashlib.sha256).digest()[:8])

    def _write(self) -> None:
        """Whole or not at all, and never readable by others."""
        if self._path is None:
            return
        kept = {"key": self._key.hex(), "drawn": self._drawn, "population": self.population}
        try:
            write_private(self._path, json.dumps(kept).encode())
        except OSError as error:
            raise PrivacyError(
                f"{self._path}: {error.strerror}; a cohort that is not written down may come twice"
            ) from None
