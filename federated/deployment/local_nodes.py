"""Devices on the operator's own machine, for a try: each with a folder, data and limits of its own.

They are real in all but the machine: each is enrolled through the door, has keys of its own, runs a SuperNode and a
launcher, and reads no file but those in its folder and the base model. What is made up is their data: the clients of
the experiment that is to be run, each client's rows copied into its device's folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from federated.config import DataConfig, ExperimentConfig
from federated.data import open_source
from federated.deployment.certificates import ca_fingerprint
from federated.deployment.devices import DeviceBook
from federated.deployment.enrolling import enrol
from federated.deployment.flwr_command import FlowerLink
from federated.deployment.keys import NODE_KEY, UPDATE_KEY
from federated.deployment.layout import Layout
from federated.deployment.nodes import sync_nodes
from federated.deployment.server_config import ServerConfig
from federated.errors import ConfigError

__all__ = ["enrol_local_nodes", "make_local_nodes"]

_MOST_STEPS = 2_000
_ACTOR = "deploy up"
_POLL_SECONDS = 0.5  # nobody pays for these looks but this machine
_LOOKS_A_SECOND = 16.0
"""At the server, of all devices of one call together: each costs processors that the rounds need as well."""


def make_local_nodes(
    layout: Layout,
    server: ServerConfig,
    experiment: ExperimentConfig,
    *,
    count: int,
    app: Path,
    apps: Sequence[str],
    warm: bool = True,
) -> list[str]:
    """Make folders for the first ``count`` clients of an experiment; one that is there keeps its data and its keys.

    Args:
        layout: of the deployment.
        server: its configuration.
        experiment: whose clients' data and base model the devices get.
        count: how many devices.
        app: where relative places of the experiment are looked up.
        apps: bundles that they may run.
        warm: hold the libraries in memory for each of them.

    Returns:
        Their client ids.

    Raises:
        ConfigError: if the experiment has fewer clients.
        DataError: if its data cannot be read.
    """
    source = open_source(experiment.data, experiment.task, app_dir=app)
    if count > len(source.client_ids):
        raise ConfigError(
            f"--nodes {count}: the experiment's data has {len(source.client_ids)} clients; ask for as many"
        )
    names = list(source.client_ids[:count])
    for name in names:
        node = layout.node(name)
        (node.folder / "data").mkdir(parents=True, exist_ok=True, mode=0o700)
        if not node.client.is_file():
            data = source.load(name)
            _write_rows(node.folder / "data" / f"{name}.jsonl", [*data.train, *data.test])
            _write_yaml(node.client, _client(name, experiment, secured=not server.insecure))
        _write_yaml(node.config, {"training": _training(server, apps, count=count, warm=warm)})
    return names


def enrol_local_nodes(layout: Layout, server: ServerConfig, names: Sequence[str]) -> None:
    """Enrol devices on this machine as any device is enrolled: invited, through the door, with keys of their own.

    Raises:
        DeploymentError: if the door, or the SuperLink behind it, does not answer or refuses.
    """
    book = DeviceBook(layout.folder, clock=_now)
    authority = ca_fingerprint(layout.ca.read_bytes())
    for name in names:
        node = layout.node(name)
        if not (node.folder / "enrolment.json").is_file():
            invitation = book.invite(
                name, door=server.url, ca_sha256=authority, valid=timedelta(hours=1), auto_approve=True, actor=_ACTOR
            )
            enrol(invitation, node.folder)
    sync_nodes(book, FlowerLink(layout.flwr_home), actor=_ACTOR)


def _now() -> datetime:
    return datetime.now(UTC)


def _write_rows(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_yaml(path: Path, value: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")


def _client(name: str, experiment: ExperimentConfig, *, secured: bool) -> dict[str, Any]:
    data = DataConfig(
        name="files",
        path="data",
        max_train_per_client=experiment.data.max_train_per_client,
        max_test_per_client=experiment.data.max_test_per_client,
    )
    kept = {key: value for key, value in asdict(data).items() if value != getattr(DataConfig(), key)}
    return {
        "client_id": name,
        "store": "store",
        "data": kept,
        "model": asdict(experiment.model),
        "max_rank": max(16, experiment.adapter.rank),
        "max_steps": _MOST_STEPS,
        **({"signing_key": UPDATE_KEY} if secured else {}),
    }


def _training(server: ServerConfig, apps: Sequence[str], *, count: int, warm: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "server": server.url,
        "client": "client.yaml",
        "state": "state",
        "apps": list(apps),
        "warm": warm,
        "poll_seconds": round(max(_POLL_SECONDS, count / _LOOKS_A_SECOND), 2),
        "log_format": server.log_format,
    }
    if server.insecure:
        return {**found, "insecure": True}
    return {**found, "ca": "ca.crt", "node_key": NODE_KEY}
