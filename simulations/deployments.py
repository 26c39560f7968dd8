"""A secured deployment on this machine for the measurements: started, looked into, and ended whatever happens.

Called by `simulations.deployment_kills`, `simulations.deployment_scale` and `simulations.deployment_soak`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federated.deployment.layout import Layout
from federated.deployment.processes import Processes
from federated.tracking import read_events

__all__ = ["ROOT", "UP", "Process", "Trial", "processes", "trial"]

ROOT = Path(__file__).resolve().parents[1]
UP = ("deploy", "up", "--no-wait")
_SWITCHES = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "FLWR_TELEMETRY_ENABLED": "0"}


@dataclass(frozen=True)
class Process:
    """One process of a deployment, as the kernel shows it.

    Args:
        pid: its number.
        parent: its parent's.
        name: what it is: ``superlink``, ``serverapps``, ``serverapp``, ``door``, ``operator``, ``manager``, or for a
            device ``join``, ``supernode``, ``launcher``, ``task``.
        device: of a device's process, its client id.
        pss: bytes of memory, what it shares counted by its share.
        files: open file handles.
    """

    pid: int
    parent: int
    name: str
    device: str
    pss: int
    files: int


class Trial:
    """A deployment's folder, and the commands on it.

    Args:
        folder: of the deployment.
        extra: environment variables of its processes.
    """

    def __init__(self, folder: Path, extra: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.layout = Layout(folder)
        self._environment = {**os.environ, **_SWITCHES, "PYTHONPATH": str(ROOT), **(extra or {})}

    def fedpeft(self, *arguments: str, patience: float = 600.0) -> str:
        """One command; what it printed.

        Raises:
            SystemExit: if it failed.
        """
        done = subprocess.run(
            [sys.executable, "-m", "federated.cli.main", *arguments, "--folder", str(self.folder)],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=patience,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"fedpeft {' '.join(arguments)} failed: {(done.stdout + done.stderr)[-3000:]}")
        return done.stdout

    def events(self, run: str) -> list[dict[str, Any]]:
        """What a run wrote down so far."""
        path = self.layout.runs / run / "metrics.jsonl"
        return list(read_events(path)) if path.is_file() else []

    def rounds(self, run: str) -> int:
        """The newest round that is over."""
        return max((int(one["round_number"]) for one in self.events(run) if one["event"] == "round"), default=0)

    def submission(self, run: str) -> dict[str, Any]:
        """What the deployment keeps of a run."""
        found: dict[str, Any] = json.loads((self.layout.runs / f"{run}.json").read_text())
        return found

    def completed(self, run: str) -> bool:
        """Whether a run says that it is."""
        return any(one["event"] == "end" and one["status"] == "completed" for one in self.events(run))


@contextmanager
def trial(
    folder: Path,
    overrides: Sequence[str],
    *,
    nodes: int,
    app: Path = ROOT,
    extra: dict[str, str] | None = None,
    warm: bool = True,
) -> Iterator[Trial]:
    """A deployment with so many devices, which has begun a first run; it is ended on leaving."""
    found = Trial(folder, extra)
    heat = "--warm" if warm else "--cold"
    try:
        found.fedpeft(*UP, heat, "--nodes", str(nodes), "--app", str(app), *overrides, patience=3000.0)
        yield found
    finally:
        Processes(found.layout).stop()


def processes(folder: Path, *, memory: bool = False) -> list[Process]:
    """The living processes of a deployment, found by what they were started with.

    Args:
        folder: of the deployment.
        memory: read PSS and count file handles too, which takes a while.
    """
    table = dict(_table())
    names = {pid: named for pid, (_, command) in table.items() if (named := _named(command, folder))}
    for pid, (parent, command) in table.items():  # children that were started with nothing of the folder's
        if pid not in names and parent in names:
            name, device = names[parent]
            names[pid] = _child(command, name, device)
    return [_process(pid, table[pid][0], *named, memory=memory) for pid, named in sorted(names.items())]


def _table() -> Iterator[tuple[int, tuple[int, str]]]:
    """Process, parent and command line, of all that live."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (path / "stat").read_text().rpartition(") ")[2].split()[:2]
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        if state != "Z":
            yield int(path.name), (int(parent), command)


def _named(command: str, folder: Path) -> tuple[str, str] | None:
    if str(folder) + "/" not in command + "/":
        return None
    if "device join" in command:
        return "join", Path(command.rsplit(" ", 1)[-1]).parent.name
    marks = {
        "flower-superlink": "superlink",
        "flower-superexec": "serverapps",
        "federated.deployment.front": "door",
        "federated.deployment.operating": "operator",
        "supervisord": "manager",
    }
    return next(((name, "") for mark, name in marks.items() if mark in command), None)


def _child(command: str, parent: str, device: str) -> tuple[str, str]:
    if parent == "join":
        return ("supernode" if command.endswith("supernode") else "launcher"), device
    if parent == "launcher":
        return "task", device
    return ("serverapp" if parent == "serverapps" else parent), device


def _process(pid: int, parent: int, name: str, device: str, *, memory: bool) -> Process:
    pss = files = 0
    if memory:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            pss = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        except (OSError, StopIteration):
            pss = files = 0
    return Process(pid, parent, name, device, pss, files)
