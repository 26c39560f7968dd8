"""What a client must remember between messages, on its own disk: keyed by (run, client, round), two rounds kept.

Rules that keep factors on the client, message counters and answers that may have to be sent again live here. The
store never travels. Writes are atomic (temporary file, then rename); a half-written entry is never seen. On a real
device they are flushed to the disk as well, so that a power cut takes back no counter; in a simulation, whose clients
write all day, only a kill leaves no trace.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from federated.errors import DataError
from federated.files import sync_folder, write_whole

__all__ = ["ClientStore"]

_KEPT_ROUNDS = 2


class ClientStore:
    """Named bytes of one client in one run.

    Args:
        root: folder of all stores on this machine.
        run_id: the run.
        client_id: stable name; hashed into the folder's name, so that any name is safe as a path.
        durable: what was written survives a power cut.
    """

    def __init__(self, root: Path, *, run_id: str, client_id: str, durable: bool = False) -> None:
        name = hashlib.sha256(f"{run_id}\0{client_id}".encode()).hexdigest()[:32]
        self.folder = root / name
        self._durable = durable

    def get(self, round_number: int, key: str) -> bytes | None:
        """The bytes stored under (round, key), or None.

        Raises:
            DataError: if they are there and cannot be read.
        """
        path = self.folder / str(round_number) / key
        try:
            return path.read_bytes() if path.is_file() else None
        except OSError as error:
            raise DataError(f"cannot read the client's store in {self.folder}: {error.strerror}") from None

    def latest(self, key: str) -> bytes | None:
        """The newest bytes under that key, of whatever round, or None.

        Raises:
            DataError: if they cannot be read.
        """
        found = (self.get(number, key) for number in reversed(self._rounds()))
        return next((data for data in found if data is not None), None)

    def put(self, round_number: int, key: str, data: bytes) -> None:
        """Store bytes under (round, key) and forget all but this client's last two rounds.

        Later rounds are forgotten as well: a run that was resumed further back does them again.

        Raises:
            DataError: if the disk refuses.
        """
        try:
            self._write(self.folder / str(round_number) / key, data)
            self._forget(round_number)
        except OSError as error:
            raise DataError(f"cannot write the client's store in {self.folder}: {error.strerror}") from None

    def next_counter(self) -> int:
        """Count messages of this client in this run, from 1, across restarts.

        Raises:
            DataError: if the disk refuses, or what it holds is no counter.
        """
        path = self.folder / "counter.json"
        try:
            number = int(json.loads(path.read_text())["counter"]) + 1 if path.is_file() else 1
            self._write(path, json.dumps({"counter": number}).encode())
        except OSError as error:
            raise DataError(f"cannot write the client's store in {self.folder}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path} is damaged; remove {self.folder} to leave this run and join the next") from None
        return number

    def _write(self, path: Path, data: bytes) -> None:
        if self._durable:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, data)
            sync_folder(path.parent)
            return
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(data)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
        temporary.replace(path)

    def _rounds(self) -> list[int]:
        """The rounds that something is stored of, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def _forget(self, newest: int) -> None:
        rounds = self._rounds()
        known = [number for number in rounds if number <= newest]
        for number in set(rounds) - set(known[-_KEPT_ROUNDS:]):
            folder = self.folder / str(number)
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
