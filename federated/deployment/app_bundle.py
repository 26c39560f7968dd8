"""An app folder as Flower bundles it: the files that go in, and the digest that devices pin."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
import tomllib
from pathlib import Path

from federated.deployment.flower_environment import environment, program
from federated.errors import DeploymentError

__all__ = ["app_digest", "app_name", "copied"]


def app_digest(app: Path) -> str:
    """SHA-256 of the bundle that Flower makes of an app folder: what devices pin.

    Raises:
        DeploymentError: if Flower cannot make one.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = copied(app, Path(place))
        done = subprocess.run(
            [program("flwr"), "build", "--app", str(folder)],
            cwd=place,
            env=environment(Path(place) / "home"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        found = list(Path(place).glob("*.fab"))
        if done.returncode or len(found) != 1:
            said = " ".join((done.stdout + done.stderr).split())[-400:]
            raise DeploymentError(
                f"flwr build {app}: {said}; an app folder has pyproject.toml, clients/ and strategies/"
            )
        return hashlib.sha256(found[0].read_bytes()).hexdigest()


def app_name(app: Path) -> str:
    """An app folder's own name.

    Raises:
        DeploymentError: if it is none.
    """
    try:
        return str(tomllib.loads((app / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        raise DeploymentError(
            f"{app.resolve()} is no app folder: expected a pyproject.toml with [project] name, and clients/, conf/, "
            "strategies/; say --app DIR"
        ) from None


def copied(app: Path, place: Path) -> Path:
    """The app's own files alone: a bundle must not change with what lies about in a checkout."""
    name = app_name(app)
    folder = place / Path(name).name
    folder.mkdir()
    for name in ("clients", "conf", "strategies"):
        if (app / name).is_dir():
            shutil.copytree(app / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (app / name).is_file():
            shutil.copy(app / name, folder / name)
    return folder
