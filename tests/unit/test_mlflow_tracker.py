"""A run's events in MLflow, read back through MLflow's own client; nothing of it goes over a network."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from federated.config import ExperimentConfig, TaskConfig, TrackingConfig
from federated.errors import ConfigError
from federated.flower.run import run_trackers
from federated.mlflow_tracker import SWITCHES, MlflowTracker
from federated.tracking import Tracker

pytest.importorskip("mlflow")

RUN = {"event": "run", "run_id": "tiny-ab12", "method": "fedit + sgd", "engine": "inprocess", "clients": 2, "rounds": 2,
       "seed": 0, "source": "tiny:bert", "base_digest": "ab", "time": 100.0}  # fmt: skip
ACCOUNTS = [{"unit": "client", "epsilon": 1.5}, {"unit": "example", "epsilon": None}]


def round_of(number: int, **given: Any) -> dict[str, Any]:
    return {"event": "round", "round_number": number, "train_loss": 1.0 / number, "participants": 2, "seconds": 0.5,
            "evaluation": {"loss": 2.0 / number, "version_id": "cd"}, "time": 100.0 + number, **given}  # fmt: skip


def config_with(**tracking: Any) -> ExperimentConfig:
    task = TaskConfig(labels=("no", "yes"))
    return ExperimentConfig(name="tiny", task=task, tracking=TrackingConfig(**tracking))


def client_of(tracker: MlflowTracker) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=tracker.uri)


def only_run(client: Any, experiment: str = "tiny") -> Any:
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return run


def history(client: Any, run: Any, key: str) -> list[tuple[int, float, int]]:
    return [(one.step, one.value, one.timestamp) for one in client.get_metric_history(run.info.run_id, key)]


def test_numbers_stand_at_their_step_and_time(tmp_path: Path) -> None:
    tracker = MlflowTracker(tmp_path, experiment="tiny")
    assert isinstance(tracker, Tracker)
    for event in (RUN, round_of(1), round_of(2, privacy={"accounts": ACCOUNTS}),
                  {"event": "final", "evaluation": {"loss": 0.5}, "time": 103.0},
                  {"event": "end", "status": "completed", "message": ""}):  # fmt: skip
        tracker.emit(event)
    tracker.close()
    client = client_of(tracker)
    run = only_run(client)
    assert history(client, run, "round/train_loss") == [(1, 1.0, 101_000), (2, 0.5, 102_000)]
    assert history(client, run, "held_out/loss") == [(0, 2.0, 101_000), (1, 1.0, 102_000), (2, 0.5, 103_000)]
    assert history(client, run, "epsilon/each_client") == [(2, 1.5, 102_000)]
    assert "epsilon/each_example" not in run.data.metrics  # no bound is no number
    assert (run.data.params["method"], run.data.params["clients"]) == ("fedit + sgd", "2")
    assert (run.info.status, run.info.run_name) == ("FINISHED", "tiny-ab12")
    assert (tmp_path / "mlruns").is_dir()


@pytest.mark.parametrize(
    ("status", "expected"), [("completed", "FINISHED"), ("failed", "FAILED"), ("interrupted", "KILLED")]
)
def test_the_end_is_told(tmp_path: Path, status: str, expected: str) -> None:
    tracker = MlflowTracker(tmp_path, experiment="tiny")
    tracker.emit(RUN)
    tracker.emit({"event": "warning", "message": "worse than before"})
    tracker.emit({"event": "end", "status": status, "message": "why"})
    run = only_run(client_of(tracker))
    assert (run.info.status, run.data.tags["end"], run.data.tags["warning.1"]) == (
        expected, f"{status} why", "worse than before"
    )  # fmt: skip


def test_a_resumed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    for events in ((RUN, round_of(1), {"event": "end", "status": "interrupted", "message": ""}),
                   ({**RUN, "rounds": 3}, round_of(2))):  # fmt: skip
        tracker = MlflowTracker(tmp_path, experiment="tiny")
        for event in events:
            tracker.emit(event)
        tracker.close()
    client = client_of(tracker)
    run = only_run(client)
    assert [step for step, _, _ in history(client, run, "round/train_loss")] == [1, 2]
    assert (run.info.status, run.data.params["rounds"], run.data.tags["resumed.rounds"]) == ("RUNNING", "2", "3")


def test_another_run_is_another_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        MlflowTracker(tmp_path, experiment="tiny").emit({**RUN, "run_id": name})
    client = client_of(MlflowTracker(tmp_path))
    assert len(client.search_runs([client.get_experiment_by_name("tiny").experiment_id])) == 2


def test_no_clients_name_or_word_is_written(tmp_path: Path) -> None:
    tracker = MlflowTracker(tmp_path, experiment="tiny")
    for event in (RUN, {"event": "client", "round_number": 1, "client_id": "north", "message": "patient 17"},
                  {"event": "round_start", "round_number": 1, "cohort": ["north"]},
                  round_of(1, refused=[{"client_id": "north", "message": "patient 17"}])):  # fmt: skip
        tracker.emit(event)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"fedit" in written
    assert b"north" not in written
    assert b"patient" not in written


@pytest.mark.parametrize("uri", ["nonsense://somewhere", "http://user:secret@127.0.0.1:9/"])
def test_a_store_that_cannot_be_used_is_said_at_the_start(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match=r"tracking\.mlflow_uri = .*cannot be used") as error:
        MlflowTracker(tmp_path, uri=uri).emit(RUN)
    assert "secret" not in str(error.value)


def test_a_store_that_goes_away_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = MlflowTracker(tmp_path, experiment="tiny")
    tracker.emit(RUN)
    (tmp_path / "mlruns").rename(tmp_path / "gone")
    with caplog.at_level(logging.WARNING):
        tracker.emit(round_of(1))
        tracker.emit(round_of(2))
        tracker.close()
        tracker.close()
    said = [record.message for record in caplog.records if record.name == "federated.mlflow_tracker"]
    assert len(said) == 2
    assert said[1] == "2 events are not in MLflow; metrics.jsonl has them all"


def test_without_the_extra_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "mlflow" else find(name, *rest)
    )
    with pytest.raises(ConfigError, match=r"federated-peft\[mlflow\]"):
        MlflowTracker(tmp_path)


def test_a_uri_without_the_tracker_is_refused() -> None:
    with pytest.raises(ValueError, match=r"say tracking\.mlflow=true"):
        TrackingConfig(mlflow_uri="http://localhost:5000")


def test_the_store_of_the_server_is_not_sent_to_clients() -> None:
    config = config_with(mlflow=True, mlflow_uri="http://me:secret@tracker")
    assert "secret" not in config.client_json


def test_a_run_has_it_where_the_config_says_so(tmp_path: Path) -> None:
    config = config_with(mlflow=True, progress=False)
    with run_trackers(tmp_path, config) as tracker:
        tracker.emit(RUN)
    assert only_run(client_of(MlflowTracker(tmp_path))).info.run_name == "tiny-ab12"


_QUIET = """
import json, os, socket, sys, threading
calls = []
def watched(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.gethostbyname"):
        calls.append([event, str(args[1:2])])
sys.addaudithook(watched)
from federated.mlflow_tracker import MlflowTracker
tracker = MlflowTracker(sys.argv[1])
for event in json.loads(sys.argv[2]):
    tracker.emit(event)
tracker.close()
print(json.dumps([calls, [one.name for one in threading.enumerate()], os.environ["MLFLOW_DISABLE_TELEMETRY"]]))
"""


def test_nothing_is_asked_of_a_network_and_no_thread_is_left(tmp_path: Path) -> None:
    environment = {
        name: value for name, value in os.environ.items() if name not in (*SWITCHES, "CI", "PYTEST_CURRENT_TEST")
    }
    environment["MLFLOW_DISABLE_TELEMETRY"] = "false"  # a user's wish for statistics is not ours to carry out
    command = [sys.executable, "-c", _QUIET, str(tmp_path), json.dumps([RUN, round_of(1), round_of(2)])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[], ["MainThread"], "true"]
