"""The accountant of privacy loss distributions: the one importer of dp-accounting.

Both directions, the addition and the removal of one, are composed, and the larger epsilon counts. The distributions are
rounded up ("connect the dots"), so a coarse grid is safe, and no more than loose.

Source: Doroshenko et al., "Connect the Dots: Tighter Discrete Approximations of Privacy Loss Distributions", 2022.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from federated.errors import PrivacyError
from federated.privacy.opacus_accountants import Gaussians

__all__ = ["pld_epsilon"]

_FINEST = 1e-4
_CELLS = 1e4  # a hundred times as many move the fourth digit


def pld_epsilon(events: Gaussians, target_delta: float, *, rough: float) -> float:
    """Epsilon by composing privacy loss distributions: an upper bound.

    Args:
        events: composed, in any order.
        target_delta: in (0, 1).
        rough: a bound on epsilon, which sets the grid: a finer one would not fit into memory.

    Raises:
        PrivacyError: if dp-accounting is not installed.
    """
    accounting, pld = _dp_accounting()
    accountant = pld.PLDAccountant(value_discretization_interval=max(_FINEST, rough / _CELLS))
    for noise, sampling, steps in events:
        gaussian = accounting.GaussianDpEvent(noise)
        accountant.compose(gaussian if sampling == 1.0 else accounting.PoissonSampledDpEvent(sampling, gaussian), steps)
    return max(0.0, float(accountant.get_epsilon(target_delta)))


@cache
def _dp_accounting() -> tuple[Any, Any]:
    try:
        import dp_accounting
        from dp_accounting import pld
    except ImportError:
        raise PrivacyError(
            "privacy.accountant = pld needs dp-accounting, which is not installed; pip install federated-peft[pld], "
            "or set privacy.accountant=prv"
        ) from None
    _let_go_of_stderr()
    return dp_accounting, pld


def _let_go_of_stderr() -> None:
    """Have absl, which dp-accounting logs with, write to the process's own standard error.

    Its handler keeps whatever ``sys.stderr`` was at the time, and closes it when logging is set up anew (Hydra does):
    under redirection, in notebooks and in tests that is somebody else's file.
    """
    from absl import logging as absl_logging

    absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__
