"""Slots must run where neither torch nor SQLAlchemy is installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

import federated.device

BLOCK = """
import sys
for name in ("torch", "sqlalchemy", "transformers", "peft"):
    sys.modules[name] = None
"""


@pytest.mark.parametrize(
    "statement",
    [
        "from federated.device.slots import AdapterRuntime",
        "from federated.device import AdapterRuntime, Backend, recipe_of",
        "import federated.cli.device",
    ],
)
def test_imports_neither_torch_nor_sqlalchemy(statement: str) -> None:
    done = subprocess.run([sys.executable, "-c", BLOCK + statement], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_heavy_names_load_on_demand() -> None:
    from federated.device.backends.torch import TorchBackend

    assert federated.device.TorchBackend is TorchBackend


def test_every_public_name_is_there() -> None:
    assert [name for name in federated.device.__all__ if getattr(federated.device, name, None) is None] == []


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = federated.device.nothing
