"""``fedpeft device join``: take part in a federation, from the section ``training`` of ``device.yaml``."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["COMMANDS"]


def join(
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="The device's configuration.")] = Path(
        "device.yaml"
    ),
) -> None:
    """Train when the federation asks, until SIGTERM or Ctrl-C.

    Runs Flower's SuperNode and a launcher that runs only pinned apps. Example: fedpeft device join --config device.yaml
    """
    from federated.deployment.joining import join as take_part
    from federated.deployment.training_config import read_training_config
    from federated.logs import set_up_logs

    settings = read_training_config(config)
    set_up_logs("join", settings.log_format)
    stop = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.set())
    take_part(settings, stop=stop)


COMMANDS: dict[str, Callable[..., None]] = {"join": join}
"""By name, for the group of `federated.cli.device`."""
