"""How many SuperNodes one machine holds, and what bounds it: devices are added in steps, and each step runs rounds.

    python -m simulations.deployment_scale --nodes 50 [--first 2] [--cold] [--in-turn] [--reserve-gb 6] [--seed N]

Everything is on this machine: the server, and for each device its ``device join``, SuperNode and launcher, warm (the
libraries in memory) or cold (each training loads them); ``--in-turn``: a quarter of the devices in each of four rounds,
and a tenth of them measures the last adapter, for the memory of all trainings at once is more than one machine's. On a
server alone, of a step's memory only the rows ``superlink``, ``serverapps``, ``serverapp``, ``door`` and ``operator``
count. Before a step that would leave less than ``--reserve-gb`` of memory the script stops and says so.

For each step: seconds of a round (median), memory as PSS and file handles by kind of process, processor seconds of a
round in SuperLink and door, size of the SuperLink's database. The last line on standard output is JSON: ``nodes`` that
took part in every round of the last step (``--in-turn``: in one), ``round_seconds``, ``pss_mb_per_node``,
``server_pss_mb``, ``bound``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from simulations.deployments import UP, Trial, processes, trial

__all__ = ["main"]

STEPS = (2, 4, 8, 16, 32, 50, 75, 100)
ROUNDS = 4
_PATIENCE = 3000.0
_TICK = os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Add devices until there are as many as asked for, or the memory ends; show and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=50)
    parser.add_argument("--cold", action="store_true", help="launchers that hold nothing in memory")
    parser.add_argument("--in-turn", action="store_true", help="a quarter of the devices in each round")
    parser.add_argument("--reserve-gb", type=float, default=6.0, help="memory that is left to others")
    parser.add_argument("--first", type=int, default=STEPS[0], help="devices of the first step")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the deployment is taken down then too
    steps = [one for one in STEPS if given.first <= one < given.nodes] + [given.nodes]
    with tempfile.TemporaryDirectory(prefix="deployment-scale-") as folder:
        found, bound = _grow(Path(folder) / "d", steps, given)
    last = found[-1] if found else {}
    print(json.dumps({"seed": given.seed, "warm": not given.cold, **last, "bound": bound, "steps": found}))


def _grow(folder: Path, steps: list[int], given: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """What each step measured, and why there is no further one (empty: as many as asked for)."""
    found: list[dict[str, Any]] = []
    with trial(folder, _asked(given), nodes=steps[0], warm=not given.cold) as here:
        for number, nodes in enumerate(steps):
            if number:
                before = _available()
                need = found[-1]["pss_mb_per_node"] / 1000 * (nodes - steps[number - 1])
                if before - need < given.reserve_gb:
                    return found, f"memory: {nodes} nodes need {need:.1f} GB more, {before:.1f} GB are available"
                heat = "--cold" if given.cold else "--warm"
                here.fedpeft(*UP, heat, "--nodes", str(nodes), *_asked(given), patience=_PATIENCE)
            _wait(here)
            found.append(_step(here, nodes, turns=given.in_turn))
            print(time.strftime("%H:%M:%S"), json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found, ""


def _asked(given: argparse.Namespace) -> list[str]:
    most = f"data.partition.num_clients={given.nodes}"
    share = [f"selection.fraction={1 / ROUNDS}", "selection.fraction_evaluate=0.1"]
    turns = [*share, "selection.policy=round_robin"] if given.in_turn else []
    rounds = [f"rounds={ROUNDS}", "round.deadline=600", "round.quorum=1"]
    return ["experiment=tiny", most, f"seed={given.seed}", *rounds, *turns]


def _run(here: Trial) -> str:
    return sorted(here.layout.runs.glob("*.json"), key=lambda path: path.stat().st_mtime)[-1].stem


def _wait(here: Trial) -> None:
    end = time.monotonic() + _PATIENCE
    run = _run(here)
    while not here.completed(run):
        if time.monotonic() > end:
            raise SystemExit(f"run {run} is not over after {_PATIENCE:.0f} s, in round {here.rounds(run)}")
        time.sleep(1.0)


def _steady(events: list[dict[str, Any]], rounds: int, *, turns: bool) -> set[str]:
    """Who sent a good update in every round, or in one where each has a turn."""
    good = Counter(one["client_id"] for one in events if one["event"] == "client" and one["status"] == "ok")
    return {client for client, times in good.items() if turns or times >= rounds}


def _step(here: Trial, nodes: int, *, turns: bool) -> dict[str, Any]:
    """The figures of the newest run, and of the processes as they are now."""
    events = here.events(_run(here))
    rounds = [one for one in events if one["event"] == "round"]
    pss, files, count = defaultdict[str, float](float), defaultdict[str, int](int), defaultdict[str, int](int)
    for one in processes(here.folder, memory=True):
        pss[one.name] += one.pss / 1e6
        files[one.name] = max(files[one.name], one.files)
        count[one.name] += 1
    own = {"join", "supernode", "launcher", "task"}
    return {
        "nodes": len(_steady(events, len(rounds), turns=turns)),
        "round_seconds": round(statistics.median(float(one["seconds"]) for one in rounds[1:]), 1),
        "pss_mb_per_node": round(sum(value for name, value in pss.items() if name in own) / nodes, 1),
        "server_pss_mb": round(sum(value for name, value in pss.items() if name not in own), 1),
        "pss_mb": {name: round(value / count[name], 1) for name, value in sorted(pss.items())},
        "files": dict(sorted(files.items())),
        "cpu_seconds_since_start": {name: _cpu(here, name) for name in ("superlink", "door")},
        "database_mb": round(sum(p.stat().st_size for p in here.folder.glob("superlink.db*")) / 1e6, 1),
        "processes": sum(count.values()),
    }


def _cpu(here: Trial, name: str) -> float:
    """Processor seconds of a process of the server since it began."""
    pid = next((one.pid for one in processes(here.folder) if one.name == name), 0)
    try:
        parts = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return 0.0
    return round((int(parts[11]) + int(parts[12])) / _TICK, 1)


def _available() -> float:
    """GB of memory that a new process could have."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 1e6


if __name__ == "__main__":
    main()
