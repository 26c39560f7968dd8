"""App folders: the user's copy of ``conf/``, ``clients/`` and ``strategies/``, and how the command finds its parts."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from federated.errors import ConfigError
from federated.flower import ClientApp, use_app_folder

__all__ = ["enter_app", "load_client_app"]


def enter_app(app_dir: Path) -> Path:
    """Make an app folder the current one: relative models and data are found there, in child processes too.

    Raises:
        ConfigError: if there is no such folder.
    """
    folder = app_dir.resolve()
    if not folder.is_dir():
        raise ConfigError(
            f"--app {app_dir}: no such folder; expected one with conf/, clients/app.py, strategies/app.py"
        )
    use_app_folder(folder)
    return folder


def load_client_app(folder: Path) -> ClientApp:
    """Import ``clients.app`` from an app folder, even where another distribution owns the name ``clients``.

    Raises:
        ConfigError: if the folder has no ``clients/app.py`` with a ClientApp ``app``.
    """
    if not (folder / "clients" / "app.py").is_file():
        raise ConfigError(f"{folder} has no clients/app.py; copy the folder clients/ of federated-peft next to conf/")
    if sys.path[0] != str(folder):
        sys.path.insert(0, str(folder))
    loaded = sys.modules.get("clients")
    if loaded is not None and not str(loaded.__file__ or "").startswith(str(folder)):
        for name in [name for name in sys.modules if name == "clients" or name.startswith("clients.")]:
            del sys.modules[name]
    try:
        found = getattr(importlib.import_module("clients.app"), "app", None)
    except Exception as error:  # the folder's own code: whatever it raises
        raise ConfigError(
            f"{folder / 'clients' / 'app.py'} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(found, ClientApp):
        raise ConfigError(f"{folder / 'clients' / 'app.py'}: expected a Flower ClientApp named 'app'")
    return found
