"""A run's events in MLflow: the only importer of mlflow, and of that the small package without a server.

Without a URI of the user's everything is files below the run's folder, and nothing goes over a network: MLflow's own
usage statistics are switched off before it is loaded, and its client is used, which looks neither for git nor for a
cloud. `federated.flower.run` makes one where ``tracking.mlflow`` asks for it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from federated.errors import ConfigError
from federated.tracking import Scalars

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

__all__ = ["MlflowTracker", "SWITCHES"]

_LOG = logging.getLogger(__name__)

SWITCHES: Mapping[str, str] = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",  # MLflow keeps it, and asks whoever uses it to say so
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""Environment that MLflow is loaded with; what the user has set stays, except for the first, which is always so."""

_RUN = "fedpeft.run_id"
_PARAMS = ("method", "engine", "clients", "rounds", "seed", "source", "base_digest", "base_params", "adapter_params")
_STATES = {"completed": "FINISHED", "interrupted": "KILLED"}
_LONGEST_PARAM, _LONGEST_TAG = 500, 1_000


class MlflowTracker:
    """Writes a run's settings, its numbers by round, warnings and end to MLflow; a resumed run goes on where it was.

    The numbers and their steps are those of `federated.tracking.TensorBoardTracker`. The first event must reach the
    store; later ones that do not are said once and counted: a tracker never ends a run.

    Args:
        folder: of the run.
        uri: of a tracking store, as MLflow takes it; empty: ``mlruns`` in the folder.
        experiment: its name there.

    Raises:
        ConfigError: if the ``mlflow`` extra is not installed.
    """

    def __init__(self, folder: str | Path, *, uri: str = "", experiment: str = "federated-peft") -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise ConfigError(
                "tracking.mlflow = true: the mlflow package is not installed; "
                "run pip install 'federated-peft[mlflow]' or set tracking.mlflow=false"
            )
        self.uri = uri or (Path(folder).resolve() / "mlruns").as_uri()
        self._experiment = experiment
        self._scalars = Scalars()
        self._client: MlflowClient | None = None
        self._run = ""
        self._warnings = 0
        self._lost = 0

    def emit(self, event: Mapping[str, Any]) -> None:
        """Write what the event holds.

        Raises:
            ConfigError: if the store cannot be used when the run begins.
        """
        if event.get("event") == "run":
            self._begin(event)
        elif self._client is not None:
            client = self._client
            self._tried(lambda: self._write(client, event))

    def _begin(self, event: Mapping[str, Any]) -> None:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = SWITCHES["MLFLOW_DISABLE_TELEMETRY"]
        for name, value in SWITCHES.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        try:
            self._client = MlflowClient(tracking_uri=self.uri)
            self._run = self._opened(self._client, event)
            params = {key: str(event[key])[:_LONGEST_PARAM] for key in _PARAMS if event.get(key) is not None}
            self._put_params(self._client, params)
        except Exception as error:  # noqa: BLE001 - MLflow's stores raise bare exceptions too
            raise ConfigError(
                f"tracking.mlflow_uri = {_place(self.uri)}: cannot be used: {self._said(error)}"
            ) from None

    def _opened(self, client: MlflowClient, event: Mapping[str, Any]) -> str:
        """MLflow's id of this run: the one that was there, or a new one."""
        run_id = str(event.get("run_id") or "run")
        found = client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found else client.create_experiment(self._experiment)
        known = client.search_runs([experiment], filter_string=f"tags.`{_RUN}` = '{run_id.replace(chr(39), '')}'")
        if known:
            client.update_run(known[0].info.run_id, status="RUNNING")
            return str(known[0].info.run_id)
        return str(client.create_run(experiment, run_name=run_id, tags={_RUN: run_id}).info.run_id)

    def _put_params(self, client: MlflowClient, params: Mapping[str, str]) -> None:
        """A parameter is written once; what a resumed run changed, such as its rounds, becomes a tag beside it."""
        from mlflow.entities import Param

        there = client.get_run(self._run).data.params
        client.log_batch(self._run, params=[Param(key, text) for key, text in params.items() if key not in there])
        for key, text in params.items():
            if there.get(key, text) != text:
                client.set_tag(self._run, f"resumed.{key}", text)

    def _write(self, client: MlflowClient, event: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        at = int(1000 * float(event.get("time") or 0.0))
        batch = [Metric(tag, value, at, step) for tag, value, step in self._scalars.of(event)]
        if batch:
            client.log_batch(self._run, metrics=batch)
        if event.get("event") == "warning":
            self._warnings += 1
            client.set_tag(self._run, f"warning.{self._warnings}", str(event.get("message"))[:_LONGEST_TAG])
        if event.get("event") == "end":
            client.set_tag(
                self._run, "end", f"{event.get('status')} {event.get('message') or ''}".strip()[:_LONGEST_TAG]
            )
            client.set_terminated(self._run, status=_STATES.get(str(event.get("status")), "FAILED"))

    def _tried(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - MLflow's stores raise bare exceptions too
            if not self._lost:
                _LOG.warning("MLflow does not take this run's events (%s); metrics.jsonl has all", self._said(error))
            self._lost += 1

    def _said(self, error: Exception) -> str:
        """What went wrong, in a line, without the password that the URI may have."""
        secret = urlsplit(self.uri).password
        text = " ".join(str(error).split())
        return (text.replace(secret, "***") if secret else text)[:300]

    def close(self) -> None:
        """Say how much did not arrive."""
        if self._lost:
            _LOG.warning("%d events are not in MLflow; metrics.jsonl has them all", self._lost)
            self._lost = 0


def _place(uri: str) -> str:
    """The URI without user, password and query."""
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query="").geturl()
