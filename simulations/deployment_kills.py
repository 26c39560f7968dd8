"""Kill nodes and server processes of a real deployment at random moments during a run, and look at what is left.

    python -m simulations.deployment_kills --rounds 100 --kills 20 --seed 0

A secured deployment with three devices (SuperNodes, launchers, TLS, keys, signed updates) trains with privacy for each
example, so that each device keeps a ledger. ``--kills`` SIGKILLs hit devices (SuperNode, launcher, the process of a
message, or all of a device at once), and as many the server (SuperLink, SuperExec, ServerApp, door, operator, or the
process manager, which ``deploy up`` starts again). Nobody resumes the run by hand.

The app is the project's own with a witness in it, that notes each training when it begins and each update that leaves.
What is held against that:

- ``lost_versions``: versions that were there, or reported, and are not any more; rounds with two versions; a version
  whose parent is not the one before it.
- ``undercounted_ledgers``: ledgers with fewer charges of a round than trainings that took place.
- ``completed``: the run came to its end by itself, as attempt number ``attempts``.
- ``same_weights``: a run without privacy, whose server processes were killed, ended with the very weights of one that
  nobody killed (``--same`` rounds each; 0: left out). The SuperLink is spared here: messages on their way are lost with
  it, and where everybody's update is wanted their round has no version.

The last line on standard output is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from federated.deployment.app_bundle import copied
from federated.registry import Registry
from simulations.deployments import ROOT, Trial, processes, trial

__all__ = ["Kills", "main"]

NODE_KINDS = ("supernode", "launcher", "task", "device")
SERVER_KINDS = ("superlink", "serverapps", "serverapp", "door", "operator", "manager")
_TINY = ("experiment=tiny", "train.steps=2", "selection.min_clients=1", "selection.wait=900")
_PRIVATE = ("privacy.example.enabled=true", "privacy.example.noise_multiplier=4.0")
_PATIENCE = 900.0
_MOMENT = 4.0
"""A kill comes up to so many seconds after its round has begun: a round takes about half of that."""
_WITNESS = '''"""The project's ClientApp, with a witness of what it does."""

import hashlib
import json
import os

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from federated.flower import handle_query, handle_train
from federated.flower.records import assignment_of, packet_of
from federated.training import LocalTrainer

app = ClientApp()
app.query()(handle_query)
asked = {}
run = LocalTrainer.run


def note(**what):
    file = os.open(os.environ["FEDPEFT_WITNESS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(file, json.dumps({**asked, **what}).encode() + b"\\n")
    os.close(file)


def witnessed(self, state, plan, data, **given):
    if plan.mode == "train":
        note(what="trained")
    return run(self, state, plan, data, **given)


LocalTrainer.run = witnessed


@app.train()
def train(message: Message, context: Context) -> Message:
    task = assignment_of(message)
    asked.update(run=task.run_id, client=task.client_id, round=task.round_number)
    reply = handle_train(message, context)
    if "packet" in reply.content:
        packet = packet_of(reply.content)
        if packet:
            note(what="answered", packet=hashlib.sha256(packet).hexdigest())
    return reply
'''


@dataclass
class Kills:
    """What the kills left.

    Args:
        rounds: that the run made.
        node_kills: of devices' processes.
        server_kills: of the server's.
        lost_versions: see above.
        undercounted_ledgers: see above.
        attempts: server processes that the run took.
        completed: whether it came to its end.
        by_kind: kills of each kind.
        unpublished_rounds: rounds without a version, for want of good updates.
        resent: answers that were sent again as they were.
        charged_again: charges beyond one for each client and round: what the kills cost in budget.
        seconds_to_go_on: after a kill of the server, until the next round was over; median and most.
        same_weights: see above; None: not tried.
        seconds: of the whole run.
        faults: all that was wrong, in words; empty is what is wanted.
    """

    rounds: int = 0
    node_kills: int = 0
    server_kills: int = 0
    lost_versions: int = 0
    undercounted_ledgers: int = 0
    attempts: int = 0
    completed: bool = False
    by_kind: dict[str, int] = field(default_factory=dict)
    unpublished_rounds: int = 0
    resent: int = 0
    charged_again: int = 0
    seconds_to_go_on: tuple[float, float] = (0.0, 0.0)
    same_weights: bool | None = None
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


class Killer:
    """Kills processes of one deployment.

    Args:
        trial: the deployment.
        chance: of kinds and moments.
        found: is counted into.
    """

    def __init__(self, trial: Trial, chance: random.Random, found: Kills) -> None:
        self._trial = trial
        self._chance = chance
        self._found = found

    def kill(self, side: str) -> str:
        """One kill on that side, of a kind that lives at the moment and was hit least; what was killed."""
        kinds = NODE_KINDS if side == "node" else SERVER_KINDS
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            for kind in sorted(kinds, key=lambda one: (self._found.by_kind.get(one, 0), self._chance.random())):
                if self._hit(kind):
                    self._count(side, kind)
                    return kind
            time.sleep(0.1)
        raise SystemExit(f"nothing of the {side} side lives: {processes(self._trial.folder)}")

    def _hit(self, kind: str) -> bool:
        living = processes(self._trial.folder)
        if kind == "device":
            devices = sorted({one.device for one in living if one.name == "launcher"})
            chosen = self._chance.choice(devices) if devices else ""
            pids = [one.pid for one in living if one.device and one.device == chosen]
        else:
            same = [one.pid for one in living if one.name == kind]
            pids = [self._chance.choice(same)] if same else []
        hit = [pid for pid in pids if _killed(pid)]
        if hit and kind == "manager":
            self._trial.fedpeft("deploy", "up")
        return bool(hit)

    def _count(self, side: str, kind: str) -> None:
        self._found.by_kind[kind] = self._found.by_kind.get(kind, 0) + 1
        if side == "node":
            self._found.node_kills += 1
        else:
            self._found.server_kills += 1


def _killed(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def work(folder: Path, *, rounds: int, kills: int, same: int, seed: int, say: Callable[[str], None]) -> Kills:
    """Start a deployment, let its first run go through the kills, and check what is left."""
    chance, found, began = random.Random(seed), Kills(), time.monotonic()  # noqa: S311 - moments, no secret
    app, witness = copied(ROOT, folder), folder / "witness.jsonl"
    (app / "clients" / "app.py").write_text(_WITNESS)
    asked = [*_TINY, *_PRIVATE, f"rounds={rounds}", f"seed={seed}", "round.deadline=40", "round.quorum=0.3"]
    extra, run = {"FEDPEFT_WITNESS": str(witness)}, "kills"
    with trial(folder / "d", [_TINY[0], "rounds=1"], nodes=3, app=app, extra=extra) as here:
        here.fedpeft("run", "submit", *asked, "--name", run)
        _through(here, run, _planned(rounds, kills, chance), chance, found, say)
        _check(here, run, found, rounds=rounds)
        _check_ledgers(here, run, witness, found)
        if same:
            found.same_weights = _same(here, same, chance, say)
    found.seconds = round(time.monotonic() - began, 1)
    return found


def _planned(rounds: int, kills: int, chance: random.Random) -> list[tuple[int, str]]:
    """After which round which side is hit: both as often, evenly over all rounds but the last two."""
    sides = ["node", "server"] * kills
    chance.shuffle(sides)
    step = max(1, rounds - 2) / max(1, len(sides))
    return [(int(step * (place + chance.random())), side) for place, side in enumerate(sides)]


def _through(
    here: Trial, run: str, plan: list[tuple[int, str]], chance: random.Random, found: Kills, say: Callable[[str], None]
) -> None:
    """Kill after the planned rounds, until the run has ended or nothing moves any more."""
    taken, moved = list[float](), time.monotonic()
    done, hit = 0, 0.0
    known = set[str]()
    while not here.completed(run):
        now = here.rounds(run)
        if now > done:
            done, moved = now, time.monotonic()
            if hit:
                taken.append(moved - hit)
                hit = 0.0
            known = _kept(here, run, known, found)
        if time.monotonic() - moved > _PATIENCE:
            found.faults.append(f"no round for {_PATIENCE:.0f} s after round {done}")
            break
        if plan and done >= max(1, plan[0][0]) and not hit:
            time.sleep(chance.uniform(0.0, _MOMENT))
            side = plan.pop(0)[1]
            kind = Killer(here, chance, found).kill(side)
            say(f"round {done}: killed {kind} ({found.node_kills} of devices, {found.server_kills} of the server)")
            hit = time.monotonic() if side == "server" else 0.0
            done = here.rounds(run) if not hit else done
        time.sleep(0.2)
    found.seconds_to_go_on = (round(sorted(taken)[len(taken) // 2], 1), round(max(taken), 1)) if taken else (0.0, 0.0)


def _kept(here: Trial, run: str, known: set[str], found: Kills) -> set[str]:
    """What the registry holds now; what it held before and does not any more is lost."""
    with Registry.open(here.layout.registry, create=False) as registry:
        held = {record.version_id for record in registry.versions(_run_id(here, run))}
    found.lost_versions += len(known - held)
    found.faults += [f"version {one[:12]} is gone" for one in sorted(known - held)]
    return held


def _run_id(here: Trial, run: str) -> str:
    return str(json.loads((here.layout.runs / run / "run.json").read_text())["run_id"])


def _check(here: Trial, run: str, found: Kills, *, rounds: int) -> None:
    """Versions against what was reported: each round's once, each the child of the one before."""
    events = here.events(run)
    found.completed, found.rounds = here.completed(run), here.rounds(run)
    found.attempts = len(here.submission(run)["flower_runs"])
    reported = {str(one["version_id"]) for one in events if one["event"] == "round" and one["published"]}
    with Registry.open(here.layout.registry, create=False) as registry:
        records = sorted(registry.versions(_run_id(here, run)), key=lambda one: one.manifest.round_number)
        found.faults += [str(fault) for fault in registry.verify()]
    numbers = [one.manifest.round_number for one in records]
    wrong = [f"version {one[:12]} was reported and is not there" for one in reported - {r.version_id for r in records}]
    wrong += [f"round {number} has {times} versions" for number, times in Counter(numbers).items() if times > 1]
    for before, after in itertools.pairwise(records):
        if after.manifest.parent != before.version_id:
            wrong.append(f"the version of round {after.manifest.round_number} is no child of the one before")
    found.lost_versions += len(wrong)
    found.unpublished_rounds = rounds + 1 - len(set(numbers))
    empty = {one["round_number"] for one in events if one["event"] == "round" and not one["published"]}
    silent = set(range(found.rounds + 1)) - set(numbers) - empty
    found.lost_versions += len(silent)
    found.faults += wrong + [f"round {number} has no version, and nothing says why" for number in sorted(silent)]
    if not found.completed:
        found.faults.append(f"the run did not complete: {here.submission(run)}")


def _check_ledgers(here: Trial, run: str, witness: Path, found: Kills) -> None:
    """Each device's charges against the trainings that took place there."""
    lines = [one for one in map(json.loads, _whole_lines(witness)) if one["run"] == _run_id(here, run)]
    answers = Counter((one["client"], one["round"], one["packet"]) for one in lines if one["what"] == "answered")
    found.resent = sum(answers.values()) - len(answers)
    for client in sorted({one["client"] for one in lines}):
        trained = Counter(one["round"] for one in lines if one["what"] == "trained" and one["client"] == client)
        charged = Counter(_charges(here.layout.node(client).folder))
        short = {number: (charged[number], times) for number, times in trained.items() if charged[number] < times}
        found.charged_again += charged.total() - len(charged)
        if short or not trained:
            found.undercounted_ledgers += 1
            found.faults.append(f"{client} has fewer charges than trainings: {short or 'none at all'}")


def _charges(folder: Path) -> Iterable[int]:
    """The rounds of a device's charges."""
    for path in (folder / "store" / "privacy").glob("*.jsonl"):
        for line in _whole_lines(path)[1:]:
            yield int(json.loads(line)["key"]["round_number"])


def _whole_lines(path: Path) -> list[str]:
    text = path.read_text() if path.is_file() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _same(here: Trial, rounds: int, chance: random.Random, say: Callable[[str], None]) -> bool:
    """Whether a run whose server is killed ends as one that nobody kills does."""
    ends = []
    for name, kills in (("never-killed", 0), ("killed", max(2, rounds // 3))):
        given = ["experiment=tiny", "train.steps=2", "selection.min_clients=3", "selection.wait=900", "round.quorum=1"]
        given += ["strategy.server_optimizer.name=adam", "strategy.server_optimizer.learning_rate=0.01"]
        given += [f"rounds={rounds}", "round.deadline=300"]
        here.fedpeft("run", "submit", *given, "--name", name)
        plan = [(1 + place * (rounds - 2) // max(1, kills), "server") for place in range(kills)]
        own = Kills(by_kind={"door": 99, "operator": 99, "manager": 99, "superlink": 99})
        _through(here, name, plan, chance, own, say)
        with Registry.open(here.layout.registry, create=False) as registry:
            records = {one.manifest.round_number: one for one in registry.versions(_run_id(here, name))}
            ends.append(records[max(records)].manifest.weights_digest)
    return ends[0] == ends[1]


def main() -> None:
    """Kill as often as asked for; ends with one line of JSON, and with 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--kills", type=int, default=20, help="of devices, and as many of the server")
    parser.add_argument("--same", type=int, default=8, help="rounds of the two runs that must end alike")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it")
    given = parser.parse_args()

    def say(text: str) -> None:
        print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the deployment is taken down then too

    def run(folder: Path) -> Kills:
        return work(folder, rounds=given.rounds, kills=given.kills, same=given.same, seed=given.seed, say=say)

    if given.keep:
        given.keep.mkdir(parents=True)
        found = run(given.keep.resolve())
    else:
        with tempfile.TemporaryDirectory(prefix="deployment-kills-") as folder:
            found = run(Path(folder))
    plain: dict[str, Any] = {"seed": given.seed, **asdict(found)}
    print(json.dumps(plain))
    sys.exit(bool(found.faults) or found.same_weights is False)


if __name__ == "__main__":
    main()
