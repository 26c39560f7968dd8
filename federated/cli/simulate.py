"""``fedpeft simulate``: compose with Hydra, run the federation, say where the report is."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import main as hydra_main
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from federated.cli.apps import enter_app, load_client_app
from federated.cli.compose import compose, conf_folder, from_hydra, one_line, spelt_out
from federated.config import ExperimentConfig, experiment_from
from federated.errors import ConfigError, FederatedError, RunInterrupted
from federated.flower import RunSummary
from federated.flower import simulate as simulate_federation
from federated.logs import set_up_logs

__all__ = ["run"]


def run(
    overrides: list[str], *, app_dir: Path, show: str | None, multirun: bool, resume: Path | None
) -> list[RunSummary]:
    """Run what the command line asks for.

    Args:
        overrides: Hydra overrides.
        app_dir: app folder.
        show: ``"job"`` prints the resolved configuration and runs nothing.
        multirun: sweep over comma-separated values.
        resume: folder of an interrupted run.

    Returns:
        One summary per job; empty when only shown.

    Raises:
        FederatedError: see `federated.flower.simulate`.
    """
    console = Console()
    folder = enter_app(app_dir)
    if multirun and (show is not None or resume is not None):
        raise ConfigError(
            f"--multirun does not go with {'--cfg' if show is not None else '--resume'}; give one of them"
        )
    if multirun:
        return _sweep(folder, overrides, console)
    config = _resumed(resume, overrides) if resume else compose(folder, overrides)
    if show is not None:
        show_config(config, show, console)
        return []
    return [_one(config, folder, console)]


def show_config(config: ExperimentConfig, what: str, console: Console) -> None:
    """Print the resolved configuration as YAML.

    Raises:
        ConfigError: for anything but ``job``.
    """
    if what != "job":
        raise ConfigError(f"--cfg {what}: expected --cfg job")
    console.print(yaml.safe_dump(config.to_dict(), sort_keys=False), highlight=False, markup=False, soft_wrap=True)


def _resumed(folder: Path, overrides: Sequence[str]) -> ExperimentConfig:
    """The interrupted run's own configuration; only the number of rounds may be changed."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"--resume {folder}: no config.yaml there; expected the folder of an interrupted run")
    plain = {**_saved(path), "run_dir": str(folder), "resume": True}
    for override in overrides:
        key, _, value = override.partition("=")
        if key != "rounds" or not value.isdecimal():
            raise ConfigError(f"{override}: a resumed run keeps its configuration; only rounds=N may be given")
        plain["rounds"] = int(value)
    return experiment_from(plain)


def _saved(path: Path) -> dict[str, Any]:
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--resume: {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        plain = None
    if not isinstance(plain, dict):
        raise ConfigError(f"--resume: {path} is damaged: expected the run's configuration; start a new run")
    return plain


def _one(config: ExperimentConfig, folder: Path, console: Console) -> RunSummary:
    if config.tracking.log_format == "json":
        set_up_logs("simulate", "json", whole=False)
    summary = simulate_federation(config, load_client_app(folder))
    console.print(f"last version  {summary.version_id[:16]}  (weights {summary.weights_digest[:16]})", highlight=False)
    console.print(f"registry      {summary.registry}", highlight=False, soft_wrap=True)
    console.print(f"report        {summary.report}", highlight=False, soft_wrap=True)
    return summary


def _sweep(folder: Path, overrides: list[str], console: Console) -> list[RunSummary]:
    """Hydra's own multirun, so that its sweepers and launchers work."""
    summaries: list[RunSummary] = []
    failures: list[tuple[str, FederatedError]] = []

    def job(composed: DictConfig) -> str:
        try:
            summaries.append(_one(from_hydra(composed), folder, console))
        except RunInterrupted as error:
            raise KeyboardInterrupt from error  # after any other error Hydra would start the next job
        except FederatedError as error:
            failures.append((" ".join(HydraConfig.get().overrides.task), error))
            return ""
        return summaries[-1].version_id

    try:
        _with_hydra(job, folder, overrides)
    except KeyboardInterrupt as error:
        raise (error.__cause__ or error) from None
    _show_sweep(summaries, console)
    if failures:
        which, first = failures[0]
        text = f"{len(failures)} of {len(failures) + len(summaries)} jobs failed; the first, {which}: {first}"
        raise ConfigError(text) if isinstance(first, ConfigError) else FederatedError(text)
    return summaries


def _show_sweep(summaries: Sequence[RunSummary], console: Console) -> None:
    table = Table("run", "last version", "report", title="Sweep")
    for summary in summaries:
        table.add_row(summary.run_id, summary.version_id[:16], str(summary.report))
    console.print(table)


def _with_hydra(job: Callable[[DictConfig], str], folder: Path, overrides: list[str]) -> None:
    conf = conf_folder(folder)
    arguments, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["fedpeft", "--multirun", "hydra/job_logging=none", "hydra/hydra_logging=none"]
    sys.argv += spelt_out(overrides)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, so that the error can be said in one line
    try:
        hydra_main(version_base="1.3", config_path=str(conf), config_name="config")(job)()
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(one_line(error, conf)) from None
    finally:
        sys.argv = arguments
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]
