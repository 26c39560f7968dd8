"""Importing the room stays light."""

import subprocess
import sys


def test_importing_the_room_loads_nothing_heavy() -> None:
    heavy = "('pyarrow', 'datasets', 'flwr_datasets', 'torch', 'transformers', 'pandas', 'flwr')"
    code = f"import sys, federated.data; print(sorted(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
