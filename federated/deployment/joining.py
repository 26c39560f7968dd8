"""A device takes part: Flower's SuperNode and our launcher as two processes, started again when they end.

Both are children of the process that calls `join`, and end with it. After a kill, Flower lets a node back in only
when its old session has run out (a minute). The next SuperNode ends that session first where the launcher knows this
version of Flower; else it ends with a refusal, and is started again after ever longer pauses.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from federated.deployment.device_metrics import EVENTS_FILE, DeviceMetrics
from federated.deployment.flower_environment import environment
from federated.deployment.loopback import free_ports, shared_secret
from federated.deployment.training_config import TrainingConfig
from federated.device_events import EVENTS
from federated.errors import DeploymentError

__all__ = ["join"]

_LOG = logging.getLogger(__name__)
_LONGEST_LOOK = 0.5
"""Seconds between two looks of a launcher at most: they cost this device little, and its network nothing."""
_LOOK = 0.3  # seconds
_WELL = 60.0  # seconds after which a process counts as started well
_GRACE = 10.0  # seconds to end in
_REFUSED = (
    " (the server refused it: is the device approved and not revoked, and is this machine's clock within 5 minutes of "
    "the server's?)"
)
"""Flower's own word for that is "terminated gracefully"."""


def join(config: TrainingConfig, *, stop: threading.Event) -> None:
    """Take part until ``stop`` is set.

    Args:
        config: what the device's owner decided.
        stop: ends both processes.

    Raises:
        DeploymentError: if the device's folder cannot be written, a file that the owner named is not there, or another
            process takes part for this device already.
    """
    for what, path in (("client", config.client), ("ca", config.ca), ("node_key", config.node_key)):
        if path is not None and not path.is_file():
            raise DeploymentError(f"training.{what} = {path}: no such file")
    with _alone(config.state):
        _take_part(config, stop)


@contextmanager
def _alone(state: Path) -> Iterator[None]:
    """Two would answer under one name from one store.

    Raises:
        DeploymentError: if the folder cannot be written, or somebody is there.
    """
    try:
        state.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(state / "join.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise DeploymentError(f"training.state = {state}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise DeploymentError(f"training.state = {state}: another 'fedpeft device join' takes part already") from None
    finally:
        os.close(descriptor)


def _take_part(config: TrainingConfig, stop: threading.Event) -> None:
    try:
        home = config.state / "flwr"
        home.mkdir(parents=True, exist_ok=True)
        secret = shared_secret(config.state / "superexec.secret")
    except OSError as error:
        raise DeploymentError(f"training.state = {config.state}: {error.strerror}") from None
    if config.unpinned:
        _LOG.warning("unpinned: this device runs whatever app the server sends")
    if config.insecure:
        _LOG.warning("insecure: no TLS and no authentication; whoever is on the way reads and changes every message")
    port = config.port or free_ports(1)[0]
    children = [_node(config, port, secret), _launcher(config, port, secret)]
    for child in children:
        child.environment = {**environment(home), EVENTS: str(config.state / EVENTS_FILE)}
        child.folder = config.client.absolute().parent  # relative places in the client's file are beside it
    metrics = DeviceMetrics(
        config.state, restarts=lambda: {child.kind: child.restarts for child in children}, pinned=not config.unpinned
    )
    said = ""
    try:
        while not stop.wait(_LOOK):
            for child in children:
                child.look(time.monotonic(), longest=config.max_retry_seconds)
            said = _written(metrics, said)
    finally:
        for child in children:
            child.end()


def _written(metrics: DeviceMetrics, said: str) -> str:
    """Write the metrics; a disk that refuses is said once, and ends nothing."""
    try:
        metrics.look()
    except OSError as error:
        if said != str(error):
            _LOG.warning("the device's metrics cannot be written: %s", error)
        return str(error)
    return ""


def _node(config: TrainingConfig, port: int, secret: Path) -> _Child:
    arguments = ["--superlink", config.address, "--host", "127.0.0.1", "--port", str(port), "--isolation", "process"]
    arguments += ["--superexec-auth-secret-file", str(secret)]
    arguments += ["--node-config", f"client-config={json.dumps(str(config.client.absolute()), ensure_ascii=False)}"]
    if config.insecure:
        arguments.append("--insecure")
    else:
        arguments += ["--root-certificates", str(config.ca), "--auth-supernode-private-key", str(config.node_key)]
    said = {"arguments": arguments, "poll_seconds": config.poll_seconds, "log_format": config.log_format}
    return _Child("supernode", {**said, "session": str(config.state / "node.session")})


def _launcher(config: TrainingConfig, port: int, secret: Path) -> _Child:
    said = {"address": f"127.0.0.1:{port}", "secret": str(secret), "apps": list(config.apps), "warm": config.warm}
    said |= {"log_format": config.log_format, "longest_seconds": config.longest_task}
    return _Child("launcher", {**said, "poll_seconds": min(config.poll_seconds / 2.5, _LONGEST_LOOK)})


@dataclass
class _Child:
    """One process, started when it is not there."""

    kind: str
    said: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path = Path()
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    again: float = 0.0
    pause: float = 1.0
    restarts: int = 0

    def look(self, now: float, *, longest: float) -> None:
        """Start it, or note that it ended and when to start it again."""
        if self.process is None:
            if now >= self.again:
                self._start(now)
            return
        code = self.process.poll()
        if code is None:
            return
        self.pause = 1.0 if now - self.started >= _WELL else min(2 * self.pause, longest)
        self.process, self.again = None, now + self.pause
        self.restarts += 1
        hint = _REFUSED if self.kind == "supernode" and code == 0 else ""
        _LOG.warning("the %s ended with code %d%s; it is started again in %.0f s", self.kind, code, hint, self.pause)

    def _start(self, now: float) -> None:
        command = [sys.executable, "-m", f"federated.deployment.{self.kind}"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, env=dict(self.environment), cwd=self.folder, umask=0o077
        )
        self.started = now
        with suppress(BrokenPipeError):  # it ended already: the next look finds that
            if self.process.stdin is not None:
                self.process.stdin.write(json.dumps(self.said).encode() + b"\n")
                self.process.stdin.close()

    def end(self) -> None:
        """End it, gently first."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
