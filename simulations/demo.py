"""The main job, end to end: six airlines teach a frozen MiniLM sentiment together, and a device serves the result.

    python -m simulations.demo [--seed 0] [--rounds 4] [--run-dir runs/demo]

1. A federation: each client fine-tunes one LoRA adapter on its own customers' tweets and sends only the delta.
2. What it is compared with: the null adapter, each client alone, and central training on everybody's tweets.
3. A device: the base in memory once, answers with the null adapter, version 1 and the last version, and a rollback.

Everything lands in the run folder, with a report to look at. Nothing touches the network.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from federated.cli.apps import enter_app, load_client_app
from federated.cli.compose import compose
from federated.cli.main import exit_code
from federated.config import ExperimentConfig
from federated.device import NULL, Activation, Slot, open_runtime
from federated.flower import RunSummary, simulate
from federated.flower.baselines import Baseline, compare, full_session
from federated.flower.central import publish_central
from federated.flower.inprocess import default_workers
from federated.flower.run import write_versions
from federated.registry import Registry
from federated.report import write_report
from federated.run_history import History, history_of
from federated.tracking import JsonlTracker, read_events

APP = Path(__file__).resolve().parent.parent

TWEETS = (
    "@united you lost my bag and nobody answers the phone. Never again.",
    "@JetBlue what time does the check-in counter open at Logan tomorrow?",
    "@SouthwestAir thank you for the quick rebooking, your crew was wonderful!",
)

Cells = Sequence[str]


def main() -> None:
    """Run the story."""
    options = _options()
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console = Console()
    folder = enter_app(APP)
    overrides = ["experiment=airlines", f"seed={options.seed}", f"rounds={options.rounds}"]
    config = compose(folder, [*overrides, f"run_dir={options.run_dir}"])
    console.rule("1. The federation")
    summary = simulate(config, load_client_app(folder))
    console.rule("2. What it is compared with")
    history = history_of(read_events(summary.run_dir / "metrics.jsonl"))
    baselines = compare_arms(config, summary, null=metrics_of(history.held_out[0]), console=console)
    console.print(rounds_table(history))
    console.print(arms_table(history, baselines))
    console.print(sizes_table(history))
    console.rule("3. The device")
    serve(summary, console)
    finish(summary)
    console.print(f"\nRegistry: {summary.registry}", soft_wrap=True, highlight=False)
    console.print(f"Report:   {summary.report}", soft_wrap=True, highlight=False, style="bold")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--seed", type=int, default=0, help="of weights, cohorts and data order")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--run-dir", default="runs/demo", help="a number is added when it is taken")
    return parser.parse_args()


def compare_arms(
    config: ExperimentConfig, summary: RunSummary, *, null: Mapping[str, float], console: Console
) -> list[Baseline]:
    """Measure the baselines with progress shown, publish the central one, and note all in the run's metrics."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        line = progress.add_task("training centrally and each client alone ...")
        baselines, central = compare(
            config,
            workers=default_workers(),
            advance=lambda name: progress.update(line, description=f"{name} done"),
            null=null,
        )
    evaluation = next(arm.evaluation for arm in baselines if arm.name == "central")
    with Registry.open(summary.registry) as registry:
        metrics = {f"held_out_{key}": float(value) for key, value in evaluation.items()}
        run_id = f"{summary.run_id}-central"
        publish_central(registry, full_session(config), central, run_id=run_id, metrics=metrics)
    tracker = JsonlTracker(summary.run_dir / "metrics.jsonl")
    for arm in baselines:
        tracker.emit(arm.as_event())
    tracker.close()
    return baselines


def metrics_of(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a round's evaluation."""
    return {name: float(value) for name, value in evaluation.items() if name != "version_id"}


def rounds_table(history: History) -> Table:
    """One row per round: who took part, losses, the global adapter's held-out result, bytes per client."""
    table = Table(
        "round", "clients", "train\nloss", "held-out\nloss", "accu-\nracy", "up per\nclient", "down per\nclient",
        "re-\nfused",
        title="The global adapter after each round, on all clients' held-out tweets",
    )  # fmt: skip
    table.add_row("0", "-", "-", *_held_out(history.held_out.get(0)), "-", "-", "-")
    for number, event in sorted(history.rounds.items()):
        count = max(1, int(event["participants"]))
        table.add_row(
            str(number),
            f"{event['participants']}/{event['cohort']}",
            "-" if event["train_loss"] is None else f"{event['train_loss']:.4f}",
            *_held_out(history.held_out.get(number)),
            f"{event['bytes_up'] / count / 1000:,.1f} kB",
            f"{event['bytes_down'] / max(1, int(event['cohort'])) / 1000:,.1f} kB",
            str(len(event["refused"])),
        )
    return table


def arms_table(history: History, baselines: Sequence[Baseline]) -> Table:
    """The federated adapter beside the null, local-only and central ones."""
    table = Table("adapter", "held-out loss", "accuracy", title="Compared on the same held-out tweets of all clients")
    found = {arm.name: arm for arm in baselines}
    table.add_row("null (untrained head)", *_held_out(found["null"].evaluation))
    for client_id, evaluation in (found["local_only"].detail or {}).items():
        table.add_row(f"  {client_id} alone", *_held_out(evaluation), style="dim")
    table.add_row("local-only, mean", *_held_out(found["local_only"].evaluation))
    table.add_row("federated", *_held_out(history.final_evaluation), style="bold green")
    table.add_row("central (pooled tweets)", *_held_out(found["central"].evaluation))
    return table


def sizes_table(history: History) -> Table:
    """Adapter against base."""
    run = history.run
    table = Table("", "parameters", "bytes", title="What travels and what stays")
    table.add_row("base, stays on the device", f"{run['base_params']:,}", f"{run['base_bytes']:,}")
    table.add_row("adapter with head, travels", f"{run['adapter_params']:,}", f"{run['adapter_bytes']:,}")
    params, size = run["adapter_params"] / run["base_params"], run["adapter_bytes"] / run["base_bytes"]
    table.add_row("share", f"{params:.2%}", f"{size:.2%}", style="bold")
    return table


def _held_out(evaluation: Mapping[str, Any] | None) -> Cells:
    if not evaluation:
        return "-", "-"
    return f"{evaluation['loss']:.4f}", f"{evaluation['accuracy']:.1%}"


def serve(summary: RunSummary, console: Console) -> None:
    """Act as a device: answer the same inputs with null, version 1 and the last version, then roll back one."""
    tracker = JsonlTracker(summary.run_dir / "metrics.jsonl")
    with Registry.open(summary.registry) as registry:
        published = registry.versions(summary.run_id)
        versions = [published[min(1, len(published) - 1)], registry.get(summary.version_id)]
        runtime = open_runtime(versions[0].manifest, app_dir=APP)
        for record in versions:
            label = f"v{record.number}"
            weights = registry.weights(record.version_id)
            runtime.install(record.manifest, weights, version_id=record.version_id, label=label)
    table = Table("tweet", title="One base in memory, three adapters")
    answers: list[list[str]] = [[text] for text in TWEETS]
    rows = [{"text": text} for text in TWEETS]
    activations = []
    for digest in (NULL, *(record.manifest.weights_digest for record in versions)):
        activation = runtime.activate(digest)
        served = runtime.predict(rows)
        table.add_column(served.slot.label)
        activations.append((served.slot.label, activation))
        tracker.emit(_activation_event(served.slot, activation))
        for answer, text, prediction in zip(answers, TWEETS, served.predictions, strict=True):
            answer.append(f"{prediction.label} {prediction.probability:.0%}")
            tracker.emit(_answer_event(text, served.slot.label, prediction))
    for answer in answers:
        table.add_row(*answer)
    activation = runtime.rollback()
    activations.append((f"rollback to {runtime.active.label}", activation))
    tracker.emit(_activation_event(runtime.active, activation))
    tracker.close()
    console.print(table)
    console.print(activation_table(activations))


def activation_table(activations: Sequence[tuple[str, Activation]]) -> Table:
    """How long each change of the routing took."""
    table = Table("activated", "kind", "milliseconds", title="Activation changes only the routing")
    for label, activation in activations:
        table.add_row(label, activation.kind, f"{activation.milliseconds:.3f}")
    return table


def _answer_event(text: str, version: str, prediction: Any) -> dict[str, Any]:
    return {
        "event": "answer",
        "text": text,
        "version": version,
        "label": prediction.label,
        "probability": prediction.probability,
    }


def _activation_event(slot: Slot, activation: Activation) -> dict[str, Any]:
    return {
        "event": "activation",
        "what": activation.kind,
        "version_id": None if slot.digest == NULL else slot.version_id,
        "number": slot.manifest.round_number if slot.manifest else None,
        "milliseconds": activation.milliseconds,
    }


def finish(summary: RunSummary) -> None:
    """Write the report again, now with the comparison, the central version and the device's answers."""
    with Registry.open(summary.registry) as registry:
        write_versions(summary.run_dir, registry.versions())
    write_report(summary.run_dir)


if __name__ == "__main__":
    sys.exit(exit_code(main))
