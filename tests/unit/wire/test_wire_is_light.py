"""The room works where neither torch nor a database is installed."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
for blocked in ("torch", "sqlalchemy", "flwr", "transformers", "peft"):
    sys.modules[blocked] = None
from federated.manifest import RawTensor
from federated.wire import decode_packet, encode_packet
tensors = {"w": RawTensor("BF16", (2,), bytes(range(4)))}
assert decode_packet(encode_packet({"a": 1}, tensors))[:2] == ({"a": 1}, tensors)
print("ok")
"""


def test_a_packet_goes_round_without_torch_and_sqlalchemy() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == ("ok\n", "")


@pytest.mark.parametrize("module", ["torch", "sqlalchemy", "pydantic"])
def test_importing_the_room_loads_nothing_heavy(module: str) -> None:
    program = f"import sys, federated.wire; print({module!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"
