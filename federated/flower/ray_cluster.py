"""A Ray cluster of several machines for ``engine=ray``: the only place that speaks to Ray itself.

Flower's engine starts a Ray of its own unless one is connected already. Here it is connected to a cluster that was
started before, with the environment that clients need: Flower hands on nothing but the import path.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

from federated.errors import ConfigError

__all__ = ["connect"]

_KNOCK = 10.0  # seconds
_HANDED_ON = (
    "FEDPEFT_APP",
    "FEDPEFT_CACHE",
    "FEDPEFT_CLIENT_STORE",
    "FLWR_TELEMETRY_ENABLED",
    "HF_HUB_OFFLINE",
    "TOKENIZERS_PARALLELISM",
)


def connect(address: str) -> int:
    """Connect this process to a cluster.

    Args:
        address: ``host:port`` of its head, or ``auto`` for the one on this machine.

    Returns:
        How many machines it has.

    Raises:
        ConfigError: if there is none, or it has no processor.
    """
    import ray

    variables = {name: os.environ[name] for name in _HANDED_ON if name in os.environ}
    path = os.pathsep.join(dict.fromkeys([*sys.path, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
    environment = {"env_vars": {**variables, "PYTHONPATH": path}}
    try:
        _knock(address)
        ray.init(address=address, runtime_env=environment, log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"engine.address = {address}: no Ray cluster there ({said}); start one with 'ray start --head' on one "
            "machine and 'ray start --address HOST:PORT' on the others, of the same Python and Ray"
        ) from None
    machines: list[dict[str, Any]] = [node for node in ray.nodes() if node["Alive"]]
    if not any(node["Resources"].get("CPU") for node in machines):
        ray.shutdown()
        raise ConfigError(f"engine.address = {address}: its {len(machines)} machines offer no processor (num_cpus)")
    return len(machines)


def _knock(address: str) -> None:
    """Ray itself tries a head that is not there for minutes.

    Raises:
        OSError: if nobody listens.
    """
    host, _, port = address.rpartition(":")
    if host and "://" not in address and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK).close()
