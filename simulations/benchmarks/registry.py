"""The registry's speed with many versions, and what is left of it after kills.

    python simulations/benchmarks/registry.py [--quick] [--seed N] [--versions N] [--kills N]

Times are medians on a registry of 10,000 versions (a hundred runs of a hundred rounds; with ``--quick`` 500): list
all of them, list the newest 20, find one by each kind of name, follow a lineage of a hundred, publish 5 MB, check the
audit log. All versions are put in by the code that publishes, in one transaction.

Then processes that publish, promote, roll back and run gc are killed (SIGKILL) at random moments, 200 times (10), each
time on the registry that the one before left. After each kill everything is checked: what a process had been told was
published is there, or the log says that gc removed it; every record, blob, lineage and channel is what the log says;
and the log is whole and goes on from the last head that the process saw. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from federated.errors import RegistryError
from federated.manifest import AdapterSpec, ModuleSpec, VersionManifest, sha256_hex
from federated.registry import AuditHead, Registry
from federated.registry.publication import Publication

__all__ = ["Kills", "kill_many", "main"]

SPEC = AdapterSpec("lora", 8, 16.0, False, tuple(ModuleSpec(f"layer.{n}", 64, 64, 8, 16.0) for n in range(24)))
ROUNDS = 100
SIZE = 5_000_000
OPERATIONS = ("publish", "promote", "rollback", "gc")
LONGEST = 0.15
"""Seconds until a kill, at most: some operations long."""


def manifest_of(weights: bytes, run_id: str, number: int, parent: str | None) -> VersionManifest:
    """A record like a federation's."""
    return VersionManifest(
        weights_digest=sha256_hex(weights),
        base_digest="b" * 64,
        spec=SPEC,
        method="fedit + sgd",
        run_id=run_id,
        round_number=number,
        parent=parent,
        participants=10,
        metrics={"train_loss": 0.5, "num_examples": 1000.0},
    )


# ---- times -----------------------------------------------------------------------------------------------------------


def fill(folder: Path, versions: int) -> None:
    """Put versions in, in one transaction: they would take hours of waiting for a disk one by one."""
    weights = b"the same adapter"
    with Registry.open(folder) as registry, registry._access.writing("fill") as work:
        work.blobs.put(weights)
        parent: str | None = None
        for index in range(versions):
            run, number = divmod(index, ROUNDS)
            manifest = manifest_of(weights, f"run-{run:04d}", number, parent if number else None)
            parent = Publication(manifest, weights, channel="dev" if number else None).carry_out(work)


def median_of(call: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return round(statistics.median(seconds), 6)


def times(folder: Path, versions: int, chance: random.Random) -> dict[str, Any]:
    """Fill a registry and measure it."""
    began = time.perf_counter()
    fill(folder, versions)
    print(f"filled with {versions} versions in {time.perf_counter() - began:.1f} s", file=sys.stderr)
    last = (versions - 1) // ROUNDS
    with Registry.open(folder) as registry:
        some = chance.choice(registry.versions(f"run-{last // 2:04d}")).version_id
        names = {
            "id": some,
            "prefix": some[:10],
            "number": "v50",
            "run_number": f"run-{last:04d}:v50",
            "channel": "dev",
        }
        found = {f"resolve_{kind}_seconds": median_of(_getter(registry, name), 15) for kind, name in names.items()}
        found["list_seconds"] = median_of(registry.versions, 3)
        found["list_newest_seconds"] = median_of(lambda: registry.versions(newest=20), 15)
        found["lineage_seconds"] = median_of(lambda: registry.lineage(f"run-{last // 2:04d}:v{ROUNDS - 1}"), 5)
        found["publish_5mb_seconds"] = median_of(_publisher(registry, chance), 7)
        found["promote_seconds"] = median_of(_promoter(registry, chance), 15)
        found["audit_rows"] = registry.audit.head().number
        found["audit_verify_seconds"] = median_of(registry.audit.verify, 3)
        found["gc_dry_run_seconds"] = median_of(lambda: registry.gc(older_than=timedelta(0), dry_run=True), 3)
    return {"versions": versions, **found}


def _getter(registry: Registry, name: str) -> Callable[[], object]:
    return lambda: registry.get(name)


def _publisher(registry: Registry, chance: random.Random) -> Callable[[], object]:
    def publish() -> str:
        weights = chance.randbytes(SIZE)
        return registry.publish(manifest_of(weights, "new", 0, None), weights, channel="canary")

    return publish


def _promoter(registry: Registry, chance: random.Random) -> Callable[[], object]:
    ids = [record.version_id for record in registry.versions(newest=200)]
    return lambda: registry.channel("stable").promote(chance.choice(ids))


# ---- kills -----------------------------------------------------------------------------------------------------------


@dataclass
class Kills:
    """What many kills left.

    Args:
        kills: how many.
        by_operation: how many in each kind of work.
        inside: how many ended a process between the beginning and the end of an operation.
        completed: operations that had ended before.
        lost: versions that were published and are neither there nor removed by gc.
        faults: everything else that was found wrong, in words.
    """

    kills: int = 0
    by_operation: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OPERATIONS, 0))
    inside: int = 0
    completed: int = 0
    lost: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def kill_many(folder: Path, *, kills: int, seed: int) -> Kills:
    """Kill working processes, one after another, and check the registry after each.

    Args:
        folder: of a new registry.
        kills: how many.
        seed: of what they do and when they die.
    """
    chance, told, result = random.Random(seed), set[str](), Kills()  # noqa: S311
    with Registry.open(folder) as registry:
        for number in range(3):
            told.add(_publish(registry, f"start {number}", number, channel="stable"))
    for number in range(kills):
        operation = OPERATIONS[number % len(OPERATIONS)]
        said = _killed(folder, operation, seed=chance.getrandbits(32), after=chance.uniform(0.0, LONGEST))
        result.kills += 1
        result.by_operation[operation] += 1
        result.inside += said[-1].startswith("begin") if said else 0
        done = [line.split() for line in said if line.startswith("done")]
        result.completed += len(done)
        told |= {words[2] for words in done if words[2] != "-"}
        head = AuditHead.parse(done[-1][1]) if done else None
        _check(folder, told, head, result)
        print(f"kill {number + 1}: {operation}, {len(done)} done before", file=sys.stderr)
    return result


def _killed(folder: Path, operation: str, *, seed: int, after: float) -> list[str]:
    """Lines that a process wrote before it was killed, some time after it had begun to work."""
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        os.close(receive)
        _work(folder, operation, random.Random(seed), send)  # noqa: S311
    os.close(send)
    with os.fdopen(receive) as lines:
        said = [lines.readline()]  # it has opened the registry
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        said += lines.readlines()
    os.waitpid(child, 0)
    return [line.strip() for line in said[1:] if line.endswith("\n")]


def _work(folder: Path, operation: str, chance: random.Random, send: int) -> NoReturn:
    """The child's life: the same operation again and again, each told when it begins and when it is done."""
    try:
        with Registry.open(folder, actor=operation) as registry:
            os.write(send, b"ready\n")
            for number in range(1_000_000):
                os.write(send, b"begin\n")
                made = _operate(registry, operation, chance, number)
                os.write(send, f"done {registry.audit.head()} {made or '-'}\n".encode())
    finally:
        os._exit(1)


def _operate(registry: Registry, operation: str, chance: random.Random, number: int) -> str | None:
    stable = registry.channel("stable")
    if operation == "publish":
        return _publish(registry, str(chance.getrandbits(64)), number, channel=chance.choice(("dev", None)))
    if operation == "promote":
        stable.promote(chance.choice(registry.versions(newest=20)).version_id)
    elif operation == "rollback":
        try:
            stable.rollback()
        except RegistryError:  # there is nothing left to go back to
            stable.promote(chance.choice(registry.versions(newest=20)).version_id)
    else:
        made = _publish(registry, str(chance.getrandbits(64)), number, channel=None)
        registry.gc(older_than=timedelta(0), keep=1)
        return made
    return None


def _publish(registry: Registry, text: str, number: int, *, channel: str | None) -> str:
    weights = text.encode() * 1000
    return registry.publish(
        manifest_of(weights, text, number, None), weights, training_state=text.encode(), channel=channel
    )


def _check(folder: Path, told: set[str], head: AuditHead | None, result: Kills) -> None:
    with Registry.open(folder, create=False) as registry:
        result.faults += [f"{fault.part} {fault.version_id}: {fault.message}" for fault in registry.verify()]
        result.faults += [fault.message for fault in registry.audit.verify(head)]
        entries = registry.audit.entries()
        removed = {one for entry in entries if entry.action == "gc" for one in json.loads(entry.details)["versions"]}
        there = {record.version_id for record in registry.versions()}
    result.lost += sorted(told - there - removed)


@contextmanager
def _folder(keep: str | None) -> Iterator[Path]:
    if keep is not None:
        yield Path(keep)
        return
    with tempfile.TemporaryDirectory(prefix="registry-") as name:
        yield Path(name)


def main() -> None:
    """Measure, kill, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: 500 versions and 10 kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--versions", type=int, help="default 10,000, with --quick 500")
    parser.add_argument("--kills", type=int, help="default 200, with --quick 10")
    parser.add_argument("--folder", help="work there and leave it, for a look afterwards")
    options = parser.parse_args()
    versions = options.versions or (500 if options.quick else 10_000)
    kills = options.kills or (10 if options.quick else 200)
    with _folder(options.folder) as folder:
        found = times(folder / "many", versions, random.Random(options.seed))  # noqa: S311
        killed = kill_many(folder / "killed", kills=kills, seed=options.seed)
    for fault in [*(f"lost {one}" for one in killed.lost), *killed.faults]:
        print(fault, file=sys.stderr)
    summary = {
        "kills": killed.kills,
        "kills_by_operation": killed.by_operation,
        "kills_inside_an_operation": killed.inside,
        "operations_completed": killed.completed,
        "versions_lost": len(killed.lost),
        "faults": len(killed.faults),
    }
    print(json.dumps(found | summary | {"seed": options.seed, "quick": options.quick}))


if __name__ == "__main__":
    main()
