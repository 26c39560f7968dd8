"""What the operator of a federation decides: ``server.yaml`` as a frozen record, checked when read.

It lies in the deployment's folder beside what `Layout` names. Unknown keys are refused. Called by `federated.cli`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import yaml
from pydantic import Field, TypeAdapter, ValidationError, field_validator
from pydantic.dataclasses import dataclass

from federated.config import STRICT
from federated.config.wording import one_line
from federated.errors import ConfigError
from federated.files import write_whole
from federated.logs import LogFormat

__all__ = ["ServerConfig", "read_server_config", "write_server_config"]

Port = Annotated[int, Field(ge=1, le=65535)]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, config=STRICT)
class ServerConfig:
    """One deployment.

    Args:
        name: of the federation; the name of its certificate authority too.
        hosts: DNS names and IP addresses under which devices reach the door; they go into the server's certificate.
        door_host: address that the door listens on.
        door_port: port of the door: the only one that devices need.
        door_url: how devices call the door, when it is behind something else; default: the first of ``hosts``.
        superlink_port: where Flower's SuperLink listens, on loopback alone: it lets whoever reaches it run code.
        status_port: where the status page and the metrics are, on loopback alone.
        app: the app folder (``conf/``, ``clients/``, ``strategies/``) whose runs are submitted.
        insecure: no TLS and no authentication of nodes, for a try on loopback.
        max_request_mb: most bytes of one request through the door. Flower cuts messages into pieces of 5 MB.
        max_requests: most connections that the door holds at the same time. A device that waits for work keeps one.
        max_requests_each: most of them that one address has; 0: a quarter. Many devices behind one address (NAT, a
            proxy on another machine, containers) need more; loopback, where a proxy may stand, is not counted.
        keep_going: submit a run again, from its last published round, when its server process died.
        log_format: of the lines that our own processes write: ``text``, or ``json`` with one object a line.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] = "federation"
    hosts: Annotated[tuple[str, ...], Field(min_length=1)] = ("localhost", "127.0.0.1")
    door_host: str = "127.0.0.1"
    door_port: Port = 9443
    door_url: str = ""
    superlink_port: Port = 9440
    status_port: Port = 9441
    app: str = "."
    insecure: bool = False
    max_request_mb: Positive = 64.0
    max_requests: Annotated[int, Field(ge=1)] = 512
    max_requests_each: Annotated[int, Field(ge=0)] = 0
    keep_going: bool = True
    log_format: LogFormat = "text"

    @field_validator("hosts")
    @classmethod
    def _are_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [host for host in value if not host or _with_port(host)]
        if wrong:
            raise ValueError(f"expected DNS names or IP addresses without port, found {wrong[0]!r}")
        return value

    @field_validator("door_url")
    @classmethod
    def _is_a_door(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            well = not value or (parts.scheme in ("https", "http") and bool(parts.hostname) and parts.port != 0)
        except ValueError:
            well = False
        if not well:
            raise ValueError(f"expected https://HOST:PORT, found {value!r}")
        return value

    @property
    def url(self) -> str:
        """How devices call the door."""
        if self.door_url:
            return self.door_url
        host = f"[{self.hosts[0]}]" if ":" in self.hosts[0] else self.hosts[0]
        return f"{'http' if self.insecure else 'https'}://{host}:{self.door_port}"


def _with_port(host: str) -> bool:
    """Whether it is more than a name or an address; an IPv6 address has several colons."""
    return any(char in host for char in "/@ []") or host.count(":") == 1


_CONFIG: TypeAdapter[ServerConfig] = TypeAdapter(ServerConfig)


def read_server_config(folder: Path) -> ServerConfig:
    """Read a deployment's ``server.yaml``.

    Raises:
        ConfigError: if it cannot be read, or in one line for the first fault.
    """
    path = folder / "server.yaml"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no deployment (no server.yaml); 'fedpeft deploy init' makes one") from None
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        said = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(f"{path}: cannot read the deployment's configuration: {said}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected keys and values such as 'door_port: 9443', found {type(found).__name__}")
    try:
        return _CONFIG.validate_python(found)
    except ValidationError as error:
        raise ConfigError(f"{path}: {one_line(error)}") from None


def write_server_config(folder: Path, config: ServerConfig) -> None:
    """Write it, with every key, so that an operator sees what there is to decide.

    Raises:
        OSError: as the file system raises it.
    """
    plain = {**asdict(config), "hosts": list(config.hosts), "door_url": config.url}
    write_whole(folder / "server.yaml", yaml.safe_dump(plain, sort_keys=False).encode())
