"""Where ``fedpeft`` starts: loads the command line under a guard, then runs it.

Loading typer, rich and numpy takes a third of a second. Ctrl-C must end the process with one line then too, so this
module imports next to nothing itself. `federated.cli.main` holds the commands.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

__all__ = ["main"]


def main() -> None:
    """Entry point of the console script and of ``python -m federated.cli.main``."""
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell's background job ignores Ctrl-C
    if heard:
        # Not KeyboardInterrupt: the modules being loaded may catch it or turn it into an ImportError.
        signal.signal(signal.SIGINT, _stop)
    try:
        from federated.cli.main import main as command

        if heard:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        command()
    except KeyboardInterrupt:  # between the guard and the command line's own, or after that
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _stop(*_: object) -> NoReturn:
    """End at once: nothing was started and nothing written."""
    os.write(2, b"interrupted\n")
    os._exit(130)
