"""``fedpeft train``: the same adapter, trained centrally, into the same registry."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from federated.cli.apps import enter_app
from federated.cli.compose import compose
from federated.cli.simulate import show_config
from federated.flower.central import train_centrally

__all__ = ["run"]


def run(overrides: list[str], *, app_dir: Path, show: str | None) -> None:
    """Train on all clients' rows pooled, for ``rounds * train.epochs`` passes, and publish the result.

    Raises:
        FederatedError: for whatever cannot run; nothing is published then.
    """
    console = Console()
    config = compose(enter_app(app_dir), overrides)
    if show is not None:
        show_config(config, show, console)
        return
    summary = train_centrally(replace(config, name=f"{config.name}-central"))
    console.print(f"last version  {summary.version_id[:16]}  (weights {summary.weights_digest[:16]})", highlight=False)
    console.print(f"registry      {summary.registry}", highlight=False, soft_wrap=True)
    console.print(f"report        {summary.report}", highlight=False, soft_wrap=True)
