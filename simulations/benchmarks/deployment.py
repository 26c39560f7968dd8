"""A secured deployment against plain Flower with the same clients: a round beyond the work, bytes on the wire.

    python -m simulations.benchmarks.deployment [--quick] [--seed N]

Ours is what ``fedpeft deploy up`` starts: TLS, authentication, signed updates, pinned app, warm launchers, two
devices. Plain Flower is a SuperLink and two SuperNodes as its documentation starts them, without TLS, each message a
process of its own, FedAvg with training and evaluation. Both train the same tiny model on as much text. ``--quick``
(up to 180 s: two deployments are started) runs 5 rounds of ours and 3 of Flower's, else 20 and 10.

- ``deploy_up_to_first_round_seconds``: from the command to the first published round.
- ``round_overhead_seconds``: median round beyond the clients' own work, which the same training takes in this process.
- ``flower_overhead_over_ours``: the same of plain Flower, over ours.
- ``wire_bytes_over_delta_bytes``: bytes of a client's requests, as the door counted them, for each byte of its deltas.

The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from federated.config import ExperimentConfig, experiment_from
from federated.deployment.flower_environment import environment
from federated.deployment.layout import Layout
from federated.deployment.loopback import free_ports
from federated.deployment.processes import Processes
from federated.flower.session import open_session
from federated.manifest import TrainPlan
from federated.tracking import read_events

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[2]
PARTS = Path(__file__).parent / "parts"
OVERRIDES = ("experiment=tiny", "adapter.rank=32", "train.steps=4", "round.poll_interval=0.1")
_PYPROJECT = """
[project]
name = "plain-flower"
version = "1.0.0"
description = "FedAvg"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "benchmark"
[tool.flwr.app.components]
serverapp = "server:app"
clientapp = "client:app"
[tool.flwr.app.config]
experiment = ""
rounds = 1
times = ""
"""


def main() -> None:
    """Run both, show and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 180 s")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with console.status("a secured deployment: two devices"):
            ours = _ours(folder / "ours", rounds=5 if given.quick else 20, seed=given.seed)
        with console.status("plain Flower: two SuperNodes"):
            plain = _plain(folder / "plain", rounds=2 if given.quick else 10, seed=given.seed)
    work = _work(given.seed)
    overhead = max(1e-3, statistics.median(ours.rounds) - work)
    figures = {
        "deploy_up_to_first_round_seconds": round(ours.first, 1),
        "round_overhead_seconds": round(overhead, 2),
        "flower_overhead_seconds": round(statistics.median(plain) - work, 2),
        "flower_overhead_over_ours": round((statistics.median(plain) - work) / overhead, 2),
        "work_seconds": round(work, 3),
        "wire_bytes_over_delta_bytes": round(ours.wire, 2),
    }
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, str(value))
    console.print(table)
    print(json.dumps({**figures, "seed": given.seed, "quick": given.quick}))


class Ours:
    """What a deployment's own records say.

    Args:
        folder: of the deployment.
        began: seconds since the epoch at the command.
    """

    def __init__(self, folder: Path, began: float) -> None:
        layout = Layout(folder)
        metrics = next(layout.runs.glob("*/metrics.jsonl"))
        events = list(read_events(metrics))
        rounds = [event for event in events if event["event"] == "round"]
        self.first = float(rounds[0]["time"]) - began
        self.rounds = [float(event["seconds"]) for event in rounds[1:]]  # the first one opens the model
        sent = sum(float(event["bytes_up"]) for event in rounds)
        flows = json.loads(layout.traffic.read_text())["flows"].values()
        self.wire = sum(flow["up"] for flow in flows) / sent


def _ours(folder: Path, *, rounds: int, seed: int) -> Ours:
    began = time.time()
    command = [sys.executable, "-m", "federated.cli.main", "deploy"]
    said = ["--nodes", "2", "--app", str(ROOT), *OVERRIDES, f"seed={seed}", f"rounds={rounds}"]
    try:
        done = subprocess.run(
            [*command, "up", "--folder", str(folder), *said],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"deploy up failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        time.sleep(3)  # the door writes its counts down
        return Ours(folder, began)
    finally:
        Processes(Layout(folder)).stop()


def _plain(folder: Path, *, rounds: int, seed: int) -> list[float]:
    """Seconds of each round after the first."""
    app = folder / "plain-flower"
    app.mkdir(parents=True)
    (app / "pyproject.toml").write_text(_PYPROJECT)
    for name in ("server", "client"):
        shutil.copy(PARTS / f"plain_flower_{name}.py", app / f"{name}.py")
    port = free_ports(1)[0]
    home = folder / "home"
    home.mkdir()
    address = f"127.0.0.1:{port}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{address}"\ninsecure = true\n'
    )
    own = {**environment(home), "PYTHONPATH": str(ROOT)}
    times = folder / "times.json"
    values = {"experiment": _experiment(seed).client_json, "rounds": rounds, "times": str(times)}
    config = folder / "run.toml"
    config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    link = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
    with (
        _process(link, own, folder),
        _process(_node(address, 0), own, folder),
        _process(_node(address, 1), own, folder),
    ):
        time.sleep(5)
        done = subprocess.run(
            [_program("flwr"), "run", str(app), "here", "--run-config", str(config), "--stream"],
            env=own,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    ends = json.loads(times.read_text()) if times.is_file() else []
    if len(ends) < rounds + 1:
        raise SystemExit(f"plain Flower did not finish: {(done.stdout + done.stderr)[-2000:]}")
    return [after - before for before, after in itertools.pairwise(ends[1:])]


def _node(address: str, index: int) -> list[str]:
    found = ["flower-supernode", "--insecure", "--superlink", address, "--port", str(free_ports(1)[0])]
    return [*found, "--node-config", f"partition-id={index} num-partitions=2"]


def _program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


@contextmanager
def _process(command: list[str], own: dict[str, str], folder: Path) -> Iterator[None]:
    with (folder / "processes.log").open("ab") as log:
        process = subprocess.Popen(
            [_program(command[0]), *command[1:]], env=own, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _experiment(seed: int) -> ExperimentConfig:
    return experiment_from({**_CONFIG, "seed": seed})


_CONFIG = {
    "adapter": {"rank": 32},
    "train": {"steps": 4},
    "task": {"labels": ["negative", "neutral", "positive"]},
}


def _work(seed: int) -> float:
    """Seconds of one client's training, here, once everything is in memory."""
    session = open_session(_experiment(seed))
    data = session.local_data(session.source.client_ids[0])
    plan = TrainPlan(rank=session.initial.spec.rank)
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        session.trainer.run(session.initial, plan, data, seed=1)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
