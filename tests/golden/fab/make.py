"""Write the list of the files in Flower's app bundle beside this script: ``python tests/golden/fab/make.py``.

What is on the list is sent to every node and comes first on its import path: a new line deserves a look.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
LIST = Path(__file__).with_name("files.txt")
APP_FOLDERS = ("clients", "conf", "strategies")
APP_FILES = ("pyproject.toml", "README.md", "LICENSE")


def copy_app(folder: Path) -> None:
    """Copy what makes the repository a Flower app."""
    for name in APP_FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in APP_FILES:
        shutil.copy(ROOT / name, folder / name)


def build(folder: Path, *, home: Path) -> Path:
    """Build the bundle of an app folder, in that folder."""
    environment = {**os.environ, "FLWR_HOME": str(home), "FLWR_DISABLE_UPDATE_CHECK": "1"}
    command = [str(Path(sys.executable).parent / "flwr"), "build"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)
    (bundle,) = folder.glob("*.fab")
    return bundle


def names(bundle: Path) -> list[str]:
    """The files in a bundle, sorted."""
    return sorted(zipfile.ZipFile(bundle).namelist())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        app = Path(scratch) / "federated-peft"
        app.mkdir()
        copy_app(app)
        LIST.write_text("".join(f"{name}\n" for name in names(build(app, home=Path(scratch) / "home"))))
