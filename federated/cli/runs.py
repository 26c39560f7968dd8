"""``fedpeft run``: federations on a deployment, with the same overrides as ``fedpeft simulate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from federated.cli.tables import console, fill, say
from federated.errors import ConfigError, DeploymentError

if TYPE_CHECKING:
    from federated.deployment.runs import Runs, Submission

__all__ = ["app", "follow_run", "show_runs"]

app = typer.Typer(help="Federations on a deployment: submit, look, stop, resume.", no_args_is_help=True)

FolderOption = Annotated[Path, typer.Option("--folder", metavar="DIR", help="The deployment's folder.")]
FOLDER = Path("deployment")
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")]


@app.command()
def submit(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[OVERRIDES]...", help="Hydra overrides, as for simulate.")
    ] = None,
    folder: FolderOption = FOLDER,
    name: Annotated[str, typer.Option("--name", help="Of the run; default: made from the time.")] = "",
    app_dir: Annotated[
        Path | None, typer.Option("--app", metavar="DIR", help="App folder; default: server.yaml's.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow it to its end.")] = False,
) -> None:
    """Run a federation over the devices that are there.

    Example: fedpeft run submit experiment=airlines rounds=5
    """
    from federated.cli.apps import enter_app
    from federated.cli.compose import compose_run

    runs = _runs(folder)
    compose_run(enter_app(app_dir or runs.app), overrides or [])
    submission = runs.submit(overrides or [], name=name, app=app_dir)
    say(f"run {submission.name} is submitted as {submission.flower_runs[-1]}, with app {submission.app_digest[:12]}")
    if wait:
        follow_run(runs, submission)


@app.command()
def status(
    run: Annotated[str, typer.Argument(metavar="[RUN]", help="One run; default: all.")] = "",
    folder: FolderOption = FOLDER,
) -> None:
    """Show how runs stand: by their own record, and by what Flower says of their process."""
    show_runs(_runs(folder), run)


@app.command()
def logs(run: RunArgument, folder: FolderOption = FOLDER) -> None:
    """Print what the run's server process said."""
    say(_runs(folder).logs(run))


@app.command()
def stop(run: RunArgument, folder: FolderOption = FOLDER) -> None:
    """Stop a run; its finished rounds are published, and 'resume' goes on from there."""
    _runs(folder).stop(run)
    say(f"run {run} is stopped; 'fedpeft run resume {run}' goes on from its last round, or begins where it has none")


@app.command()
def resume(
    run: RunArgument,
    folder: FolderOption = FOLDER,
    wait: Annotated[bool, typer.Option("--wait", help="Follow it to its end.")] = False,
) -> None:
    """Go on with a run from its last published round."""
    runs = _runs(folder)
    submission = runs.resume(run)
    say(f"run {run} goes on, attempt {len(submission.flower_runs)}")
    if wait:
        follow_run(runs, submission)


def _runs(folder: Path) -> Runs:
    from federated.deployment.layout import Layout
    from federated.deployment.runs import Runs
    from federated.deployment.server_config import read_server_config

    place = folder.resolve()
    return Runs(Layout(place), read_server_config(place))


def show_runs(runs: Runs, only: str = "") -> None:
    """A table of runs."""
    table = Table("run", "state", "rounds", "attempts", "Flower", "message")
    for name in [only] if only else runs.names:
        try:
            one = runs.standing(name)
        except ConfigError as error:
            if only:
                raise
            fill(table, [[name, "unreadable", "", "", "", str(error)]])
            continue
        rounds = f"{one.rounds_done} of {one.rounds or '?'}"
        fill(table, [[name, one.state, rounds, len(one.submission.flower_runs), one.flower, one.message]])
    console().print(table)


def follow_run(runs: Runs, submission: Submission) -> None:
    """Show a run live until it ends.

    Raises:
        DeploymentError: if it did not complete.
    """
    from federated.deployment.following import follow
    from federated.display import LiveDisplay

    display, said = LiveDisplay(), set[str]()
    try:
        path = runs.folder(submission.name) / "metrics.jsonl"
        end = follow(
            path,
            display,
            going_on=lambda: _goes_on(runs, submission.name, said),
            since=submission.attempted,
        )
    finally:
        display.close()
    if end.get("status") != "completed":
        if runs.submission(submission.name).stopped:
            raise DeploymentError(f"run {submission.name} was stopped; 'fedpeft run resume {submission.name}' goes on")
        why = end.get("message") or runs.standing(submission.name).message or "its process ended without a word"
        raise DeploymentError(f"run {submission.name} did not complete: {why}; 'fedpeft run logs {submission.name}'")
    say(f"report        {runs.folder(submission.name) / 'report.html'}")


def _goes_on(runs: Runs, name: str, said: set[str]) -> bool:
    """Whether a run goes on; once it says what keeps it from beginning."""
    standing = runs.standing(name)
    if standing.state == "running" and standing.message and not said:
        said.add(standing.message)
        say(f"run {name}: {standing.message}", stderr=True)
    return runs.goes_on(standing)
