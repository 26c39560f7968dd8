"""What was spent on one data set, on its owner's disk: append only, one process at a time, written ahead.

A charge is on disk before the private computation begins, so that a crash at any moment leaves a ledger that says at
least what may have been computed. Nothing is ever taken back: not by a failed round, a version that is rolled back, a
new run or a new process. A client has one for each data set, a server one for each run.

Who can edit the file can make a new one that is right in itself: the chain shows damage and clumsy edits. An older copy
that was put back shows against the head that the server last acknowledged (`Ledger.require_descends_from`); where the
server takes part in the deceit, nothing here can show it. No clock decides anything: times are noted for readers.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from federated.errors import PrivacyError
from federated.privacy.accounting import GaussianSteps, epsilon
from federated.privacy.ledger_records import Chain, Charge, ChargeKey, charge_body, opening_body, read_chain, sealed

__all__ = ["ChargeKey", "Ledger"]


class Ledger:
    """An open ledger; use it as a context, or close it. `open` makes one.

    Attributes:
        path: its file; beside it lies ``.lock``.
        notice: what was found and mended when it was opened, in words; empty where there was nothing.
    """

    def __init__(self, path: Path, chain: Chain, *, lock: int, notice: str, chance: _Chance) -> None:
        self.path = path
        self.notice = notice
        self._opening = chain.opening
        self._charges = list(chain.charges)
        self._lock: int | None = lock
        self._owner = os.getpid()
        self._chance = chance

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        subject: str,
        data_digest: str,
        create: bool = True,
        clock: Callable[[], float] = time.time,
        nonce: Callable[[], str] | None = None,
    ) -> Self:
        """Open a ledger and check all of it; make it where there is none.

        Args:
            path: the file.
            subject: whose it is: a client's stable name, or the server's run.
            data_digest: digest of the data that it is about.
            create: False where one is expected: its absence is an error then.
            clock: seconds since the epoch; noted only.
            nonce: text that never comes twice; default: from the operating system.

        Raises:
            PrivacyError: if it is missing where expected, damaged, another's, in use, or the disk refuses.
        """
        chance = _Chance(clock, nonce or _new_nonce)
        try:
            with ExitStack() as undo:
                lock = _locked(path, create=create)
                undo.callback(os.close, lock)
                if not path.exists():
                    _create(path, opening_body(subject, data_digest, **chance.marks()), create=create)
                chain, notice = _read(path, subject=subject, data_digest=data_digest)
                undo.pop_all()
        except OSError as error:
            raise _refused(path, error) from None
        return cls(path, chain, lock=lock, notice=notice, chance=chance)

    @property
    def head(self) -> str:
        """Digest of the last record: it stands for the whole history."""
        return self._charges[-1].digest if self._charges else self._opening

    @property
    def charges(self) -> tuple[Charge, ...]:
        """All charges, in order."""
        return tuple(self._charges)

    @property
    def events(self) -> tuple[GaussianSteps, ...]:
        """What was charged, in order."""
        return tuple(charge.event for charge in self._charges)

    def has(self, key: ChargeKey) -> bool:
        """Whether anything was charged under a key: a stored answer may be sent again, and made again only anew."""
        return any(charge.key == key for charge in self._charges)

    def spent(self, target_delta: float, *, accountant: str = "rdp") -> float:
        """Epsilon of all that was charged; see `federated.privacy.accounting.epsilon`."""
        return epsilon(self.events, target_delta, accountant=accountant)

    def would_exceed(
        self, event: GaussianSteps, *, target_epsilon: float, target_delta: float, accountant: str = "rdp"
    ) -> bool:
        """Whether epsilon would be above the target after the event; asked before it is charged."""
        return epsilon((*self.events, event), target_delta, accountant=accountant) > target_epsilon

    def charge(self, event: GaussianSteps, *, key: ChargeKey) -> str:
        """Write a charge; only when this has returned may its steps be computed.

        Returns:
            The new head.

        Raises:
            PrivacyError: if it could not be written, which grants nothing; or the ledger is closed, or was opened by
                the process that this one was forked from.
        """
        if self._lock is None or self._owner != os.getpid():
            raise PrivacyError(
                f"the privacy ledger {self.path.name} is not open in this process; open it where it is charged"
            )
        chained = {"number": len(self._charges) + 1, "previous": self.head}
        digest, line = sealed(charge_body(event, key, **chained, **self._chance.marks()))
        try:
            _append(self.path, line)
        except OSError as error:
            self.close()  # what is on disk now is found out by opening it again
            raise _refused(self.path, error) from None
        self._charges.append(Charge(digest, event, key))
        return digest

    def require_descends_from(self, acknowledged_head: str | None) -> None:
        """Check that this ledger goes on from a head that the server acknowledged; None: it acknowledged none.

        Raises:
            PrivacyError: if that head is not in its history: an older copy was put back, or another ledger.
        """
        if acknowledged_head is None or acknowledged_head in {self._opening, *(one.digest for one in self._charges)}:
            return
        raise PrivacyError(
            f"the privacy ledger {self.path.name} does not go on from the head {acknowledged_head[:12]} that was last "
            "acknowledged: an older copy of it was put back, or another one was made; what was spent since is not in "
            "it. Put the newest copy back"
        )

    def close(self) -> None:
        """Let others open it."""
        if self._lock is not None:
            if self._owner == os.getpid():  # a forked child shares the lock, and must not take it from its parent
                fcntl.flock(self._lock, fcntl.LOCK_UN)
            os.close(self._lock)
        self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class _Chance:
    """Where the marks of a record come from."""

    clock: Callable[[], float]
    nonce: Callable[[], str]

    def marks(self) -> dict[str, Any]:
        return {"nonce": self.nonce(), "noted_at": self.clock()}


def _new_nonce() -> str:
    return secrets.token_hex(16)


def _locked(path: Path, *, create: bool) -> int:
    """A lock on the file beside the ledger, which is never replaced; held as long as its descriptor is open."""
    if not create and not path.exists():
        raise _missing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise PrivacyError(
            f"the privacy ledger {path} is in use by another process; two that charge it at once would each count "
            "without the other: wait for it, or stop it"
        ) from None
    return lock


def _missing(path: Path) -> PrivacyError:
    return PrivacyError(
        f"the privacy ledger {path} is missing, and one is expected: what was spent on this data is not known; put it "
        "back from where it was moved"
    )


def _create(path: Path, body: dict[str, object], *, create: bool) -> None:
    """Make the file with its first record, whole or not at all."""
    if not create:  # it was taken away after the lock was asked for
        raise _missing(path)
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as file:
        file.write(sealed(body)[1])
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path)


def _read(path: Path, *, subject: str, data_digest: str) -> tuple[Chain, str]:
    """The chain on disk; an end that a crash left open is closed, or cut off where nothing had been granted."""
    data = path.read_bytes()
    chain = read_chain(data, subject=subject, data_digest=data_digest)
    if not chain.ended:
        _append(path, b"\n")
        return chain, "the last charge was being written when the process ended; it is whole, and counts"
    if chain.size < len(data):
        with path.open("r+b") as file:
            file.truncate(chain.size)
            os.fsync(file.fileno())
        return chain, "a charge that was only half written when the process ended was cut off: it had not been granted"
    return chain, ""


def _append(path: Path, line: bytes) -> None:
    """Add bytes, on disk when this returns; what does not fit whole is taken off again."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        before = os.fstat(descriptor).st_size
        try:
            if os.write(descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)
    _sync_folder(path)


def _sync_folder(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _refused(path: Path, error: OSError) -> PrivacyError:
    return PrivacyError(
        f"the privacy ledger {path} cannot be read or written: {error.strerror}; nothing was granted: free space or "
        "give access, and go on"
    )
