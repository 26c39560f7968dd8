"""The demonstration end to end: words are read out of an undefended delta, and not under example-level privacy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_quick_reads_what_is_undefended_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "simulations.attacks.read_the_delta", "--quick", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=850)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["recovered_undefended"] > 0.85
    for defended in ("recovered_example_dp", "recovered_client_dp_release", "recovered_noise_1x"):
        assert found[defended] < 0.1, defended
    assert 7.9 < found["epsilon"] <= 8.0
    assert found["privacy_unit"] == "example"
    undefended, _, private = found["read"].values()
    assert undefended == found["messages"]
    assert not set(found["messages"]) & set(private)
    assert "cancer" in (tmp_path / "read_the_delta.svg").read_text(encoding="utf-8")
