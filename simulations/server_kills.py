"""Kill a run's server at random moments, again and again, resume it, and look at what was lost or not counted.

    python -m simulations.server_kills --kills 200 --seed 0

Each run is a whole federation in one process (`fedpeft simulate`, engine in-process, clients in the same process), so
that a SIGKILL hits the server in the middle of a charge, an admission or a publication, or a client between its charge,
its answer and the sending of it. The run is then resumed from its folder, killed again, and let through at last.

What is held against each kill:

- every version that was stored or reported before is there, whole (`lost_versions`);
- no ledger has fewer charges than what was asked for, or left a client, in its name (`undercounted_ledgers`);
- a client that was asked again for what it had answered sent the same bytes (`recomputed`);
- at its end a run has one version for each round, and where nothing is random the very weights of a run that nobody
  killed: moments, rule memory, phases, counters and what clients remember went on (`other_ends`).

The last line on standard output is JSON. `resent` counts answers that were sent again as they were, `charged_again`
charges whose answer or version never came to anything: what a kill costs in budget.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from federated.config import ExperimentConfig, experiment_from
from federated.errors import FederatedError, RegistryError
from federated.flower import handle_query, handle_train, open_session, simulate
from federated.flower.records import assignment_of, packet_of
from federated.registry import Registry
from federated.tracking import read_events

__all__ = ["SCENARIOS", "Kills", "kill_servers"]

ROUNDS = 4
_MOST_KILLS = 6
"""Of one run; then it may end."""
_EXAMPLE = {"enabled": True, "noise_multiplier": 2.0}
_CLIENT = {"enabled": True, "noise_multiplier": 1.0, "sampling": "poisson"}

SCENARIOS: Mapping[str, Mapping[str, Any]] = {
    "moments": {"strategy": {"server_optimizer": {"name": "adam", "learning_rate": 0.01}}},
    "example_dp": {"privacy": {"example": _EXAMPLE}},
    "phases": {"strategy": {"rule": "fedask"}},
    "client_dp": {"privacy": {"client": _CLIENT}, "strategy": {"weighted": False}, "selection": {"fraction": 0.6}},
    "kept": {"strategy": {"rule": "fedsa"}},
    "buffered": {"round": {"mode": "buffered", "buffer": 2, "concurrency": 1}},
}
"""What differs between the runs, by name."""


@dataclass
class Kills:
    """What many kills left.

    Args:
        kills: how many processes were killed.
        runs: finished runs.
        by_scenario: kills of each.
        lost_versions: versions that were there, or reported, and are not any more.
        undercounted_ledgers: ledgers that say less than what was done.
        recomputed: answers that came as other bytes when the task came again.
        other_ends: runs that ended elsewhere than one that nobody killed.
        resent: answers that were sent again as they were.
        charged_again: charges of what was never seen.
        faults: all that was wrong, in words; empty is what is wanted.
    """

    kills: int = 0
    runs: int = 0
    by_scenario: dict[str, int] = field(default_factory=dict)
    lost_versions: int = 0
    undercounted_ledgers: int = 0
    recomputed: int = 0
    other_ends: int = 0
    resent: int = 0
    charged_again: int = 0
    faults: list[str] = field(default_factory=list)


def kill_servers(folder: Path, *, kills: int, seed: int, scenarios: Mapping[str, Any] = SCENARIOS) -> Kills:
    """Kill and resume runs until so many processes were killed, and check what is left after each kill.

    Args:
        folder: for everything; new.
        kills: how many, in all scenarios together.
        seed: of the moments.
        scenarios: see `SCENARIOS`.
    """
    torch.set_num_threads(1)
    chance, found = random.Random(seed), Kills()  # noqa: S311 - moments, no secret
    shares = [kills // len(scenarios) + (place < kills % len(scenarios)) for place in range(len(scenarios))]
    for (name, changes), share in zip(scenarios.items(), shares, strict=True):
        _Scenario(folder / name, name, changes, chance).work(share, found)
    return found


class _Scenario:
    """Runs of one kind."""

    def __init__(self, folder: Path, name: str, changes: Mapping[str, Any], chance: random.Random) -> None:
        self._folder = folder
        self._name = name
        self._changes = changes
        self._chance = chance
        self._random = "privacy" in changes
        folder.mkdir(parents=True)

    def work(self, kills: int, found: Kills) -> None:
        """So many kills, of as many runs as that takes."""
        if not kills:
            return
        open_session(self._config("warm"))  # loaded once: what is forked has it
        began = time.monotonic()
        self._let_through("never-killed", found)
        seconds, end = time.monotonic() - began, self._end("never-killed")
        number, done = 0, 0
        while done < kills:
            number += 1
            done += self._one_run(f"run-{number}", min(kills - done, _MOST_KILLS), seconds, found)
            if not self._random and self._end(f"run-{number}") != end:
                found.other_ends += 1
                found.faults.append(f"{self._name} run {number} ended with other weights than one never killed")
        found.by_scenario[self._name] = done

    def _one_run(self, name: str, most: int, seconds: float, found: Kills) -> int:
        """Kill a run and resume it until it ends by itself, or has been killed often enough; returns how often."""
        done, known = 0, set[str]()
        while done < most:
            if not self._killed(name, self._chance.uniform(0.0, seconds), found):
                break
            done += 1
            found.kills += 1
            known = self._check(name, known, found)
        else:
            self._let_through(name, found)
        self._check(name, known, found)
        self._check_whole(name, found)
        found.runs += 1
        return done

    def _killed(self, name: str, after: float, found: Kills) -> bool:
        """Whether the run was still at work then, and is no more."""
        with self._child(name) as child:
            end = time.monotonic() + after
            while time.monotonic() < end:
                if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    break
                time.sleep(0.002)
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            return True
        self._note_exit(name, status, found)
        return False

    def _let_through(self, name: str, found: Kills) -> None:
        with self._child(name) as child:
            _, status = os.waitpid(child, 0)
        self._note_exit(name, status, found)

    def _note_exit(self, name: str, status: int, found: Kills) -> None:
        if status:
            log = (self._folder / f"{name}.log").read_text(errors="replace")[-500:]
            found.faults.append(f"{self._name} {name} ended with status {status}: {log}")

    @contextmanager
    def _child(self, name: str) -> Iterator[int]:
        """A process that serves the run, from the start or from where it was stopped; it has begun when this yields."""
        begun, begin = os.pipe()
        child = os.fork()
        if not child:
            os.close(begun)
            self._serve(name, begin)
        os.close(begin)
        os.read(begun, 1)
        os.close(begun)
        yield child

    def _serve(self, name: str, begin: int) -> None:
        """The child's life."""
        status = 1
        try:
            log = os.open(self._folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.write(begin, b".")
            simulate(self._config(name), _witnessed(self._folder / f"{name}.witness"))
            status = 0
        except FederatedError as error:
            os.write(2, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(status)

    def _config(self, name: str) -> ExperimentConfig:
        plain: dict[str, Any] = {
            "rounds": ROUNDS,
            "task": {"labels": ["cold", "warm"], "max_length": 12},
            "model": {"source": "tiny:bert"},
            "adapter": {"rank": 2},
            "data": {"partition": {"num_clients": 3}, "max_train_per_client": 8, "max_test_per_client": 4},
            "train": {"steps": 2, "batch_size": 4, "precision": "float32"},
            "engine": {"workers": 1},
            "tracking": {"progress": False, "tensorboard": False},
            "run_dir": str(self._folder / name),
            **self._changes,
        }
        plain["round"] = {"poll_interval": 0.005, "quorum": 0.1, **plain.get("round", {})}
        config = experiment_from(plain)
        return replace(config, resume=(self._folder / name / "run.json").is_file())

    # ---- what is left ------------------------------------------------------------------------------------------

    def _check(self, name: str, known: set[str], found: Kills) -> set[str]:
        """Compare with what was there before; returns what is there now."""
        folder = self._folder / name
        events = _events(folder)
        reported = {str(event["version_id"]) for event in events if event["event"] == "round" and event["published"]}
        held = set[str]()
        try:
            with Registry.open(folder / "registry", create=False) as registry:
                held = {record.version_id for record in registry.versions()}
                found.faults += [f"{self._name} {name}: {fault}" for fault in registry.verify()]
        except RegistryError as error:
            if known or reported:  # else it was killed before the registry was made
                found.faults.append(f"{self._name} {name}: {error}")
        lost = (known | reported) - held
        found.lost_versions += len(lost)
        found.faults += [f"{self._name} {name} lost version {one[:12]}" for one in sorted(lost)]
        return held

    def _check_whole(self, name: str, found: Kills) -> None:
        """Once a run is over: its versions, and its ledgers against what was asked and answered."""
        folder = self._folder / name
        with Registry.open(folder / "registry", create=False) as registry:
            rounds = sorted(record.manifest.round_number for record in registry.versions())
        if rounds != list(range(ROUNDS + 1)):
            found.faults.append(f"{self._name} {name} has versions of the rounds {rounds}")
        answers = [json.loads(line) for line in _whole_lines(self._folder / f"{name}.witness")]
        different = {(one["client_id"], one["round_number"], one["phase"], one["packet"]) for one in answers}
        again = len(different) - len({one[:-1] for one in different})
        found.resent += len(answers) - len(different)
        found.recomputed += again
        if again:
            found.faults.append(f"{self._name} {name}: {again} answers were other ones when the task came again")
        for ledger in sorted(folder.rglob("privacy_ledger.jsonl")):
            charged = Counter(_charged(ledger))
            done = self._asked(folder) if ledger.parent == folder else _answered(answers, ledger)
            short = {number: (charged[number], times) for number, times in done.items() if charged[number] < times}
            found.charged_again += charged.total() - len(charged)
            if short or not charged:
                found.undercounted_ledgers += 1
                found.faults.append(f"{self._name} {name}: {ledger.name} has too few charges: {short or 'none'}")

    @staticmethod
    def _asked(folder: Path) -> Counter[int]:
        """How often each round asked its cohort."""
        return Counter(event["round_number"] for event in _events(folder) if event["event"] == "round_start")

    def _end(self, name: str) -> str:
        with Registry.open(self._folder / name / "registry", create=False) as registry:
            return registry.get("latest").manifest.weights_digest


def _witnessed(path: Path) -> ClientApp:
    """A ClientApp that notes each update that leaves it, in one write that no kill takes back."""
    app = ClientApp()
    app.query()(handle_query)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply = handle_train(message, context)
        if "packet" in reply.content:
            task, packet = assignment_of(message), packet_of(reply.content)
            line = {
                "client_id": task.client_id,
                "round_number": task.round_number,
                "phase": task.plan.phase,
                "packet": hashlib.sha256(packet).hexdigest(),
            }
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.write(file, json.dumps(line).encode() + b"\n")
            os.close(file)
        return reply

    return app


def _answered(answers: list[dict[str, Any]], ledger: Path) -> Counter[int]:
    """How many different updates of each round left the client of a ledger: each is a computation of its own."""
    subject = json.loads(ledger.read_text().splitlines()[0])["subject"]
    different = {(one["round_number"], one["packet"]) for one in answers if one["client_id"] == subject}
    return Counter(number for number, _ in different)


def _charged(ledger: Path) -> list[int]:
    """The rounds of a ledger's charges."""
    return [int(json.loads(line)["key"]["round_number"]) for line in _whole_lines(ledger)[1:]]


def _whole_lines(path: Path) -> list[str]:
    text = path.read_text() if path.is_file() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _events(folder: Path) -> list[dict[str, Any]]:
    return read_events(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []


def main() -> None:
    """Kill as often as asked for; ends with one line of JSON, and with 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="12 kills: two of each kind of run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="server-kills-") as folder:
        found = kill_servers(Path(folder), kills=12 if options.quick else options.kills, seed=options.seed)
    print(json.dumps({"seed": options.seed, **asdict(found)}))
    sys.exit(bool(found.faults))


if __name__ == "__main__":
    main()
