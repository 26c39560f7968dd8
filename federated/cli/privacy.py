"""``fedpeft privacy``: what a run would spend, has spent, and can be shown to leak."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["app"]

app = typer.Typer(help="Differential privacy: audits of its mechanism.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command()
def audit(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[OVERRIDES]...", help="Hydra overrides, such as privacy=client_dp.")
    ] = None,
    app_dir: Annotated[Path, typer.Option("--app", metavar="DIR", help="App folder with conf/.")] = Path(),
    canaries: Annotated[int, typer.Option(min=2, max=5000, help="Canaries; more raise the ceiling.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, max=50, help="Most releases that are looked at.")] = 4,
    quick: Annotated[bool, typer.Option("--quick", help="200 canaries, at most 2 steps.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the coins that put canaries in.")] = 0,
) -> None:
    """Push canaries through a run's clipping, sampling and noise, and bound from below what they leak."""
    from federated.cli import privacy_audit as command

    count, most = (200, min(2, steps)) if quick else (canaries, steps)
    command.run(list(overrides or []), app_dir=app_dir, canaries=count, steps=most, seed=seed, console=Console())
