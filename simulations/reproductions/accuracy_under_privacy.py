"""What differential privacy costs in accuracy: the airlines' tweets at several epsilons, for examples and for clients.

    python -m simulations.reproductions.accuracy_under_privacy [--quick] [--workers N] [--budget-minutes N] [--plot SVG]

Task: the sentiment of airlines' customers (MiniLM, LoRA of rank 1 on query and value, mean-pooled head). Plain SGD: an
optimizer that scales each number by its own history scales noise to the size of what is learnt. Clipping norms are
about the length of what they bound; that was looked up beforehand and, like the search, is not counted as spent.

* Examples: six airlines, each with all of its tweets (400 to 3,000), DP-SGD on the clients, the noise solved for the
  epsilon by each client for itself. LoRA's factors averaged (FedIT), beside FFA-LoRA, FedSVD and RoLoRA.
* Clients: the same tweets dealt out to 1,000 clients, noise on the sum of a Poisson cohort's clipped updates.

All arms of a unit have the same rounds, steps, batches and rank, and the same search: learning rates on a seed that the
results never see, by the accuracy after the last round, at epsilon 1, 8 (also for 3) and without; what the search
itself would spend is not counted.
Reported is the last round's accuracy: mean and standard deviation over three seeds, on the clients' held-out tweets
together. Noise comes from the operating system and is another one in every run. Infinity is the same training without
clipping and noise.

Resumable: each finished run is one line of ``--results``. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from federated.plots import Series, line_chart
from simulations.reproductions.sweep import Found, Sweep, last_round, markdown_table

RESULTS = Path(__file__).resolve().parent / "accuracy_under_privacy.jsonl"
EPSILONS = (1.0, 3.0, 8.0, math.inf)
SEARCHED_AT = {1.0: 1.0, 3.0: 8.0, 8.0: 8.0, math.inf: math.inf}
"""At which epsilon the rate of each one is searched: with much noise smaller steps are better."""
SEEDS, SEARCH_SEED = (0, 1, 2), 1000
ARMS = (("example", "fedit"), ("client", "fedit"), ("example", "ffa"), ("example", "fedsvd"), ("example", "rolora"))
RATES = {"example": (0.2, 0.4), "client": (0.1, 0.3)}
COLORS = ("#2b6cb0", "#2f855a", "#b7791f", "#c53030", "#6b46c1")
COMMON = (
    "experiment=airlines", "data.max_train_per_client=0", "adapter.rank=1", "adapter.alpha=2.0", "train=plain_sgd",
    "train.max_grad_norm=0",
)  # fmt: skip
TRAINING = {
    "example": ("rounds=4", "train.steps=4", "train.batch_size=40", "data.max_test_per_client=120"),
    "client": (
        "rounds=20", "train.steps=1", "train.batch_size=8", "data.max_test_per_client=1", "selection.min_clients=1000",
        "data.partition.kind=iid", "data.partition.num_clients=1000", "selection.fraction=0.05",
    ),
}  # fmt: skip
PRIVATE = {
    "example": ("privacy=example_dp", "privacy.example.clip_norm=7"),
    "client": ("privacy=client_dp", "privacy.client.sampling=poisson"),
}
CLIP_PER_RATE = 4.0
"""A client's update is one step, so its length goes with the rate: the bound on it, over the rate."""
QUICK = ("rounds=1", "train.steps=1", "data.max_train_per_client=100", "data.max_test_per_client=5")
"""Does it run? Six clients, also for the client's unit."""


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        unit: what is protected.
        arm: the aggregation rule.
        epsilon: infinity: without privacy.
        rate: learning rate.
        seed: of partition, first adapter, cohorts (where they are not secret) and data order.
    """

    unit: str
    arm: str
    epsilon: float
    rate: float
    seed: int

    @property
    def key(self) -> str:
        """Names the run, with all that decides its result."""
        plain = {**asdict(self), "epsilon": "inf" if math.isinf(self.epsilon) else self.epsilon}
        return json.dumps([plain, COMMON, TRAINING[self.unit], PRIVATE[self.unit], CLIP_PER_RATE], sort_keys=True)

    @property
    def overrides(self) -> list[str]:
        """The run as ``fedpeft simulate`` takes it."""
        private = [] if math.isinf(self.epsilon) else [*PRIVATE[self.unit], f"privacy.target_epsilon={self.epsilon:g}"]
        if private and self.unit == "client":
            private.append(f"privacy.client.clip_norm={CLIP_PER_RATE * self.rate:g}")
        return [
            *COMMON, *TRAINING[self.unit], f"strategy={self.arm}", f"train.learning_rate={self.rate:g}",
            f"seed={self.seed}", f"data.seed={self.seed}", f"name=private-{self.unit}-{self.arm}", *private,
        ]  # fmt: skip


def main() -> None:
    """Run what is missing, as long as there is time, and show what there is."""
    options = _options()
    sweep = Sweep(options.results, workers=options.workers, minutes=options.budget_minutes)
    arms, seeds = (ARMS[:2], SEEDS[:1]) if options.quick else (ARMS, SEEDS)
    now = [one for one in arms if not options.arms or ":".join(one) in options.arms]
    execute = run_quick if options.quick else run
    for unit, arm in now:
        for epsilon in options.epsilons:
            if sweep.run(execute, {job.key: job for job in searches(unit, arm, epsilon)}):
                jobs = results(unit, arm, epsilon, seeds, sweep.done)
                sweep.run(execute, {job.key: job for job in jobs})
    rows = summary(arms, seeds, sweep.done)
    Console(stderr=True, width=120).print(table(rows))
    if options.plot:
        options.plot.write_text(plot(rows))
    if options.table:
        options.table.write_text(markdown(rows))
    print(json.dumps({"finished": len(rows), "wanted": len(arms) * len(EPSILONS), "results": rows}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of six clients per arm: does it run?")
    parser.add_argument("--arms", nargs="+", choices=[":".join(one) for one in ARMS], help="run these alone, for now")
    parser.add_argument("--epsilons", nargs="+", type=float, choices=EPSILONS, help="likewise")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, one core each")
    parser.add_argument("--budget-minutes", type=float, default=1e6, help="start no further run after that")
    parser.add_argument("--results", type=Path, help="JSON lines, beside this script by default; not with --quick")
    parser.add_argument("--plot", type=Path, help="write accuracy over epsilon to this SVG file")
    parser.add_argument("--table", type=Path, help="write it as a Markdown table to this file")
    options = parser.parse_args()
    options.results = None if options.quick else options.results or RESULTS
    options.epsilons = options.epsilons or EPSILONS
    return options


def run(job: Job) -> tuple[str, Found]:
    """One federation."""
    return job.key, last_round(job.overrides)


def run_quick(job: Job) -> tuple[str, Found]:
    """The same, small."""
    small = ["data.partition.num_clients=6", "selection.min_clients=6", "selection.fraction=0.5"]
    return job.key, last_round([*job.overrides, *QUICK, *(small if job.unit == "client" else [])])


def searches(unit: str, arm: str, epsilon: float) -> list[Job]:
    """The learning rates of one arm, on the search's own seed."""
    return [Job(unit, arm, SEARCHED_AT[epsilon], rate, SEARCH_SEED) for rate in RATES[unit]]


def results(unit: str, arm: str, epsilon: float, seeds: Sequence[int], done: dict[str, Found]) -> list[Job]:
    """The runs that count, at the rate with the highest accuracy in the search; the smaller one where two are equal."""
    rate = max(searches(unit, arm, epsilon), key=lambda job: (done[job.key]["accuracy"], -job.rate)).rate
    return [Job(unit, arm, epsilon, rate, seed) for seed in seeds]


def summary(arms: Sequence[tuple[str, str]], seeds: Sequence[int], done: dict[str, Found]) -> list[dict[str, Any]]:
    """Mean and standard deviation of every arm at every epsilon that is finished."""
    rows = []
    for unit, arm in arms:
        for epsilon in EPSILONS:
            if not all(job.key in done for job in searches(unit, arm, epsilon)):
                continue
            jobs = results(unit, arm, epsilon, seeds, done)
            found = [done[job.key] for job in jobs if job.key in done]
            if len(found) < len(jobs):
                continue
            numbers = [one["accuracy"] for one in found]
            rows.append({
                "unit": unit, "arm": arm, "epsilon": None if math.isinf(epsilon) else epsilon, "rate": jobs[0].rate,
                "seeds": len(found), "spent": max((one.get("epsilon", 0.0) for one in found), default=0.0),
                "accuracy": round(statistics.fmean(numbers), 4), "std": round(statistics.pstdev(numbers), 4),
                "cpu_seconds": round(statistics.fmean(one["cpu_seconds"] for one in found), 1),
            })  # fmt: skip
    return rows


def _label(row: dict[str, Any]) -> str:
    return f"{row['unit']}: {row['arm']}"


def _cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Arms as rows, epsilons as columns."""
    found = {(_label(row), row["epsilon"]): f"{row['accuracy']:.1%} ({row['std']:.1%})" for row in rows}
    columns = [None if math.isinf(epsilon) else epsilon for epsilon in EPSILONS]
    labels = dict.fromkeys(_label(row) for row in rows)
    return [[label, *(found.get((label, epsilon), "-") for epsilon in columns)] for label in labels]


def _head() -> list[str]:
    return ["unit: rule", *("without" if math.isinf(epsilon) else f"epsilon {epsilon:g}" for epsilon in EPSILONS)]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """For a terminal."""
    made = Table(*_head(), title="Held-out accuracy after the last round, mean (std) over seeds")
    for line in _cells(rows):
        made.add_row(*line)
    return made


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """For a page."""
    return markdown_table(_head(), _cells(rows))


def plot(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy over epsilon, a line for each arm; without privacy as a level."""
    labels = list(dict.fromkeys(_label(row) for row in rows))
    lines, levels = [], []
    for label, color in zip(labels, COLORS, strict=False):
        of = {row["epsilon"]: row["accuracy"] for row in rows if _label(row) == label}
        lines.append(Series(label, {epsilon: one for epsilon, one in of.items() if epsilon is not None}, color))
        if None in of and label.endswith("fedit"):
            levels.append(Series(f"{label}, without", {0: of[None]}, color))
    chart = line_chart(lines, ylabel="held-out accuracy", levels=levels, percent=True, xlabel="epsilon")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{chart}\n'


if __name__ == "__main__":
    main()
