"""The room's names are loaded when they are asked for, and found like any others."""

import subprocess
import sys

import pytest

import federated.flower


def test_every_name_is_there_and_shown() -> None:
    assert [name for name in federated.flower.__all__ if getattr(federated.flower, name, None) is None] == []
    assert set(federated.flower.__all__) == set(federated.flower._HOMES) <= set(dir(federated.flower))
    with pytest.raises(AttributeError, match="has no attribute 'nobody'"):
        _ = federated.flower.nobody


def test_a_simulation_loads_what_its_workers_inherit_before_they_are_forked() -> None:
    code = """
import sys
from pathlib import Path
from federated.cli.compose import compose
from federated.flower import engines

def seen(config):
    print("federated.flower.client_task" in sys.modules)
    sys.exit(0)

engines._check_data = seen
engines.simulate(compose(Path(sys.argv[1]), ["experiment=tiny"]), None)
"""
    here = __file__.rpartition("/tests/")[0]
    done = subprocess.run([sys.executable, "-c", code, here], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]
