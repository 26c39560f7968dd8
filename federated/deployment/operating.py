"""The operator's process beside the SuperLink: keeps runs going.

Run as ``python -m federated.deployment.operating FOLDER``.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from pathlib import Path

from federated.deployment.layout import Layout
from federated.deployment.runs import Runs
from federated.deployment.server_config import read_server_config
from federated.errors import FederatedError

__all__ = ["keep"]

_LOG = logging.getLogger(__name__)
_LOOK = 10.0  # seconds


def keep(folder: Path, stop: threading.Event) -> None:
    """Resume runs that died, until ``stop`` is set.

    Raises:
        ConfigError: if the deployment's configuration cannot be read.
    """
    config = read_server_config(folder)
    runs = Runs(Layout(folder), config)
    said = ""
    while config.keep_going and not stop.wait(_LOOK):
        try:
            for submission in runs.keep_going():
                _LOG.warning("run %s died and goes on, attempt %d", submission.name, len(submission.flower_runs))
            said = ""
        except FederatedError as error:
            if str(error) != said:
                _LOG.warning("cannot look after the runs: %s", error)
            said = str(error)
    stop.wait()


if __name__ == "__main__":
    os.umask(0o077)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s operator: %(message)s")
    keep(Path(sys.argv[1]).resolve(), threading.Event())
