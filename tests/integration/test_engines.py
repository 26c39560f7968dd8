"""The same experiment gives the same adapter and server state, bit for bit, wherever its clients run."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from federated.cli.apps import load_client_app
from federated.cli.compose import compose
from federated.config import EngineConfig
from federated.flower import TrainingState, simulate
from federated.registry import Registry
from federated.tracking import read_events

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SHUFFLE = 4  # moves somebody in both rounds
OVERRIDES = (
    "experiment=tiny",
    "strategy=fedadam",
    "rounds=2",
    "data.partition.num_clients=3",
    "train.steps=2",
    "tracking.progress=false",
    "selection.wait=200",  # Ray takes its time on a busy machine
)


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: its first and last version, and who answered in which order."""

    initial_digest: str
    weights_digest: str
    training_state: bytes
    arrivals: list[str]


def _outcome(run_dir: Path) -> Outcome:
    with Registry.open(run_dir / "registry", create=False) as registry:
        first, last = registry.get("v0"), registry.get("v2")
        state = registry.training_state(last.version_id)
    assert state is not None
    events = read_events(run_dir / "metrics.jsonl")
    arrivals = [event["client_id"] for event in events if event["event"] == "client"]
    return Outcome(first.manifest.weights_digest, last.manifest.weights_digest, state, arrivals)


def _in_process(engine: EngineConfig, run_dir: Path) -> None:
    config = replace(compose(ROOT, OVERRIDES), engine=engine, run_dir=str(run_dir))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPEFT_CLIENT_STORE", str(run_dir))  # the run sets its own: put back what was there
        simulate(config, load_client_app(ROOT))


def _by_command(engine: EngineConfig, run_dir: Path, *overrides: str) -> None:
    """In a process group of its own: whatever Ray leaves is ended with it."""
    command = [str(Path(sys.executable).parent / "fedpeft"), "simulate", "--app", str(ROOT), *OVERRIDES, *overrides]
    command += [f"engine={engine.name}", f"engine.workers={engine.workers}", f"run_dir={run_dir}"]
    with (run_dir.parent / "ray.log").open("w") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=240)
        finally:
            _end_group(process.pid)
    assert code == 0, (run_dir.parent / "ray.log").read_text()


def _end_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


@pytest.fixture(scope="module")
def sequential(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What one process makes of it, one client after the other."""
    run_dir = tmp_path_factory.mktemp("sequential") / "run"
    _in_process(EngineConfig("inprocess", workers=1), run_dir)
    return _outcome(run_dir)


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The same on two forked workers, whose replies are handed out in a random order."""
    run_dir = tmp_path_factory.mktemp("shuffled") / "run"
    _in_process(EngineConfig("inprocess", workers=2, shuffle_arrivals=SHUFFLE), run_dir)
    return _outcome(run_dir)


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The same on Flower's Ray engine."""
    run_dir = tmp_path_factory.mktemp("ray") / "run"
    _by_command(EngineConfig("ray", workers=2), run_dir)
    return _outcome(run_dir)


@pytest.fixture(scope="module")
def buffered_ray(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The same there, in buffered rounds that take everybody: nothing is stale."""
    run_dir = tmp_path_factory.mktemp("buffered") / "run"
    _by_command(EngineConfig("ray", workers=2), run_dir, "round.mode=buffered", "round.buffer=3", "selection.wait=200")
    return _outcome(run_dir)


@pytest.fixture(params=["shuffled", "ray", "buffered_ray"])
def other(request: pytest.FixtureRequest) -> Outcome:
    """The same experiment on another engine."""
    found: Outcome = request.getfixturevalue(request.param)
    return found


def test_run_moves_the_adapter(sequential: Outcome) -> None:
    assert sequential.weights_digest != sequential.initial_digest


def test_state_holds_factors_head_and_moments(sequential: Outcome) -> None:
    state = TrainingState.from_bytes(sequential.training_state)
    names = set(state.global_state.adapter.tensors)
    assert {name.rpartition(".")[2] for name in names} == {"factor_a", "factor_b", "weight", "bias"}
    assert set(state.optimizer_state.moments) == {f"{moment}/{name}" for moment in "mv" for name in names}


def test_replies_arrive_in_another_order(sequential: Outcome, shuffled: Outcome) -> None:
    rounds = [slice(0, 3), slice(3, 6)]
    assert [part for part in rounds if shuffled.arrivals[part] == sequential.arrivals[part]] == []


def test_weights_are_the_same(sequential: Outcome, other: Outcome) -> None:
    assert other.weights_digest == sequential.weights_digest


def test_training_state_is_the_same_bit_for_bit(sequential: Outcome, other: Outcome) -> None:
    assert other.training_state == sequential.training_state
