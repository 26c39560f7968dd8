"""``fedpeft deploy``: a federation over devices on this machine's SuperLink: made, started, looked at, ended.

`federated.cli.deploy_devices` has the commands on devices, `federated.cli.deploy_status` the one that looks,
`federated.cli.runs` those on runs.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from federated.cli.deploy_status import COMMANDS
from federated.cli.tables import say
from federated.errors import ConfigError

if TYPE_CHECKING:
    from federated.config import ExperimentConfig
    from federated.deployment.layout import Layout
    from federated.deployment.server_config import ServerConfig

__all__ = ["app"]

app = typer.Typer(help="A federation over devices: start it, admit devices, look at it.", no_args_is_help=True)

FolderOption = Annotated[Path, typer.Option("--folder", metavar="DIR", help="The deployment's folder.")]
FOLDER = Path("deployment")
_DEMO = ("experiment=airlines", "rounds=2")


@app.command()
def init(
    hosts: Annotated[
        list[str] | None, typer.Argument(metavar="[HOST]...", help="Names and addresses that devices call.")
    ] = None,
    folder: FolderOption = FOLDER,
    app_dir: Annotated[
        Path, typer.Option("--app", metavar="DIR", help="App folder whose runs are submitted.")
    ] = Path(),
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Of the door that devices reach.")] = 9443,
    listen: Annotated[str, typer.Option("--listen", metavar="ADDRESS", help="That the door listens on.")] = "",
    name: Annotated[str, typer.Option("--name", help="Of the federation.")] = "federation",
) -> None:
    """Make a deployment's folder: server.yaml, certificates, keys. Nothing is started.

    Example: fedpeft deploy init fed.example.org --listen 0.0.0.0
    """
    from federated.deployment.app_bundle import app_name
    from federated.deployment.server_config import ServerConfig
    from federated.deployment.starting_up import alone, make_deployment

    names = tuple(hosts or ("localhost", "127.0.0.1"))
    address = listen or ("0.0.0.0" if hosts else "127.0.0.1")  # noqa: S104 - the door is what devices reach
    config = ServerConfig(
        name=name, hosts=names, door_host=address, door_port=port, app=str(app_dir.resolve()), insecure=False
    )
    with alone(folder.resolve(), say=say):
        if not (folder / "server.yaml").exists():
            app_name(app_dir)  # one that is none is said now, not when the first run is submitted
        layout = make_deployment(folder.resolve(), config)
    say(f"{layout.folder}: the door will be {config.url}; 'fedpeft deploy up --folder {folder}' starts it")


@app.command()
def up(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[OVERRIDES]...", help="Of the first run, as for simulate.")
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", min=0, help="Devices on this machine, with data of their own.")] = 0,
    folder: FolderOption = FOLDER,
    app_dir: Annotated[Path, typer.Option("--app", metavar="DIR", help="App folder; default: server.yaml's.")] = Path(),
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Without TLS, authentication and signatures, on loopback alone.")
    ] = False,
    warm: Annotated[
        bool, typer.Option("--warm/--cold", help="Whether those devices hold the libraries in memory.")
    ] = True,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the first run to its end.")] = True,
) -> None:
    """Start a deployment; with --nodes also devices on this machine, and a first run on them, shown live.

    Example: fedpeft deploy up --nodes 3
    """
    from federated.deployment.runs import Runs
    from federated.deployment.server_config import read_server_config
    from federated.deployment.starting_up import alone, bring_up

    began = time.monotonic()
    place, given = folder.resolve(), list(overrides or _DEMO)
    if overrides and not nodes:
        raise ConfigError(f"{overrides[0]}: a first run needs devices; say --nodes N, or use 'fedpeft run submit'")
    _known(place, local=nodes > 0)
    with alone(place, say=say):
        _made(place, app_dir, insecure=insecure)
        if insecure and not read_server_config(place).insecure:
            raise ConfigError(f"--insecure: {place} was made with TLS; make another deployment in another folder")
        layout, config, _ = bring_up(place, say=say)
        if nodes:
            _devices(layout, config, given, nodes, warm=warm)
    if config.insecure:
        say("insecure: no TLS, no authentication of devices, no signatures: anybody on this machine can take part, "
            "read and change every message", stderr=True)  # fmt: skip
    if nodes:
        runs = Runs(layout, config)
        submission = runs.submit([*given, f"selection.min_clients={nodes}", "selection.wait=600"])
        say(f"run {submission.name} is submitted, {time.monotonic() - began:.0f} s after the start")
        if wait:
            from federated.cli.runs import follow_run

            follow_run(runs, submission)
    say(f"up: {config.url}; look: 'fedpeft deploy status', end: 'fedpeft deploy down'")


def _devices(layout: Layout, config: ServerConfig, given: list[str], nodes: int, *, warm: bool) -> None:
    """Devices on this machine, enrolled and started."""
    from federated.deployment.app_bundle import app_digest
    from federated.deployment.local_nodes import enrol_local_nodes, make_local_nodes
    from federated.deployment.processes import Processes, programs_of

    experiment = _experiment(config, given)
    apps = [app_digest(Path(config.app))]
    app = Path(config.app)
    names = make_local_nodes(layout, config, experiment, count=nodes, app=app, apps=apps, warm=warm)
    if not config.insecure:
        enrol_local_nodes(layout, config, names)
    Processes(layout).start(programs_of(layout, config))
    say(f"{nodes} devices are up: {', '.join(names)}")


def _known(place: Path, *, local: bool) -> None:
    if not local and not (place / "server.yaml").exists():
        raise ConfigError(f"{place} holds no deployment; 'fedpeft deploy init HOST' makes one, --nodes N one for a try")


def _made(place: Path, app_dir: Path, *, insecure: bool) -> None:
    """A deployment for this machine alone, where there is none yet."""
    from federated.cli.compose import conf_folder
    from federated.deployment.loopback import free_ports
    from federated.deployment.server_config import ServerConfig
    from federated.deployment.starting_up import make_deployment

    if (place / "server.yaml").exists():
        return
    conf_folder(app_dir)  # says what is missing
    door, superlink, status = free_ports(3)
    config = ServerConfig(
        hosts=("127.0.0.1", "localhost"),
        door_port=door,
        superlink_port=superlink,
        status_port=status,
        app=str(app_dir.resolve()),
        insecure=insecure,
    )
    make_deployment(place, config)


def _experiment(config: ServerConfig, overrides: list[str]) -> ExperimentConfig:
    from federated.cli.apps import enter_app
    from federated.cli.compose import compose_run

    return compose_run(enter_app(Path(config.app)), overrides)


@app.command()
def down(folder: FolderOption = FOLDER) -> None:
    """End every process of a deployment. Finished rounds, devices and keys stay; 'up' goes on from there."""
    from federated.deployment.layout import Layout
    from federated.deployment.processes import Processes
    from federated.deployment.server_config import read_server_config

    place = folder.resolve()
    read_server_config(place)
    processes = Processes(Layout(place))
    if not processes.running:
        say(f"{place} is not up")
        return
    processes.stop()
    say(f"{place} is down")


@app.command("app")
def app_command(
    folder: FolderOption = FOLDER,
    app_dir: Annotated[
        Path | None, typer.Option("--app", metavar="DIR", help="App folder; default: server.yaml's.")
    ] = None,
) -> None:
    """Print the SHA-256 of the app's bundle: what a device's owner reads, and then pins in training.apps."""
    from federated.deployment.app_bundle import app_digest
    from federated.deployment.server_config import read_server_config

    say(app_digest(app_dir or Path(read_server_config(folder.resolve()).app)))


for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
