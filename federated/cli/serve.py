"""``fedpeft serve``: an HTTP server over the versions of a registry or of a device, all on one base model.

The server itself is `federated.device.serving`; here its parts are put together.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from federated.cli.registry import BlobsOption, RegistryOption, open_registry
from federated.cli.tables import say
from federated.errors import ConfigError

if TYPE_CHECKING:
    from federated.config import ModelConfig
    from federated.device import AdapterRuntime
    from federated.device.serving import Control, Limits, Listener, Service, Source, Tokens
    from federated.device.serving.service import Speaks
    from federated.manifest import VersionManifest

__all__ = ["serve"]

STABLE = "stable"
_LOGGERS = ("federated.serving", "federated.device")
_TOKEN, _ADMIN_TOKEN = "FEDPEFT_SERVE_TOKEN", "FEDPEFT_ADMIN_TOKEN"


@dataclass(frozen=True)
class _Options:
    """What of the command line does not depend on where versions come from."""

    host: str
    port: int
    tokens: Tokens
    anonymous: bool
    admin_port: int | None
    admin_socket: Path | None
    admin_tokens: Tokens
    limits: Limits
    routes: list[tuple[str, str, str]]


def serve(
    base: Annotated[str, typer.Option(help="The base model here. Default: where the version's record says.")] = "",
    channel: Annotated[
        str, typer.Option(help="Its version answers by default, and is followed.", show_default=STABLE)
    ] = "",
    registry: RegistryOption = None,
    blobs: BlobsOption = None,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VERSION", help="One more adapter, by a name; repeat for more.")
    ] = None,
    device: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A device's file, in place of a registry: its agent runs along.")
    ] = None,
    routes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML: which user or arm gets which adapter.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help=f"Bearer tokens, one a line. Default: ${_TOKEN}.")
    ] = None,
    allow_anonymous: Annotated[
        bool, typer.Option("--allow-anonymous", help="Serve an address that others reach without tokens.")
    ] = False,
    admin_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Where adapters are loaded and activated, on 127.0.0.1.")
    ] = None,
    admin_socket: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The same on a Unix socket that its owner alone can open.")
    ] = None,
    admin_token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help=f"Its own tokens. Default: ${_ADMIN_TOKEN}.")
    ] = None,
    capacity: Annotated[int | None, typer.Option(min=1, help="Adapters kept in memory.", show_default="8")] = None,
    poll: Annotated[
        float | None, typer.Option(min=0.05, help="Seconds between two looks at the channel.", show_default="30")
    ] = None,
    generations: Annotated[int, typer.Option(min=1, help="Answers written at the same time.")] = 4,
    waiting: Annotated[int, typer.Option(min=1, help="Requests of a kind that may wait.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens that a request may ask for.")] = 1024,
    request_seconds: Annotated[float, typer.Option(min=0.1, help="Longest work on one request.")] = 120.0,
    app_dir: Annotated[Path, typer.Option("--app", metavar="DIR", help="Where a relative base is looked up.")] = Path(),
) -> None:
    """Serve a channel's version over HTTP, as OpenAI's clients know it, until Ctrl-C.

    Example: fedpeft serve --channel stable --adapter support=v3 --port 8000
    """
    _check_admin(admin_port, admin_socket, admin_token_file)
    if device is not None:
        _check_device(base=base, channel=channel, registry=registry, blobs=blobs, adapter=adapter, capacity=capacity,
                      poll=poll)  # fmt: skip
    from federated.device.serving import Limits, read_tokens

    options = _Options(
        host,
        port,
        read_tokens(token_file, _TOKEN),
        allow_anonymous,
        admin_port,
        admin_socket,
        read_tokens(admin_token_file, _ADMIN_TOKEN),
        Limits(generations=generations, waiting=waiting, max_tokens=max_tokens, request_seconds=request_seconds),
        _routes(routes),
    )
    named = [_pair(one) for one in adapter or []]
    with _logged():
        if device is not None:
            _from_device(device, app_dir, options)
            return
        with open_registry(registry, blobs) as store:
            from federated.device.serving import RegistrySource

            source, channel = RegistrySource(store), channel or STABLE
            manifest = source.find(channel).manifest
            runtime = _runtime(manifest, base, app_dir, capacity or 8)
            control = _control(runtime, source, channel, _base_name(manifest, base))
            for name, version in named:
                control.load(name, version)
            _run(_service(control, manifest, options, poll_seconds=poll or 30.0), options)


def _from_device(file: Path, app_dir: Path, options: _Options) -> None:
    """With the runtime of a device's agent, which decides what is active."""
    from federated.cli.serve_device import agent_beside
    from federated.device.serving import Control, Directory

    with agent_beside(file, app_dir) as beside:
        ruler = "this device's agent does it: fedpeft device install | activate | rollback | pin"
        directory = Directory(beside.runtime, _base_name(beside.manifest, ""))
        control = Control(beside.runtime, directory, ruler=ruler, troubled=beside.troubled)
        _run(_service(control, beside.manifest, options, health=beside.health), options)


def _check_device(**given: Any) -> None:
    wrong = [f"--{name}" for name, value in given.items() if value]
    if wrong:
        raise ConfigError(f"--device brings its own {', '.join(wrong)}: leave it out, or set it in the device's file")


def _runtime(manifest: VersionManifest, base: str, app_dir: Path, capacity: int) -> AdapterRuntime:
    from federated.device import open_runtime

    return open_runtime(manifest, app_dir=app_dir, model=_own_base(manifest, base), capacity=capacity)


def _own_base(manifest: VersionManifest, base: str) -> ModelConfig | None:
    """The device's own base; None: the record's."""
    from federated.device import recipe_of

    return replace(recipe_of(manifest).model, source=base) if base else None


def _control(runtime: AdapterRuntime, source: Source, channel: str, base_name: str) -> Control:
    """With the channel's version installed and active."""
    from federated.device.serving import Control, Directory

    control = Control(runtime, Directory(runtime, base_name), source, channel=channel)
    control.follow()
    return control


def _service(control: Control, manifest: VersionManifest, options: _Options, **more: Any) -> Service:
    from federated.device import recipe_of
    from federated.device.serving import Service

    speaks: Speaks = "text" if recipe_of(manifest).task.name == "causal_lm" else "labels"
    for kind, key, name in options.routes:
        control.route(**{kind: key}, name=name)
    return Service(control.runtime, control, speaks=speaks, limits=options.limits, **more)


def _base_name(manifest: VersionManifest, base: str) -> str:
    """What requests call the base: a hub's name as it is, a folder by its last part."""
    from federated.device import recipe_of

    source = base or recipe_of(manifest).model.source
    return Path(source).name if Path(source).is_absolute() or source.startswith(".") else source


def _check_admin(port: int | None, path: Path | None, token_file: Path | None) -> None:
    if port is not None and path is not None:
        raise ConfigError("--admin-port and --admin-socket were both given; choose one of them")
    if token_file is not None and port is None and path is None:
        raise ConfigError("--admin-token-file opens nothing by itself; add --admin-port or --admin-socket")


def _listeners(service: Service, options: _Options) -> list[Listener]:
    from federated.device.serving import admin_listener, public_listener

    public = public_listener(
        service, host=options.host, port=options.port, tokens=options.tokens, anonymous=options.anonymous
    )
    port, path = options.admin_port, options.admin_socket
    if port is None and path is None:
        return [public]
    return [public, admin_listener(service, tokens=options.admin_tokens, port=port or 0, path=path)]


def _run(service: Service, options: _Options) -> None:
    from federated.device.serving import serve as run

    listeners = _listeners(service, options)

    def started() -> None:
        active = service.runtime.active
        say(f"{active.label} ({active.version_id[:12]}) answers at {listeners[0].place}", stderr=True)
        for other in listeners[1:]:
            say(f"admin: {other.place}", stderr=True)

    run(service, listeners, started=started)


def _pair(text: str) -> tuple[str, str]:
    name, equals, version = text.partition("=")
    if not (name and equals and version):
        raise ConfigError(f"--adapter {text!r} is no pair; expected NAME=VERSION, such as support=v3")
    return name, version


def _routes(path: Path | None) -> list[tuple[str, str, str]]:
    """What a routing file says: ``user`` or ``arm``, whose, and to which adapter.

    Raises:
        ConfigError: if it cannot be read, or is not of that shape.
    """
    if path is None:
        return []
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML ({type(error).__name__})") from None
    if not isinstance(found, dict) or not set(found) <= {"users", "arms"} or not all(map(_is_table, found.values())):
        raise ConfigError(
            f"{path} is no routing; expected 'users:' and 'arms:', each with lines such as 'ann: support'"
        )
    return [(kind[:-1], key, name) for kind, table in found.items() for key, name in table.items()]


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(one, str) for pair in value.items() for one in pair)


@contextmanager
def _logged() -> Iterator[None]:
    """One line for each request, and for what an agent does, on stderr; no inputs."""
    loggers, handler = [logging.getLogger(name) for name in _LOGGERS], logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
