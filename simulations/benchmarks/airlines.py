"""Is the airlines demo no worse than a plain loop of six clients, on one processor, in one run?

    python -m simulations.benchmarks.airlines [--quick] [--seed N [N ...]] [--max-length N]

Arms, each federation in a fresh process and both plain loops in another, with one thread and float32:

* ``bare``: a plain loop written by hand (`parts/bare_airlines.py`), which imports nothing of this library: three rounds
  of one whole pass, 6 x 333 tweets, AdamW with learning rate 0.002, batches of 16 as they were shuffled, and the global
  adapter measured on all held-out tweets before and after each round.
* ``same``: that loop with the batches that the library makes, in the first seed only: what the arithmetic alone costs.
  Its last adapter must be that of ``federated``, bit for bit.
* ``federated``: this library's federation with the same first adapter, tweets, passes and settings.
* ``demo``: ``experiment=airlines`` as it is shipped.

Seeds change first weights and data order; the split stays. Every last adapter is measured on the same held-out tweets,
at most 100 of each airline, and once more on all that the airlines hold out, so in their own proportions, which are
easier (``*_accuracy_all``, not with ``--quick``). The demo's own curve is over its own part of the former.

CPU seconds count from the start of a process (``*_total``) or from the moment when model and tweets are loaded; the
second measurement is in neither. With ``--quick`` what happens once (a registry, a report) is a large part of them, and
ratios say little. The last line is one JSON object, with means over the seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from federated.config import ExperimentConfig
    from federated.flower.session import Session

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[2]
BARE = Path(__file__).resolve().parent / "parts" / "bare_airlines.py"
ARMS = ("bare", "same", "federated", "demo")
ROUNDS, HELD_OUT, RATE = 3, 100, 0.002
QUICK_ROUNDS, QUICK_TWEETS, QUICK_HELD_OUT = 1, 24, 8
OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

Result = Mapping[str, Any]


# ---- what runs in a process of its own -------------------------------------------------------------------------------


def overrides(arm: str, options: argparse.Namespace) -> list[str]:
    """An arm as ``fedpeft simulate`` takes it: the shipped experiment, or the plain loop's settings on top of it."""
    made = ["experiment=airlines", f"seed={options.seed[0]}", "tracking.progress=false"]
    made += ["engine.workers=1", "train.threads=1", "train.precision=float32", "train.device=cpu"]
    if arm == "federated":
        made += [f"rounds={ROUNDS}", "train.epochs=1", f"train.learning_rate={RATE}", "train.batch_size=16"]
        made += [f"data.max_test_per_client={HELD_OUT}", f"task.max_length={options.max_length}"]
        made += ["train.weight_decay=0", "train.scheduler=none", "data.max_train_per_client=333"]
    if options.quick:
        made += [f"rounds={QUICK_ROUNDS}", f"data.max_train_per_client={QUICK_TWEETS}"]
        made += [f"data.max_test_per_client={QUICK_HELD_OUT}"]
    return made


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Write what the bare loop reads instead of a configuration: settings, tweets, batches and the first adapter."""
    from safetensors.numpy import save_file

    from federated.cli.compose import compose
    from federated.data import asset_path
    from federated.flower import open_session

    config = compose(ROOT, overrides("federated", options))
    session = open_session(config)
    tensors = {name: tensor.numpy() for name, tensor in session.initial.tensors.items()}
    save_file(tensors, folder / "initial.safetensors")
    everything = _with_all_held_out(config, options)
    clients = {
        client: {
            **_rows(session, client),
            "more": _rows(everything, client)["test"] if everything else [],
            "batches": [_batches(session, client, number) for number in range(1, config.rounds + 1)],
        }
        for client in session.source.client_ids
    }
    settings = {
        "model": str(asset_path(config.model.source.removeprefix("asset:"))),
        "clients": clients,
        "rounds": config.rounds,
        "seed": config.seed,
        "num_labels": len(config.task.labels),
        "max_length": config.task.max_length,
    }
    settings |= {name: getattr(config.adapter, name) for name in ("rank", "alpha", "dropout")}
    names = ("learning_rate", "batch_size", "eval_batch_size", "max_grad_norm")
    settings |= {name: getattr(config.train, name) for name in names}
    (folder / "bare.json").write_text(json.dumps(settings))


def _rows(session: Session, client: str) -> dict[str, list[tuple[str, int]]]:
    data = session.source.load(client)
    return {
        part: [(row["text"], row["label"]) for row in rows]
        for part, rows in (("train", data.train), ("test", data.test))
    }


def _batches(session: Session, client: str, number: int) -> list[list[int]]:
    """The order in which the library's client sees its tweets in that round."""
    from federated.tasks.batching import step_groups
    from federated.training import client_seed

    config = session.config
    lengths = [session.task.length(one) for one in session.local_data(client).train]
    groups = step_groups(lengths, config.train, client_seed(config.seed, number, client))
    return [batch for group in groups for batch in group]


def _with_all_held_out(config: ExperimentConfig, options: argparse.Namespace) -> Session | None:
    from federated.flower import open_session

    if options.quick:
        return None
    return open_session(replace(config, data=replace(config.data, max_test_per_client=0)))


def federate(arm: str, folder: Path, options: argparse.Namespace) -> None:
    """Run a federation, and measure its last adapter on the tweets that all arms are compared on.

    The equal one then prepares the bare loop, so that both read the same split.
    """
    from federated.cli.apps import enter_app, load_client_app
    from federated.cli.compose import compose
    from federated.flower import open_session, simulate
    from federated.run_history import history_of
    from federated.tracking import read_events

    app = load_client_app(enter_app(ROOT))
    config = compose(ROOT, [*overrides(arm, options), f"run_dir={folder / arm}"])
    open_session(config)
    start_up = time.process_time()
    summary = simulate(config, app)
    work = time.process_time() - start_up
    history = history_of(read_events(summary.run_dir / "metrics.jsonl"))
    held_out = QUICK_HELD_OUT if options.quick else HELD_OUT
    compared = open_session(replace(config, data=replace(config.data, max_test_per_client=held_out)))
    everything = _with_all_held_out(config, options)
    result = {
        "curve": [float(history.held_out[number]["accuracy"]) for number in sorted(history.held_out)],
        "accuracy": _accuracy(compared, summary),
        "accuracy_all": _accuracy(everything, summary) if everything else None,
        "start_up": start_up,
        "work": work,
        "weights_digest": summary.weights_digest,
    }
    if arm == "federated":
        prepare(folder, options)
    print(json.dumps(result))


def _accuracy(session: Session, summary: Any) -> float:
    from federated.flower.baselines import evaluate_everywhere
    from federated.flower.publisher import TrainingState
    from federated.registry import Registry

    with Registry.open(summary.registry) as registry:
        state = registry.training_state(summary.version_id)
    if state is None:
        raise SystemExit("the last version has no training state")
    pooled, _ = evaluate_everywhere(session, TrainingState.from_bytes(state).global_state.adapter)
    return float(pooled["accuracy"])


# ---- what compares ---------------------------------------------------------------------------------------------------


def one_seed(seed: int, options: argparse.Namespace, *, same: bool) -> dict[str, Result]:
    """All arms of one seed, one after another, so that none shares the processor with another."""
    given = [f"--seed={seed}", f"--max-length={options.max_length}", *(["--quick"] if options.quick else [])]
    found: dict[str, Result] = {}
    with tempfile.TemporaryDirectory(prefix="airlines-") as folder:
        for arm in ("federated", "bare", "demo"):
            command = [sys.executable, __file__, f"--arm={arm}", f"--folder={folder}", *given]
            if arm == "bare":
                command = [sys.executable, str(BARE), folder, *(["--same-batches"] if same else [])]
            answer = json.loads(_run(command).splitlines()[-1])
            for name, result in (answer if arm == "bare" else {arm: answer}).items():
                curve = " ".join(f"{value:.1%}" for value in result["curve"])
                print(f"seed {seed}, {name}: {curve}, {result['work']:.1f} CPU-s", file=sys.stderr)
                found[name] = result
    return found


def _run(command: list[str]) -> str:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **OFFLINE, "PYTHONPATH": path}, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command[1:3])} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def mean_of(found: Sequence[Mapping[str, Result]], arm: str, figure: str) -> float | None:
    """The mean over the seeds in which that arm ran and gave that figure."""
    values = [results[arm][figure] for results in found if arm in results and results[arm][figure] is not None]
    return statistics.fmean(values) if values else None


def summarise(found: Sequence[Mapping[str, Result]]) -> dict[str, Any]:
    """Accuracies, and ratios of CPU seconds (median over the seeds)."""

    def ratio(above: str, below: str, figures: Sequence[str]) -> float:
        sums = [
            [sum(results[arm][figure] for figure in figures) for arm in (above, below)]
            for results in found
            if above in results and below in results
        ]
        return float(round(statistics.median(one / other for one, other in sums), 3))

    result: dict[str, Any] = {}
    for figure in ("accuracy", "accuracy_all"):
        for arm in ("bare", "federated", "demo"):
            value = mean_of(found, arm, figure)
            result[f"{arm}_{figure}"] = None if value is None else round(value, 4)
    for above, below in (("federated", "bare"), ("federated", "same"), ("demo", "bare")):
        result[f"{above}_over_{below}_cpu"] = ratio(above, below, ["work"])
        result[f"{above}_over_{below}_cpu_total"] = ratio(above, below, ["start_up", "work"])
    digests = {found[0][arm]["weights_digest"] for arm in ("same", "federated")}
    result["same_adapter"] = len(digests) == 1
    for figure in ("accuracy", "accuracy_all", "start_up", "work"):
        result[figure] = {
            arm: [round(one[arm][figure], 4) for one in found if arm in one and one[arm][figure] is not None]
            for arm in ARMS
        }
    result["curves"] = {
        arm: [[round(value, 4) for value in one[arm]["curve"]] for one in found if arm in one] for arm in ARMS
    }
    return result


def table(found: Sequence[Mapping[str, Result]], title: str) -> Table:
    """One row per arm: accuracies in percent and CPU seconds, means over the seeds."""
    rounds = max(len(results[arm]["curve"]) for results in found for arm in results)
    columns = [*map(str, range(rounds)), "same\ntweets", "all\ntweets", "CPU-s", "with\nstart-up"]
    made = Table("arm", *columns, title=title, padding=0)
    for arm in ARMS:
        curves = [results[arm]["curve"] for results in found if arm in results]
        cells = [f"{100 * statistics.fmean(values):.1f}" for values in zip(*curves, strict=True)]
        cells += ["-"] * (rounds - len(cells))
        for figure in ("accuracy", "accuracy_all"):
            value = mean_of(found, arm, figure)
            cells.append("-" if value is None else f"{100 * value:.1f}")
        work, start_up = (mean_of(found, arm, figure) or 0.0 for figure in ("work", "start_up"))
        made.add_row(arm, *cells, f"{work:.1f}", f"{work + start_up:.1f}")
    return made


def main() -> None:
    """Run every arm over the seeds, print the table and the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute on two cores: fewer tweets, one round")
    parser.add_argument("--seed", type=int, nargs="+", help="default 0 1 2, with --quick 0")
    parser.add_argument("--max-length", type=int, default=40, help="tokens of a tweet in all arms but the demo")
    parser.add_argument("--arm", choices=("federated", "demo"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.seed = options.seed or ([0] if options.quick else [0, 1, 2])
    if options.arm:
        federate(options.arm, options.folder, options)
        return
    found = [one_seed(seed, options, same=seed == options.seed[0]) for seed in options.seed]
    Console(stderr=True).print(table(found, f"Held-out accuracy by round (%), mean of seeds {options.seed}"))
    print(json.dumps(summarise(found) | {"seeds": options.seed, "quick": options.quick}))


if __name__ == "__main__":
    main()
