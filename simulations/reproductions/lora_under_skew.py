"""LoRA's aggregation rules under label skew: a neutral comparison, on one text task, with one budget for every arm.

    python -m simulations.reproductions.lora_under_skew [--quick] [--workers N] [--budget-minutes N] [--plot SVG]

Task: which of 20 newsgroups a post is from (MiniLM, LoRA on query and value, mean-pooled head). Clients are made by
Dirichlet over the labels. Settings: 10 clients at skew 0.5 and 0.01 with rank 1 and 8; 3 and 30 clients at 0.01 with
rank 8. Every arm has the same clients, examples, first adapter, rounds and steps, and the same search: three learning
rates on posts and a seed that the results never see, by the accuracy after the last round. The result is the last
round's, not the best one's: mean and standard deviation over three seeds, each with its own partition, on the clients'
held-out posts together. A FedSA client answers with its own B and head, which is an easier task under skew: it is
marked.

Resumable: each finished run is one line of ``--results``, and is not run again; stop it at any time. One run takes
about half a minute of processor time, all 324 of them an hour and a half on two cores. The last line of standard output
is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from federated.cli.compose import compose
from federated.data import open_source
from federated.plots import Series, grouped_bars
from simulations.reproductions.sweep import APP, Found, Sweep, last_round, markdown_table

RESULTS = Path(__file__).resolve().parent / "lora_under_skew.jsonl"
ARMS = ("fedit", "ffa", "rolora", "flora", "fedex", "flexlora", "fedsa", "fedsvd", "fedask")
RATES = (0.01, 0.025, 0.06)
SEEDS, SEARCH_SEED = (0, 1, 2), 1000
ROUNDS, STEPS, BATCH, POSTS = 10, 30, 4, 1200
"""Per run: rounds, optimizer steps of all clients together in each of them, posts per step, posts of all clients."""
QUICK_ROUNDS, QUICK_POSTS, QUICK_ARMS = 2, 200, ("fedit", "flexlora")
PERSONAL = ("fedsa",)
COLORS = ("#2b6cb0", "#2f855a", "#b7791f", "#c53030", "#6b46c1", "#0987a0", "#97266d", "#4a5568", "#dd6b20")


@dataclass(frozen=True)
class Setting:
    """How posts are divided, and at which rank they are learnt."""

    clients: int
    skew: float
    rank: int

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.clients} clients, Dir({self.skew:g}), r={self.rank}"


SETTINGS = (
    Setting(10, 0.5, 1),
    Setting(10, 0.5, 8),
    Setting(10, 0.01, 1),
    Setting(10, 0.01, 8),
    Setting(3, 0.01, 8),
    Setting(30, 0.01, 8),
)


@dataclass(frozen=True)
class Job:
    """One run."""

    arm: str
    setting: Setting
    rate: float
    seed: int

    @property
    def key(self) -> str:
        """Names the run, with all that decides its result."""
        return json.dumps([asdict(self), ROUNDS, STEPS, BATCH, POSTS], sort_keys=True)


@dataclass(frozen=True)
class Work:
    """What a worker process is given: one run, and where the posts are."""

    job: Job
    posts: Path
    rounds: int


def main() -> None:
    """Run what is missing, as long as there is time, and show what there is."""
    options = _options()
    settings, seeds = (SETTINGS[3:4], SEEDS[:1]) if options.quick else (SETTINGS, SEEDS)
    sweep = Sweep(options.results, workers=options.workers, minutes=options.budget_minutes)
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    with tempfile.TemporaryDirectory(prefix="posts-") as place:
        count = QUICK_POSTS if options.quick else POSTS
        posts = {half: write_posts(Path(place) / f"{half}.jsonl", search=half, count=count) for half in (True, False)}
        for setting in settings:
            wanted = [job for arm in options.arms for job in searches(arm, setting)]
            if sweep.run(run, works(wanted, posts, rounds)):
                rates = {arm: best_rate(arm, setting, sweep.done) for arm in options.arms}
                results = [Job(arm, setting, rates[arm], seed) for seed in seeds for arm in options.arms]
                sweep.run(run, works(results, posts, rounds))
    found = summary(options.arms, settings, seeds, sweep.done)
    Console(stderr=True, width=140).print(table(found))
    if options.plot:
        options.plot.write_text(plot(found))
    if options.table:
        options.table.write_text(markdown(found))
    print(json.dumps({"finished": found["finished"], "wanted": found["wanted"], "results": found["rows"]}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one setting, one seed, two arms, few posts: does it run?")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="default: all")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, one core each")
    parser.add_argument("--budget-minutes", type=float, default=1e6, help="start no further run after that")
    parser.add_argument("--results", type=Path, help="JSON lines, beside this script by default; not with --quick")
    parser.add_argument("--plot", type=Path, help="write the comparison to this SVG file")
    parser.add_argument("--table", type=Path, help="write it as a Markdown table to this file")
    options = parser.parse_args()
    options.results = None if options.quick else options.results or RESULTS
    options.arms = options.arms or (QUICK_ARMS if options.quick else ARMS)
    return options


def works(jobs: Sequence[Job], posts: dict[bool, Path], rounds: int) -> dict[str, Work]:
    """What worker processes are given, by the run's key."""
    return {job.key: Work(job, posts[job.seed == SEARCH_SEED], rounds) for job in jobs}


def searches(arm: str, setting: Setting) -> list[Job]:
    """The learning rates of one arm, on the search's own posts."""
    return [Job(arm, setting, rate, SEARCH_SEED) for rate in RATES]


def best_rate(arm: str, setting: Setting, done: dict[str, Found]) -> float:
    """The rate with the highest accuracy after the last round; the smaller one where two are equal."""
    return max(searches(arm, setting), key=lambda job: (done[job.key]["accuracy"], -job.rate)).rate


def run(work: Work) -> tuple[str, Found]:
    """One federation: accuracy and loss after the last round, and the processor time."""
    job, setting = work.job, work.job.setting
    return job.key, last_round([
        "experiment=newsgroups", f"name=skew-{job.arm}", f"strategy={job.arm}", f"seed={job.seed}",
        f"rounds={work.rounds}", "data=table", f"data.path={work.posts}", f"data.seed={job.seed}",
        "data.partition.kind=dirichlet", f"data.partition.num_clients={setting.clients}",
        f"data.partition.alpha={setting.skew}", f"adapter.rank={setting.rank}",
        f"adapter.alpha={2.0 * setting.rank}", f"train.learning_rate={job.rate}", f"train.batch_size={BATCH}",
        f"train.steps={max(1, STEPS // setting.clients)}", "data.max_test_per_client=0",
        "data.max_train_per_client=0", "selection.min_clients=1", "strategy.weighted=false",
    ])  # fmt: skip


def write_posts(path: Path, *, search: bool, count: int) -> Path:
    """Half of the newsgroups' posts, by a hash of their text: the search's half or the results' half."""
    config = compose(APP, ["experiment=newsgroups", "data.partition.kind=iid", "data.partition.num_clients=1",
                           "data.max_train_per_client=0", "data.max_test_per_client=0"])  # fmt: skip
    data = open_source(config.data, config.task).load("client-000")
    halves: list[tuple[str, str, int]] = []
    for row in [*data.train, *data.test]:
        digest = hashlib.sha256(str(row["text"]).encode()).hexdigest()
        if (int(digest[0], 16) % 2 == 0) == search:
            halves.append((digest, str(row["text"])[:300], int(row["label"])))
    labels = config.task.labels
    rows = [{"text": text, "label": labels[label]} for _, text, label in sorted(halves)[:count]]
    path.write_text("".join(json.dumps({"client": "all", **row}) + "\n" for row in rows))
    return path


def summary(
    arms: Sequence[str], settings: Sequence[Setting], seeds: Sequence[int], done: dict[str, Found]
) -> dict[str, Any]:
    """Mean and standard deviation of every arm in every setting that is finished."""
    rows: list[dict[str, Any]] = []
    finished = 0
    for setting in settings:
        for arm in arms:
            searched = [job.key in done for job in searches(arm, setting)]
            finished += sum(searched)
            if not all(searched):
                continue
            rate = best_rate(arm, setting, done)
            found = [done[job.key] for seed in seeds if (job := Job(arm, setting, rate, seed)).key in done]
            finished += len(found)
            if len(found) == len(seeds):
                numbers = [one["accuracy"] for one in found]
                rows.append({
                    "arm": arm, "setting": setting.label, "rate": rate, "seeds": len(found),
                    "accuracy": round(statistics.fmean(numbers), 4), "std": round(statistics.pstdev(numbers), 4),
                    "cpu_seconds": round(statistics.fmean(one["cpu_seconds"] for one in found), 1),
                })  # fmt: skip
    wanted = len(arms) * len(settings) * (len(RATES) + len(seeds))
    return {"rows": rows, "finished": finished, "wanted": wanted, "settings": [setting.label for setting in settings]}


def table(found: dict[str, Any]) -> Table:
    """Arms as rows, settings as columns."""
    made = Table("rule", *found["settings"], title="Held-out accuracy after the last round, mean (std) over seeds")
    arms = list(dict.fromkeys(row["arm"] for row in found["rows"]))
    for arm in arms:
        cells = []
        for setting in found["settings"]:
            row = next((one for one in found["rows"] if (one["arm"], one["setting"]) == (arm, setting)), None)
            cells.append("-" if row is None else f"{row['accuracy']:.1%} ({row['std']:.1%})")
        made.add_row(f"{arm} *" if arm in PERSONAL else arm, *cells)
    made.caption = f"{found['finished']} of {found['wanted']} runs. * each client answers with its own B and head"
    return made


def plot(found: dict[str, Any]) -> str:
    """One group of bars per setting, one bar per arm."""
    place = {label: number for number, label in enumerate(found["settings"])}
    arms = list(dict.fromkeys(row["arm"] for row in found["rows"]))
    bars = [
        Series(arm, {place[row["setting"]]: row["accuracy"] for row in found["rows"] if row["arm"] == arm}, color)
        for arm, color in zip(arms, COLORS, strict=False)
    ]
    chart = grouped_bars(
        bars, [label.replace("Dir(", "").replace(")", "") for label in place], ylabel="held-out accuracy", percent=True
    )
    return f'<?xml version="1.0" encoding="utf-8"?>\n{chart}\n'


def markdown(found: dict[str, Any]) -> str:
    """The same table for a page."""
    cells = {(row["arm"], row["setting"]): f"{row['accuracy']:.1%} ({row['std']:.1%})" for row in found["rows"]}
    arms = list(dict.fromkeys(row["arm"] for row in found["rows"]))
    rows = [[f"`{arm}`", *(cells.get((arm, setting), "-") for setting in found["settings"])] for arm in arms]
    return markdown_table(["rule", *found["settings"]], rows)


if __name__ == "__main__":
    main()
