"""Memory and file handles of every process of a deployment, at the start and at the end of many rounds.

    python -m simulations.deployment_soak --minutes 30 [--nodes 2] [--seed N]

A secured deployment with warm launchers runs round after round without a pause. Memory is PSS, summed over the
processes of a kind; the start is measured once 5 rounds are over, when everything that is loaded once is loaded. The
last line on standard output is JSON: ``minutes``, ``rounds``, ``pss_mb_start``, ``pss_mb_end``, ``files_start``,
``files_end`` by kind of process, and ``mb_per_100_rounds``, by which each grew after the first third (a line fitted to
all samples): what grows for ever grows there.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from simulations.deployments import Trial, processes, trial

__all__ = ["main"]

_WARM = 5
_EVERY = 10.0  # seconds
_KINDS = ("superlink", "serverapps", "serverapp", "door", "operator", "manager", "join", "supernode", "launcher")
Sample = tuple[int, dict[str, float], dict[str, int]]


def main() -> None:
    """Run rounds for so long, sample, show and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the deployment is taken down then too
    asked = ["experiment=tiny", f"seed={given.seed}", "rounds=1000000", "train.steps=2"]
    with (
        tempfile.TemporaryDirectory(prefix="deployment-soak-") as folder,
        trial(Path(folder) / "d", asked, nodes=given.nodes) as here,
    ):
        samples = _sampled(here, given.minutes * 60)
    first, last = samples[0], samples[-1]
    later = samples[len(samples) // 3 :]
    plain = {
        "minutes": given.minutes,
        "rounds": last[0] - first[0],
        "nodes": given.nodes,
        "seed": given.seed,
        "pss_mb_start": first[1],
        "pss_mb_end": last[1],
        "files_start": first[2],
        "files_end": last[2],
        "mb_per_100_rounds": {kind: _slope(later, kind) for kind in _KINDS},
    }
    print(json.dumps(plain))


def _sampled(here: Trial, seconds: float) -> list[Sample]:
    run = next(path.stem for path in here.layout.runs.glob("*.json"))
    while here.rounds(run) < _WARM:
        time.sleep(1.0)
    samples, end = [_sample(here, run)], time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(_EVERY)
        samples.append(_sample(here, run))
        print(time.strftime("%H:%M:%S"), samples[-1], file=sys.stderr, flush=True)
    return samples


def _sample(here: Trial, run: str) -> Sample:
    """Round, MB and file handles by kind; a message's own process comes and goes, and is left out."""
    pss, files = defaultdict[str, float](float), defaultdict[str, int](int)
    for one in processes(here.folder, memory=True):
        if one.name in _KINDS:
            pss[one.name] += one.pss / 1e6
            files[one.name] += one.files
    return here.rounds(run), {k: round(v, 1) for k, v in sorted(pss.items())}, dict(sorted(files.items()))


def _slope(samples: list[Sample], kind: str) -> float:
    rounds = [float(one[0]) for one in samples]
    if len(set(rounds)) < 2:
        return 0.0
    values = [one[1].get(kind, 0.0) for one in samples]
    return round(100 * statistics.linear_regression(rounds, values).slope, 2)


if __name__ == "__main__":
    main()
