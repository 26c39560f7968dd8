"""A charge on a disk that is really full: refused, nothing granted, and the ledger as it was."""

import os
import shutil
import subprocess

import pytest

from federated.errors import PrivacyError
from federated.privacy.accounting import GaussianSteps
from federated.privacy.ledger import ChargeKey, Ledger

EVENT = GaussianSteps(1.0, 0.5, 10)


def key(number):
    return ChargeKey("run-a", number, 1, "p" * 64)


def opened(path):
    return Ledger.open(path, subject="clinic", data_digest="d" * 64)


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root and mount(8)")
    command = ["mount", "-t", "tmpfs", "-o", "size=65536", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"this machine does not let root mount a tmpfs: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk):
    assert disk.is_mount()
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while file.tell() < 1024 * 1024:
                file.write(bytes(4096))
        except OSError:
            pass
    assert shutil.disk_usage(disk).free == 0


def test_charges_until_the_disk_is_full_and_after(disk):
    """Records fill the last page to its end, where a write is cut short."""
    path = disk / "ledger"
    granted = 0
    with opened(path) as ledger:
        fill(disk)
        with pytest.raises(PrivacyError, match="No space left on device; nothing was granted: free space"):
            for number in range(1, 1000):
                ledger.charge(EVENT, key=key(number))
                granted = number
    assert path.read_bytes().endswith(b"}\n")
    (disk / "filler").unlink()
    with opened(path) as ledger:
        assert len(ledger.events) == granted > 0
        assert ledger.notice == ""
        ledger.charge(EVENT, key=key(granted + 1))


def test_a_new_ledger_on_a_full_disk(disk):
    fill(disk)
    with pytest.raises(PrivacyError, match="No space left on device"):
        opened(disk / "ledger")
    (disk / "filler").unlink()
    opened(disk / "ledger").close()


def test_a_disk_that_cannot_be_written(disk):
    opened(disk / "ledger").close()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(PrivacyError, match="Read-only file system"):
        opened(disk / "ledger")
