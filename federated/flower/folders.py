"""Where the app and what simulated clients remember are: said once, and known to child processes too."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["app_folder", "client_store", "use_app_folder", "use_client_store"]

_APP_VARIABLE = "FEDPEFT_APP"
_STORE_VARIABLE = "FEDPEFT_CLIENT_STORE"


def use_app_folder(path: Path) -> None:
    """Say where the app folder is (for child processes too): relative model and data folders are looked up there."""
    os.environ[_APP_VARIABLE] = str(path.resolve())


def app_folder() -> Path | None:
    """The app folder, if one was named."""
    value = os.environ.get(_APP_VARIABLE)
    return Path(value) if value else None


def use_client_store(path: Path) -> None:
    """Say where simulated clients keep what they remember, in child processes as well."""
    os.environ[_STORE_VARIABLE] = str(path.resolve())


def client_store() -> str:
    """Folder in which simulated clients keep what they remember."""
    default = Path.home() / ".cache" / "federated-peft" / "clients"
    return os.environ.get(_STORE_VARIABLE, str(default))
