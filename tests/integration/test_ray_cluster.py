"""``engine=ray`` on a cluster: two Ray nodes on loopback give the weights that one process gives."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from federated.cli.apps import load_client_app
from federated.cli.compose import compose
from federated.deployment.loopback import free_ports
from federated.flower import simulate
from federated.registry import Registry

pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TINY = ("experiment=tiny", "rounds=2", "tracking.progress=false")


def _ray(*arguments: str) -> str:
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(BIN / "ray"), *arguments], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def cluster() -> Iterator[str]:
    """Two nodes of one processor each."""
    port = free_ports(1)[0]
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # a socket's path must be short
        try:
            _ray(
                *("start", "--head", f"--port={port}", "--num-cpus=1", "--node-ip-address=127.0.0.1"),
                *("--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}"),
            )
            _ray("start", f"--address=127.0.0.1:{port}", "--num-cpus=1", "--disable-usage-stats")
            yield f"127.0.0.1:{port}"
        finally:
            _ray("stop", "--force")


def _digest(run_dir: Path) -> str:
    with Registry.open(run_dir / "registry", create=False) as registry:
        return registry.get("v2").manifest.weights_digest


def _simulate(run_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "fedpeft"), "simulate", "--app", str(ROOT), *TINY, "selection.wait=240", "engine=ray"]
    return subprocess.run(
        [*command, *overrides, f"run_dir={run_dir}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_two_machines_give_the_weights_of_one_process(cluster: str, tmp_path: Path) -> None:
    done = _simulate(tmp_path / "ray", f"engine.address={cluster}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 machines" in done.stderr + done.stdout or len(_ray("status", "--address", cluster).split(" 1 node_")) == 3
    config = replace(compose(ROOT, TINY), run_dir=str(tmp_path / "here"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPEFT_CLIENT_STORE", str(tmp_path))
        simulate(config, load_client_app(ROOT))
    assert _digest(tmp_path / "ray") == _digest(tmp_path / "here")


def test_no_cluster_is_said_in_one_line(tmp_path: Path) -> None:
    done = _simulate(tmp_path / "ray", f"engine.address=127.0.0.1:{free_ports(1)[0]}")
    assert done.returncode == 2
    assert "no Ray cluster there" in done.stderr
