"""Where simulated clients run: in-process (default) or Flower's Ray engine. Both hand the server a Grid.

Deployment needs no engine here: `strategies/app.py` gives `Run.serve` the Grid of the SuperLink.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from federated.aggregation import check_combination, make_rule
from federated.config import EngineConfig, ExperimentConfig
from federated.data import check_source
from federated.errors import ConfigError, FederatedError, RunInterrupted
from federated.flower.folders import use_client_store
from federated.flower.forking import cheap_forks
from federated.flower.inprocess import InProcessGrid, default_workers
from federated.flower.ray_cluster import connect
from federated.flower.run import Run, RunSummary
from federated.flower.session import open_session
from federated.flower.stoppable import StoppableGrid

__all__ = ["run_inprocess", "run_ray", "simulate"]

T = TypeVar("T")

_LOG = logging.getLogger(__name__)

_GRACE = 30.0
"""Seconds that a stopped run may take to write its report."""

_OFF_SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def simulate(config: ExperimentConfig, client_app: ClientApp) -> RunSummary:
    """Run a whole federation on this machine.

    Args:
        config: the experiment; its ``engine`` says where.
        client_app: what each client runs.

    Raises:
        FederatedError: before anything starts, for whatever cannot run; later, for what ended the run.
    """
    if config.engine.name == "deployment":
        raise ConfigError(
            "engine.name = 'deployment': clients are devices there, not part of this machine; 'fedpeft deploy up' "
            "starts one here, 'fedpeft run submit' takes the same overrides"
        )
    torch.set_num_threads(1)  # before anything computes: forked workers must not inherit a thread pool
    importlib.import_module("federated.flower.client_task")  # for them to inherit as well
    _check_data(config)
    run = Run(config)
    use_client_store(run.folder / "clients")
    engine = run_ray if config.engine.name == "ray" else run_inprocess
    try:
        return engine(run.serve, client_app, num_nodes=run.clients, config=config.engine)
    except (RunInterrupted, KeyboardInterrupt) as error:
        raise RunInterrupted(run.how_to_go_on(str(error) or "stopped; finished rounds are published")) from None


def _check_data(config: ExperimentConfig) -> None:
    """What only a simulation can know before it starts: it holds every client's data."""
    source = open_session(config).source
    check_source(source)
    least, found = config.selection.min_clients, len(source.client_ids)
    if found < least:
        raise ConfigError(f"selection.min_clients = {least}: the data has {found} clients, so no round would start")
    if config.round.mode == "buffered" and config.round.buffer > found:
        raise ConfigError(
            f"round.buffer = {config.round.buffer}: the data has {found} clients, and each is in a buffer at most "
            "once, so none would fill"
        )
    check_combination(make_rule(config.strategy.rule, config.strategy.options), config, clients=found)


def run_inprocess(serve: Callable[[Grid], T], client_app: ClientApp, *, num_nodes: int, config: EngineConfig) -> T:
    """Serve on an in-process Grid whose workers are forked from this process as it is now."""
    workers = min(config.workers or default_workers(), num_nodes)
    shuffle = None if config.shuffle_arrivals < 0 else config.shuffle_arrivals
    with cheap_forks(), InProcessGrid(client_app, num_nodes, workers=workers, shuffle=shuffle) as grid:
        return serve(grid)


def run_ray(serve: Callable[[Grid], T], client_app: ClientApp, *, num_nodes: int, config: EngineConfig) -> T:
    """Serve on Flower's Ray engine: one actor per worker, one CPU each; on a cluster as many as it has.

    Raises:
        ConfigError: if Ray is not installed, or there is no cluster at ``engine.address``.
        RunInterrupted: on Ctrl-C.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("engine.name = 'ray': Ray is not installed; install federated-peft[ray] or use inprocess")
    for name, value in _OFF_SWITCHES.items():
        os.environ.setdefault(name, value)
    from flwr.simulation import run_simulation

    outcome: list[T] = []
    failure: list[BaseException] = []
    stop, over = threading.Event(), threading.Event()
    app = ServerApp()

    @app.main()
    def main(grid: Grid, _: Context) -> None:
        try:
            outcome.append(serve(StoppableGrid(grid, stop)))
        except FederatedError as error:  # Flower would wrap it; the caller wants it as it is
            failure.append(error)
        finally:
            over.set()

    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # what befell a client is in its round's record
    if config.address:
        machines = connect(config.address)
        _LOG.info("Ray cluster %s: %d machines", config.address, machines)
    workers = min(config.workers or default_workers(), num_nodes)
    try:
        run_simulation(
            server_app=app,
            client_app=client_app,
            num_supernodes=num_nodes,
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {"num_cpus": workers, "include_dashboard": False, "log_to_driver": False},
            },
        )
    except KeyboardInterrupt:
        stop.set()  # the ServerApp is in a thread of its own, and hears of Ctrl-C only so
        over.wait(_GRACE)
    if failure:
        raise failure[0]
    if not outcome:
        raise RunInterrupted("stopped; finished rounds are published")
    return outcome[0]
