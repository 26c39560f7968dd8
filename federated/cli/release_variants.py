"""``fedpeft release publish --variants``: which other ways to a version's weights are shipped, by measured loss.

The loss is measured here, on rows that the publisher gives, by the model that the version's record describes; what is
measured and shipped is printed. `federated.release.variants` decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from federated.cli.tables import console, fill, say
from federated.errors import BaseMismatch, ConfigError, WireError

if TYPE_CHECKING:
    from federated.manifest import VersionManifest
    from federated.registry import Registry
    from federated.release import Artefact, Publisher, Tried

__all__ = [
    "DiffFromOption",
    "HeldOutOption",
    "ToleranceOption",
    "VariantsOption",
    "add_variants",
    "loss_on",
]

AUTO, NONE = "auto", "none"
_BATCH = 32

VariantsOption = Annotated[
    str,
    typer.Option(
        "--variants",
        metavar="auto|none|CODEC,...",
        help="auto: the smallest whose measured loss is within the tolerance; without --held-out, lossless ones alone.",
    ),
]
HeldOutOption = Annotated[
    Path | None,
    typer.Option("--held-out", metavar="FILE", help="CSV, JSONL or Parquet file of rows to measure variants on."),
]
ToleranceOption = Annotated[
    float,
    typer.Option("--tolerance", min=0.0, metavar="SHARE", help="By which the loss of a lossy variant may be higher."),
]
DiffFromOption = Annotated[
    list[str] | None,
    typer.Option(
        "--diff-from",
        metavar="VERSION",
        help="Make diffs from this version, as released on the channel; again for more. "
        "Default: the one that the channel pointed at last; none: no diffs.",
    ),
]


def add_variants(
    artefact: Artefact,
    channel: str,
    wanted: str,
    *,
    publisher: Publisher,
    registry: Registry,
    diff_from: Sequence[str] | None,
    held_out: Path | None,
    tolerance: float,
) -> Artefact:
    """The artefact with variants, and a table of them.

    Raises:
        ReleaseError: if a codec is unknown or does not fit, or what devices hold cannot be read.
        DataError, ModelError, DeviceError: if the loss cannot be measured.
    """
    from federated.release import with_variants
    from federated.wire import decode_tensors

    if wanted == NONE:
        return artefact
    if wanted == AUTO:
        try:
            decode_tensors(artefact.weights)
        except WireError as error:
            say(f"no variants: the weights are not canonical ({error})", stderr=True)
            return artefact
    codecs = AUTO if wanted == AUTO else [one.strip() for one in wanted.split(",")]
    held = _held(publisher, registry, channel, artefact.version_id, diff_from)
    evaluate = None if held_out is None else loss_on(artefact.manifest, held_out)
    if evaluate is None and wanted == AUTO:
        say("no --held-out rows to measure a loss on: lossless variants only", stderr=True)
    made, tried = with_variants(artefact, codecs, held=held, evaluate=evaluate, tolerance=tolerance)
    _show(tried, made)
    return made


def loss_on(manifest: VersionManifest, held_out: Path, *, app_dir: Path | None = None) -> Callable[[bytes], float]:
    """A function from canonical weights to their loss on a file's rows.

    Args:
        manifest: of the version: its record says how to build the model.
        held_out: a file with the task's columns (``text`` and ``label``, ``messages`` ...).
        app_dir: where a relative base model is looked up after the working directory.

    Raises:
        BaseMismatch: if what its record calls the base is another model by now.
        DataError, ModelError, DeviceError: if rows, base or record cannot be read.
    """
    from federated.adapters import load_base
    from federated.config import DataConfig
    from federated.data.readers import read_records
    from federated.data.rows import RowReader
    from federated.device import recipe_of
    from federated.device.backends.torch import TorchBackend
    from federated.tasks import make_task
    from federated.wire import decode_tensors

    recipe = recipe_of(manifest)
    reader = RowReader(DataConfig(), recipe.task)
    rows = reader.rows(read_records(held_out, columns=reader.columns))
    base = load_base(recipe.model, app_dir=app_dir)
    if base.base_digest != manifest.base_digest:
        raise BaseMismatch(
            f"the version belongs to the base model {manifest.base_digest[:12]}, and {recipe.model.source} is "
            f"{base.base_digest[:12]}: nothing can be measured; give the base that it was trained on"
        )
    backend, task = TorchBackend(base, recipe), make_task(recipe.task, base.tokenizer)
    features = task.encode(rows)

    def loss(weights: bytes) -> float:
        model = backend.build(manifest.spec, decode_tensors(weights)).model
        return task.evaluate(model, features, batch_size=_BATCH).loss

    return loss


def _held(
    publisher: Publisher, registry: Registry, channel: str, version_id: str, diff_from: Sequence[str] | None
) -> list[bytes]:
    """What devices hold of the versions to make diffs from."""
    if diff_from:
        if NONE in diff_from:
            if len(diff_from) > 1:
                raise ConfigError("--diff-from none stands alone; expected versions, or none")
            return []
        return publisher.held(channel, *(registry.get(one).version_id for one in diff_from))
    released = [one.current.version_id for one in publisher.status().channels if one.name == channel and one.current]
    moves = [one.version_id for one in registry.channel(channel).history()]
    before = (one for one in dict.fromkeys([*released, *moves]) if one != version_id)
    return next((found for one in before if (found := publisher.held(channel, one))), [])


def _show(tried: Iterable[Tried], made: Artefact) -> None:
    table = Table("codec", "from", "bytes", "of the weights", "held-out loss", "shipped")
    whole = len(made.weights)
    rows = [("weights", "", whole, whole, made.loss, True)]
    rows += [(one.codec, one.source[:12], one.nbytes, whole, one.loss, one.shipped) for one in tried]
    for codec, source, nbytes, _, loss, shipped in rows:
        size = [f"{nbytes}", f"{nbytes / whole:.1%}"] if nbytes else ["does not fit", ""]
        fill(table, [[codec, source, *size, "" if loss is None else f"{loss:.6f}", "yes" if shipped else ""]])
    console().print(table)
