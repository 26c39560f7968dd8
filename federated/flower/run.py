"""One run on the server's side: its folder, registry, trackers and strategy, from a config to a report.

The folder holds ``config.yaml`` (resolved), ``run.json`` (ids), ``tasks.key`` (`federated.flower.run_key`),
``metrics.jsonl``, ``registry/`` unless the config names another, ``versions.json`` and ``report.html``. Engines hand
`Run.serve` a Grid; nothing here knows which.
"""

from __future__ import annotations

import json
import logging
import secrets
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from flwr.serverapp import Grid

from federated import __version__
from federated.aggregation import check_combination, make_rule
from federated.config import ExperimentConfig
from federated.display import LiveDisplay
from federated.errors import ConfigError, FederatedError, NotEnoughUpdates, RunInterrupted, StorageFull, VersionNotFound
from federated.files import sync_folder, write_whole
from federated.flower.enrolled import read_devices
from federated.flower.folders import app_folder
from federated.flower.publisher import RegistryPublisher, TrainingState
from federated.flower.run_key import kept_key
from federated.flower.server_privacy import ServerPrivacy
from federated.flower.session import Session, open_session
from federated.flower.starting import Start, start_of
from federated.flower.strategy import DeltaStrategy
from federated.logs import LogTracker
from federated.mlflow_tracker import MlflowTracker
from federated.registry import Registry, VersionRecord
from federated.report import write_report
from federated.run_history import history_of, result_warning
from federated.run_lock import serving
from federated.tracking import JsonlTracker, MultiTracker, TensorBoardTracker, Tracker, read_events

__all__ = ["Run", "RunSummary", "run_trackers", "write_versions"]

_LOG = logging.getLogger(__name__)
_ENDED = "its process was told to end, or lost the SuperLink; finished rounds are published"
_PERSONAL = "each client keeps a part of the model and is measured with its own: no version of this run can be served"


@dataclass(frozen=True)
class RunSummary:
    """What a finished run leaves.

    Args:
        run_id: the run.
        run_dir: its folder.
        registry: location of the registry.
        version_id: of the last version.
        weights_digest: of that version's adapter.
        report: path of ``report.html``.
    """

    run_id: str
    run_dir: Path
    registry: str
    version_id: str
    weights_digest: str
    report: Path


@contextmanager
def run_trackers(run_dir: Path, config: ExperimentConfig) -> Iterator[MultiTracker]:
    """The run's trackers: JSON lines always; others when asked for, log lines on a deployment. Closed on leaving."""
    trackers: list[Tracker] = [JsonlTracker(run_dir / "metrics.jsonl")]
    if config.tracking.tensorboard:
        trackers.append(TensorBoardTracker(run_dir / "tensorboard"))
    if config.tracking.mlflow:
        trackers.append(MlflowTracker(run_dir, uri=config.tracking.mlflow_uri, experiment=config.name))
    if config.engine.name == "deployment" or config.tracking.log_format == "json":
        trackers.append(LogTracker(run_dir.name))
    if config.tracking.progress:
        trackers.append(LiveDisplay())
    tracker = MultiTracker(trackers)
    try:
        yield tracker
    finally:
        tracker.close()


class Run:
    """Opens a run's folder and working parts; `serve` runs the rounds.

    Args:
        config: the experiment; with ``resume`` its ``run_dir`` must hold a run that was started before.

    Raises:
        ConfigError: if the run folder cannot be used.
        FederatedError: whatever is wrong with model, data or adapter, before anything starts.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        if config.resume and not (Path(config.run_dir) / "run.json").is_file():
            raise ConfigError(f"resume: {config.run_dir} holds no run (no run.json); give run_dir= the run's folder")
        rule = make_rule(config.strategy.rule, config.strategy.options)
        check_combination(rule, config)  # before anything is left on the disk
        if config.start_from and not config.registry:
            raise ConfigError(f"start_from = {config.start_from}: say with registry= which registry holds that version")
        if config.registry and "://" not in config.registry:  # a resumed run must find it from any folder
            config = replace(config, registry=str(Path(config.registry).resolve()))
        if config.registry_blobs and "://" not in config.registry_blobs:
            config = replace(config, registry_blobs=str(Path(config.registry_blobs).resolve()))
        if config.admission.devices:
            devices = Path(config.admission.devices).resolve()
            read_devices(devices)
            config = replace(config, admission=replace(config.admission, devices=str(devices)))
        self.session: Session = open_session(config)
        self.clients = len(self.session.source.client_ids)
        self.folder, self.run_id = self._folder(config)
        self.config = replace(config, run_dir=str(self.folder))
        self.registry_location = self.config.registry or str(self.folder / "registry")

    @staticmethod
    def _folder(config: ExperimentConfig) -> tuple[Path, str]:
        folder = Path(config.run_dir).resolve()
        try:
            if config.resume:
                run_id = str(json.loads((folder / "run.json").read_text())["run_id"])
                _write_config(folder, config)  # the number of rounds may be new
                return folder, run_id
            folder = _fresh(folder)
            run_id = f"{config.name}-{secrets.token_hex(4)}"
            _write_config(folder, config)
            record = {"run_id": run_id, "name": config.name, "code_version": __version__}
            _write(folder / "run.json", json.dumps(record))
        except OSError as error:
            raise ConfigError(f"run_dir = {folder}: {error.strerror}; choose another with run_dir=") from None
        except (ValueError, KeyError):
            raise ConfigError(f"resume: {folder / 'run.json'} is damaged; start a new run") from None
        return folder, run_id

    def serve(self, grid: Grid) -> RunSummary:
        """Run all rounds on this Grid, publish each, and write the report.

        Raises:
            RunInterrupted: on Ctrl-C.
            NotEnoughUpdates: if no round moved the global adapter.
            ConfigError: if another server works on this run.
            FederatedError: what ended the run; the report covers what was finished.
        """
        with serving(self.folder), self.open_registry() as registry:
            registry.require_base(self.session.adapter.base.base_digest)
            with run_trackers(self.folder, self.config) as tracker:
                status, message = "failed", ""
                strategy: DeltaStrategy | None = None
                try:
                    strategy = self._strategy(registry, tracker)
                    personal = strategy.rule.properties.personal
                    tracker.emit(
                        self.description(strategy.method, resumed_after=strategy.server.finished, personal=personal)
                    )
                    self._all_rounds(strategy, grid)
                    self.warn(tracker)
                    status, message = "completed", strategy.stopped
                except RunInterrupted as error:
                    status, message = "interrupted", self.how_to_go_on(str(error))
                    raise
                except FederatedError as error:
                    message = str(error)
                    raise
                except BaseException as error:
                    if _from_outside(error):
                        status, message = "interrupted", _ENDED
                    raise
                finally:
                    if strategy is not None:
                        strategy.close()
                    self._close(registry, tracker, status, message=message)
            return self.summary(registry, strategy.version_id or "")

    def open_registry(self) -> Registry:
        """The run's registry; what the run does there is noted under its id.

        Raises:
            RegistryError: if it cannot be opened.
        """
        blobs = self.config.registry_blobs or None
        return Registry.open(self.registry_location, blobs=blobs, actor=f"run {self.run_id}"[:200])

    def _all_rounds(self, strategy: DeltaStrategy, grid: Grid) -> None:
        finished = strategy.server.finished
        result = strategy.start(grid)
        if self.config.rounds > finished and not (result.train_metrics_clientapp or strategy.stopped):
            raise NotEnoughUpdates(
                f"no round from {finished + 1} to {self.config.rounds} moved the global adapter, for want of good "
                f"updates; {self.folder / 'report.html'} gives the reason of each client"
            )

    def warn(self, tracker: Tracker) -> None:
        """Say so when the run made its adapter worse. Nothing else follows from it: every version is kept.

        Raises:
            DataError: if the run's metrics cannot be read back.
        """
        message = result_warning(history_of(read_events(self.folder / "metrics.jsonl")))
        if message:
            tracker.emit({"event": "warning", "message": message})
            if not self.config.tracking.progress:  # nobody else shows it
                _LOG.warning("warning: %s", message)

    def _close(self, registry: Registry, tracker: Tracker, status: str, *, message: str) -> None:
        """Note the end and write the report; never hides why a run ended."""
        try:
            tracker.emit({"event": "end", "status": status, "message": message})
            self.leave(registry)
        except FederatedError as error:
            if status == "completed":
                raise
            _LOG.warning("the run's last records are missing: %s", error)

    def how_to_go_on(self, stopped: str) -> str:
        """What happened, and the command that goes on with this run."""
        command = ["fedpeft", "simulate", "--resume", str(self.folder)]
        app = app_folder()
        if app is not None and app != Path.cwd():
            command += ["--app", str(app)]
        return f"{stopped}; to go on: {shlex.join(command)}"

    def _strategy(self, registry: Registry, tracker: Tracker) -> DeltaStrategy:
        model, strategy, saved = self.session.adapter.base, self.config.strategy, self._saved(registry)
        rule_and_optimizer = f"{strategy.rule} + {strategy.server_optimizer.name}"
        publisher = RegistryPublisher(
            registry,
            self.config,
            run_id=self.run_id,
            base_digest=model.base_digest,
            base=model.parts,
            method=rule_and_optimizer,
        )
        return DeltaStrategy(
            self.config,
            **self.start(registry, resumed=saved is not None).arguments,
            publisher=publisher,
            registry=registry,
            tracker=tracker,
            run_id=self.run_id,
            resume=saved,
            secret=self._secret(tracker),
            privacy=self._private(saved),
        )

    def _secret(self, tracker: Tracker) -> bytes:
        """The key of the task tokens, the one that the run had before it was stopped."""
        key, is_new = kept_key(self.folder)
        if self.config.resume and is_new:
            message = (
                "the run's folder holds no key of its task tokens: clients that had answered the round that is done "
                "again do not know it again, train once more, and are charged once more"
            )
            _LOG.warning("%s", message)
            tracker.emit({"event": "warning", "message": message})
        return key

    def start(self, registry: Registry, *, resumed: bool = False) -> Start:
        """What round 1 starts from; a resumed run has left it behind, and ``start_from`` may mean another by now.

        Raises:
            RegistryError: if there is no such version.
            ModelError: if it belongs to another base model.
            ConfigError: if it does not fit the run.
        """
        config = replace(self.config, start_from="") if resumed else self.config
        return start_of(config, registry, self.session)

    def _private(self, saved: tuple[TrainingState, str] | None) -> ServerPrivacy | None:
        rule = make_rule(self.config.strategy.rule, self.config.strategy.options)
        head = saved[0].ledger_head if saved else None
        return ServerPrivacy.of_run(self.config, rule, folder=self.folder, run_id=self.run_id, saved_head=head)

    def _saved(self, registry: Registry) -> tuple[TrainingState, str] | None:
        """The newest version of this run with its training state, when the run is resumed."""
        records = registry.versions(self.run_id) if self.config.resume else []
        if not records:
            return None
        last = max(records, key=lambda record: record.manifest.round_number)
        state = registry.training_state(last.version_id)
        if state is None:
            raise VersionNotFound(f"version {last.version_id[:12]} has no training state; start a new run")
        return TrainingState.from_bytes(state), last.version_id

    def description(self, method: str, *, resumed_after: int = 0, personal: bool = False) -> dict[str, Any]:
        """The ``run`` event: what runs, and how large base and adapter are.

        Args:
            method: rule and server optimizer, in words.
            resumed_after: the last round that was finished before.
            personal: whether clients keep a part of the model, and are measured with it.
        """
        base = self.session.adapter.base
        tensors = self.session.initial.tensors.values()
        return {
            "event": "run",
            "run_id": self.run_id,
            "name": self.config.name,
            "method": method,
            "engine": self.config.engine.name,
            "clients": self.clients,
            "rounds": self.config.rounds,
            "seed": self.config.seed,
            "source": base.source,
            "base_digest": base.base_digest,
            "base_bytes": base.num_bytes,
            "base_params": base.num_parameters,
            "adapter_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            "adapter_params": sum(tensor.numel() for tensor in tensors),
            "resumed_after": resumed_after,
            "personal": personal,
            "notes": [*self.session.source.notes, *([_PERSONAL] if personal else [])],
        }

    def leave(self, registry: Registry) -> None:
        """Write what a reader of the folder needs.

        Raises:
            StorageFull: if the folder cannot be written.
        """
        try:
            write_versions(self.folder, registry.versions(self.run_id))
            write_report(self.folder)
        except OSError as error:
            raise StorageFull(f"cannot write the report to {self.folder}: {error.strerror}") from None

    def summary(self, registry: Registry, version_id: str) -> RunSummary:
        """What the run leaves, with that version as its last."""
        digest = registry.get(version_id).manifest.weights_digest
        report = self.folder / "report.html"
        return RunSummary(self.run_id, self.folder, self.registry_location, version_id, digest, report)


def _from_outside(error: BaseException) -> bool:
    """Whether it says nothing of the run: a signal, Flower's word that it gave the run up, or its lost connection."""
    return not isinstance(error, Exception) or type(error).__module__.partition(".")[0] == "httpx"


def write_versions(folder: Path, records: Sequence[VersionRecord]) -> None:
    """Write ``versions.json``: what the report draws the lineage from."""
    (folder / "versions.json").write_text(json.dumps([version_row(record) for record in records]))


def version_row(record: VersionRecord) -> dict[str, Any]:
    """A version as one row of ``versions.json``."""
    manifest = record.manifest
    return {
        "version_id": record.version_id,
        "number": record.number,
        "round_number": manifest.round_number,
        "parent": manifest.parent,
        "weights_digest": manifest.weights_digest,
        "method": manifest.method,
        "participants": manifest.participants,
        "metrics": dict(manifest.metrics),
        "channels": list(record.channels),
        "created_at": record.created_at.isoformat(),
    }


def _write_config(folder: Path, config: ExperimentConfig) -> None:
    """The resolved configuration."""
    _write(folder / "config.yaml", yaml.safe_dump(replace(config, resume=False).to_dict(), sort_keys=False))


def _write(path: Path, text: str) -> None:
    """A small file, whole or as it was before, whatever ends this process."""
    write_whole(path, text.encode())
    sync_folder(path.parent)


def _fresh(folder: Path) -> Path:
    """Make the folder, with a number behind its name when it already holds a run."""
    candidate, number = folder, 1
    while True:
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            if candidate.is_dir() and not any(candidate.iterdir()):
                return candidate
            number += 1
            candidate = folder.with_name(f"{folder.name}-{number}")
