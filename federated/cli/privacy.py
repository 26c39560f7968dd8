"""``fedpeft privacy``: what a run would spend, has spent, and can be shown to leak."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["app"]

app = typer.Typer(
    help="Differential privacy: plan a run, see what one has spent, audit its mechanism.", no_args_is_help=True
)

_WIDE = 160  # columns when stdout is no terminal, so that nothing is cut in a pipe

AppOption = Annotated[Path, typer.Option("--app", metavar="DIR", help="App folder with conf/.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[OVERRIDES]...", help="Hydra overrides, such as privacy=example_dp rounds=50."),
]


@app.command()
def plan(
    overrides: Overrides = None,
    app_dir: AppOption = Path(),
    examples: Annotated[
        list[int] | None,
        typer.Option("--examples", metavar="N", help="Training examples of a client; again for more. Default: count."),
    ] = None,
    clients: Annotated[
        int | None, typer.Option("--clients", metavar="N", help="Clients that may take part. Default: count.")
    ] = None,
    parameters: Annotated[
        int | None, typer.Option("--parameters", metavar="N", help="Numbers in an update. Default: ask the model.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a run would promise and cost, before anything runs."""
    from federated.cli import privacy_plan as command

    given = command.Given(tuple(examples or ()), clients, parameters)
    command.run(list(overrides or []), app_dir=app_dir, given=given, as_json=as_json, console=_console())


@app.command()
def spent(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or a registry's folder or URL.")],
    blobs: Annotated[
        str | None, typer.Option("--blobs", metavar="FOLDER_OR_URL", help="Where the bytes are, if RUN is a URL.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what each version of a run has spent, and under which assumptions."""
    from federated.cli import privacy_spent as command

    command.run(run, blobs=blobs, as_json=as_json, console=_console())


@app.command()
def audit(
    overrides: Overrides = None,
    app_dir: AppOption = Path(),
    canaries: Annotated[int, typer.Option(min=2, max=5000, help="Canaries; more raise the ceiling.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, max=50, help="Most releases that are looked at.")] = 4,
    quick: Annotated[bool, typer.Option("--quick", help="200 canaries, at most 2 steps.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the coins that put canaries in.")] = 0,
) -> None:
    """Push canaries through a run's clipping, sampling and noise, and bound from below what they leak."""
    from federated.cli import privacy_audit as command

    count, most = (200, min(2, steps)) if quick else (canaries, steps)
    command.run(list(overrides or []), app_dir=app_dir, canaries=count, steps=most, seed=seed, console=_console())


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_WIDE)
