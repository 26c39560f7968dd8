"""Local silence for libraries that report on standard error while they load.

Nothing here changes a global setting for longer than its ``with`` block, and nothing hides a warning that it does
not name: the loaders check what the reports would have told (`federated.adapters.base` refuses missing weights).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet_peft", "quiet_transformers"]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off the terminal within the block."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Drop peft's notices about its own future and about the storage order of Conv1D within the block."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"peft(\.|$)")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        yield
