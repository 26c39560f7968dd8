"""Start a program that ends with the process that started it: what a killed manager leaves would keep its ports.

``python -I -S with_parent.py PROGRAM ARGUMENTS...``: run as a file and without the library, which takes 20 ms. Linux
tells the program with SIGTERM that its parent is gone. Other systems do not: what is left there is ended by hand.
"""

import ctypes
import os
import signal
import sys

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Become the program."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it went in between
            sys.exit(1)
    os.execv(sys.argv[1], sys.argv[1:])  # noqa: S606 - the deployment's own programs


if __name__ == "__main__":
    main()
