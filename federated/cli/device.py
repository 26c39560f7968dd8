"""``fedpeft device try``: answer texts with a published version, or with the null adapter, straight from a registry.

`federated.cli.device_agent` has the commands of a device that follows signed releases.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from federated.device import Activation, AdapterRuntime
    from federated.registry import Registry, VersionRecord

__all__ = ["app", "answer_table"]

app = typer.Typer(help="Act as a device: hold adapter versions beside one base model and answer.", no_args_is_help=True)


@app.command("try")
def try_(
    text: Annotated[list[str], typer.Option(help="A text to answer; repeat for more.")],
    version: Annotated[
        str, typer.Option(help="latest, v3, RUN:v3, a channel, a version id or its beginning; or null.")
    ] = "latest",
    registry: Annotated[str, typer.Option(help="Folder or URL; default: the newest registry below runs/.")] = "",
    app_dir: Annotated[Path, typer.Option("--app", help="Folder where the base model is looked up.")] = Path(),
    onnx: Annotated[
        Path | None,
        typer.Option("--onnx", metavar="FOLDER", help="Answer in onnxruntime, from a base exported --as onnx-base."),
    ] = None,
) -> None:
    """Answer texts with one version and say how long its activation took."""
    from rich.console import Console

    from federated.cli.registry import open_registry
    from federated.device import NULL

    with open_registry(registry or None) as store:
        record = store.get("latest" if version == NULL else version)
        _reads_texts(record)
        runtime = _runtime(record, app_dir, onnx)
        activation = runtime.activate(NULL) if version == NULL else _activate(runtime, store, record)
    served = runtime.predict([{"text": item} for item in text])
    console = Console()
    console.print(answer_table(text, served.predictions, title=f"Answers of {served.slot.label}"))
    console.print(_summary(activation, served.slot.label))


def _runtime(record: VersionRecord, app_dir: Path, onnx: Path | None) -> AdapterRuntime:
    if onnx is None:
        from federated.device import open_runtime

        return open_runtime(record.manifest, app_dir=app_dir)
    from federated.device import AdapterRuntime, OnnxBackend

    return AdapterRuntime(OnnxBackend(onnx))


def answer_table(texts: Sequence[str], predictions: Sequence[Any], *, title: str) -> Table:
    """A table of inputs, answers and probabilities.

    Args:
        texts: what was asked, shown as it is (no markup is read from it).
        predictions: the task's answers in the same order, each with ``label`` and ``probability``.
        title: above the table.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title)
    table.add_column("Input", overflow="fold")
    table.add_column("Answer", overflow="fold")
    table.add_column("Probability", justify="right")
    for asked, prediction in zip(texts, predictions, strict=True):
        chance = f"{prediction.probability:.3f}"
        table.add_row(Text(_plain(asked)), Text(_plain(prediction.label)), chance)
    return table


def _reads_texts(record: VersionRecord) -> None:
    """Say so before a model is loaded when the version's task has no use for texts.

    Raises:
        DeviceError: if the task is about series.
    """
    from federated.device import recipe_of
    from federated.errors import DeviceError

    if recipe_of(record.manifest).task.name == "sensor":
        raise DeviceError(
            f"version v{record.number} ({record.version_id[:12]}) answers task=sensor, which takes series of numbers, "
            "found texts (--text): name a version of a text task with --version or --registry, or ask this one from "
            'Python: runtime.predict([{"values": [[0.1, ...], ...]}]), one list of channels per time step'
        )


def _activate(runtime: AdapterRuntime, store: Registry, record: VersionRecord) -> Activation:
    weights = store.weights(record.version_id)
    slot = runtime.install(record.manifest, weights, version_id=record.version_id, label=f"v{record.number}")
    return runtime.activate(slot.digest)


def _summary(activation: Activation, label: str) -> str:
    return f"{label} ({activation.digest[:12]}) activated in {activation.milliseconds:.3f} ms"


def _plain(text: str) -> str:
    """One line without control characters, so that a text cannot steer the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)
