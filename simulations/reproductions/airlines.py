"""The airlines result over several seeds: federated against null, local-only and central, mean and spread.

    python -m simulations.reproductions.airlines [--seeds 0 1 2] [--rounds 4] [--quick] [--plot FILE.svg]

Each seed changes first weights, cohorts and data order; the split is the same. The last round counts, not the best.
The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from federated.cli.apps import enter_app, load_client_app
from federated.cli.compose import compose
from federated.flower import simulate
from federated.flower.baselines import compare
from federated.flower.inprocess import default_workers
from federated.plots import Series, line_chart
from federated.run_history import history_of
from federated.tracking import read_events

APP = Path(__file__).resolve().parent.parent.parent
ARMS = ("null", "local_only", "federated", "central")


def main() -> None:
    """Run all seeds, print the table, write the plot."""
    options = _options()
    console = Console(stderr=True)
    results = [one_seed(seed, options) for seed in options.seeds]
    console.print(table(results))
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        options.plot.write_text(plot(results))
    print(json.dumps(summary(results)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="a tenth of the data, one seed: does it run?")
    parser.add_argument("--plot", type=Path, help="write the accuracy curves to this SVG file")
    parser.add_argument("--run-dir", default="runs/reproductions/airlines")
    options = parser.parse_args()
    options.seeds = options.seeds[:1] if options.quick else options.seeds
    return options


def one_seed(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One federation and its baselines: held-out accuracy by round, and of each arm."""
    overrides = ["experiment=airlines", f"seed={seed}", f"rounds={options.rounds}", "tracking.progress=false"]
    overrides += ["data.max_train_per_client=33", "data.max_test_per_client=20"] if options.quick else []
    folder = enter_app(APP)
    config = compose(folder, [*overrides, f"run_dir={options.run_dir}/seed-{seed}"])
    print(f"seed {seed}: federation", file=sys.stderr)
    run = simulate(config, load_client_app(folder))
    print(f"seed {seed}: baselines", file=sys.stderr)
    history = history_of(read_events(run.run_dir / "metrics.jsonl"))
    null = {name: float(value) for name, value in history.held_out[0].items() if name != "version_id"}
    baselines, _ = compare(replace(config, run_dir=str(run.run_dir)), workers=default_workers(), null=null)
    curve = [history.held_out[number]["accuracy"] for number in sorted(history.held_out)]
    arms = {arm.name: arm.evaluation["accuracy"] for arm in baselines}
    own = next(arm.own for arm in baselines if arm.name == "local_only") or {}
    return {"seed": seed, "curve": curve, **arms, "federated": curve[-1], "local_only_own": own["accuracy"]}


def share_of_gain(result: dict[str, Any]) -> float:
    """The federated adapter's gain over the null adapter, as a share of the central one's."""
    return float((result["federated"] - result["null"]) / (result["central"] - result["null"]))


def table(results: Sequence[dict[str, Any]]) -> Table:
    """One row per seed, and the means."""
    made = Table("seed", *ARMS, "local-only on its own tweets", "share of central's gain", title="Held-out accuracy")
    for result in results:
        cells = [f"{result[arm]:.1%}" for arm in ARMS]
        made.add_row(str(result["seed"]), *cells, f"{result['local_only_own']:.1%}", f"{share_of_gain(result):.1%}")
    return made


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means and standard deviations by arm, and in how many seeds the federation wins."""
    numbers = {arm: [result[arm] for result in results] for arm in (*ARMS, "local_only_own")}
    return {
        "seeds": [result["seed"] for result in results],
        **{arm: round(statistics.fmean(values), 4) for arm, values in numbers.items()},
        "std": {arm: round(statistics.pstdev(values), 4) for arm, values in numbers.items()},
        "curves": [[round(value, 4) for value in result["curve"]] for result in results],
        "beats_null": sum(result["federated"] > result["null"] for result in results),
        "beats_local_only": sum(result["federated"] > result["local_only"] for result in results),
        "share_of_central_gain": round(statistics.fmean(share_of_gain(result) for result in results), 4),
        "smallest_share_of_central_gain": round(min(share_of_gain(result) for result in results), 4),
    }


def plot(results: Sequence[dict[str, Any]]) -> str:
    """Mean accuracy by round, with the baselines as levels, as SVG."""
    rounds = range(len(results[0]["curve"]))
    mean = {number: statistics.fmean(result["curve"][number] for result in results) for number in rounds}
    levels = [
        Series(label, {0: statistics.fmean(result[arm] for result in results)}, color)
        for arm, label, color in (
            ("central", "central: all tweets pooled", "#2f855a"),
            ("local_only", "each airline alone, mean", "#b7791f"),
        )
    ]
    chart = line_chart(
        [Series("federated: only deltas travel", mean, "#2b6cb0")],
        ylabel="held-out accuracy",
        levels=levels,
        percent=True,
    )
    return chart if chart.startswith("<?xml") else f'<?xml version="1.0" encoding="utf-8"?>\n{chart}'


if __name__ == "__main__":
    main()
