"""``fedpeft``: simulate and train, keep versions, act as a device.

Errors of this library are one line on stderr and exit code 1 (2 for a wrong configuration or command line, 130 when
the user stopped it).
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take their time: the entry point guards them
    from federated.cli.entry import main as guarded

    guarded()

import gc
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from click.exceptions import Abort, ClickException, Exit
from rich.console import Console

from federated import __version__
from federated.cli import (
    assets,
    audit,
    channel,
    deploy,
    deploy_devices,
    device,
    device_agent,
    device_enrol,
    device_join,
    device_personal,
    privacy,
    registry,
    registry_care,
    registry_devices,
    registry_diff,
    registry_export,
    release,
    release_keys,
    release_look,
    runs,
    seals,
    serve,
)
from federated.errors import ConfigError, FederatedError, RunInterrupted

__all__ = ["app", "exit_code", "main"]

app = typer.Typer(
    help="Federated fine-tuning of PEFT adapters: train, publish, serve, undo.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for name, command in (
    registry_care.COMMANDS | registry_diff.COMMANDS | registry_export.COMMANDS | registry_devices.COMMANDS
).items():
    registry.app.command(name)(command)
app.add_typer(registry.app, name="registry")
app.add_typer(channel.app, name="channel")
app.command("approve")(channel.approve)
app.add_typer(audit.app, name="audit")
for name, command in seals.KEY_COMMANDS.items():
    release_keys.app.command(name)(command)
release.app.add_typer(release_keys.app, name="keys")
for name, command in (release_keys.COMMANDS | release_look.COMMANDS | seals.COMMANDS).items():
    release.app.command(name)(command)
app.add_typer(release.app, name="release")
for name, command in (device_agent.COMMANDS | device_enrol.COMMANDS | device_join.COMMANDS).items():
    device.app.command(name)(command)
device.app.add_typer(device_personal.app, name="personal")
app.add_typer(device.app, name="device")
for name, command in deploy_devices.COMMANDS.items():
    deploy.app.command(name)(command)
app.add_typer(deploy.app, name="deploy")
app.add_typer(runs.app, name="run")
app.command("serve")(serve.serve)
app.add_typer(assets.app, name="assets")
app.add_typer(privacy.app, name="privacy")

AppOption = Annotated[
    Path, typer.Option("--app", metavar="DIR", help="App folder with conf/, clients/app.py and strategies/app.py.")
]
CfgOption = Annotated[
    str | None, typer.Option("--cfg", metavar="job", help="Print the resolved configuration instead of running.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[OVERRIDES]...", help="Hydra overrides, such as strategy=fedadam rounds=5."),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"federated-peft {__version__}")
        raise Exit(0)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command()
def simulate(
    overrides: Overrides = None,
    app_dir: AppOption = Path(),
    cfg: CfgOption = None,
    multirun: Annotated[
        bool, typer.Option("--multirun", "-m", help="Sweep: comma-separated values, Hydra's way.")
    ] = False,
    resume: Annotated[Path | None, typer.Option(metavar="RUN_DIR", help="Go on with an interrupted run.")] = None,
) -> None:
    """Run a whole federation on this machine from conf/ plus overrides."""
    from federated.cli import simulate as command

    _environment()
    command.run(list(overrides or []), app_dir=app_dir, show=cfg, multirun=multirun, resume=resume)


@app.command()
def train(
    overrides: Overrides = None,
    app_dir: AppOption = Path(),
    cfg: CfgOption = None,
) -> None:
    """Fine-tune the same adapter centrally, on pooled data that this machine may hold, into the same registry."""
    from federated.cli import train as command

    _environment()
    command.run(list(overrides or []), app_dir=app_dir, show=cfg)


@app.command()
def strategies() -> None:
    """List the aggregation rules: what each claims, sends and goes with."""
    from federated.cli import strategies as command

    command.show(Console())


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run.")]) -> None:
    """Write report.html of a run again."""
    from federated.report import write_report

    typer.echo(str(write_report(run_dir)))


def _environment() -> None:
    """Nothing that runs here calls home."""
    for name, value in (
        ("FLWR_TELEMETRY_ENABLED", "0"),
        ("FLWR_DISABLE_UPDATE_CHECK", "1"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ.setdefault(name, value)


def main() -> None:
    """Run, and turn errors into one line and an exit code; `federated.cli.entry` calls it."""
    # Loading torch and transformers makes half a million objects that stay. Looking for garbage among them as often
    # as Python does by default takes a sixth of the whole start-up.
    gc.set_threshold(200_000, 20, 100)
    code = _run()
    gc.freeze()  # the process ends: a last search for garbage would take another second
    if code == 130 and any(_holds_up(thread) for thread in threading.enumerate()):
        _leave_threads(code)
    sys.exit(code)


def _holds_up(thread: threading.Thread) -> bool:
    return thread is not threading.main_thread() and not thread.daemon


def _leave_threads(code: int) -> NoReturn:
    """End the process now: after Ctrl-C, threads of Flower's Ray engine wait for replies that never come."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run() -> int:
    return exit_code(lambda: app(prog_name="fedpeft", standalone_mode=False))


def exit_code(call: Callable[[], object]) -> int:
    """Run something; an error becomes one line on stderr and an exit code."""
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        returned = call()
        if isinstance(returned, int) and returned:  # typer hands back the code of an exit, Ctrl-C's too
            if returned == 130:
                errors.print("interrupted", style="yellow")
            return returned
    except Exit as error:
        return int(error.exit_code)
    except ClickException as error:
        error.show()
        return error.exit_code
    except RunInterrupted as error:
        errors.print(f"interrupted: {error}", style="yellow", markup=False)
        return 130
    except (KeyboardInterrupt, Abort):
        errors.print("interrupted", style="yellow")
        return 130
    except FederatedError as error:
        errors.print(f"error: {error}", style="red", markup=False)
        return 2 if isinstance(error, ConfigError) else 1
    return 0
