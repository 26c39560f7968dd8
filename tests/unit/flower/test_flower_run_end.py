"""What ends a run, and what ends only its process: the second kind can go on."""

import httpx
import pytest

from federated.errors import NotEnoughUpdates
from federated.flower.run import _from_outside


@pytest.mark.parametrize(
    ("error", "outside"),
    [
        (SystemExit(0), True),  # Flower's answer to a signal, and to a launcher that is gone
        (KeyboardInterrupt(), True),
        (httpx.ConnectError("handshake operation timed out"), True),
        (NotEnoughUpdates("too few"), False),
        (ValueError("a fault of ours"), False),
    ],
)
def test_what_comes_from_outside_is_no_end_of_the_run(error: BaseException, *, outside: bool) -> None:
    assert _from_outside(error) is outside
