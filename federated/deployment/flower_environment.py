"""The environment of Flower's processes: a home of their own, off-switches, and loopback past any proxy."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from federated.errors import DeploymentError

__all__ = ["TESTED", "environment", "program"]

TESTED = ("1.41.",)
"""Beginnings of the versions of Flower whose internals are known: what a device changes of them is off with others."""

_LOOPBACK = "localhost,127.0.0.1,::1"

_OFF_SWITCHES: Mapping[str, str] = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""What keeps Flower and its friends from calling anybody but their own servers."""


def environment(flwr_home: Path) -> dict[str, str]:
    """This process's environment for a process of Flower's.

    With the off-switches, a home of its own, and this Python's programs first: Flower starts its own by their names.
    What is on loopback is asked past any proxy. No other switch of Flower's is handed on.
    """
    path = os.pathsep.join([*map(str, _program_folders()), os.environ.get("PATH", os.defpath)])
    own = {"FLWR_HOME": str(flwr_home), "PATH": path, "PYTHONUNBUFFERED": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
    return {**kept, **_OFF_SWITCHES, **_past_proxies(), **own}


def program(name: str) -> str:
    """Path of a program that came with this Python's packages, whatever PATH says.

    Raises:
        DeploymentError: if it is not there.
    """
    folders = _program_folders()
    found = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if found is None:
        looked = ", ".join(map(str, folders))
        raise DeploymentError(f"{name} is not in {looked}; install federated-peft[deploy] with {sys.executable}")
    return str(found)


def _program_folders() -> list[Path]:
    """Beside the interpreter, as in a virtual environment; where a Debian's pip, and where ``pip --user`` puts them."""
    user = sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))
    return list(dict.fromkeys([Path(sys.executable).parent, Path(sysconfig.get_path("scripts")), Path(user)]))


def _past_proxies() -> dict[str, str]:
    """Flower's clients ask proxies of the environment for loopback too."""
    names = ("no_proxy", "NO_PROXY")
    return {name: ",".join(filter(None, [os.environ.get(name, ""), _LOOPBACK])) for name in names}
