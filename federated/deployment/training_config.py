"""What a device's owner decides of training: the section ``training`` of ``device.yaml``, checked when read.

The rest of that file is the agent's (see `federated.device.DeviceConfig`), and may be missing on a device that only
trains. What is trained on, and the limits, are in the file that ``client`` names. Nothing here comes from a server.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

import yaml
from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator
from pydantic.dataclasses import dataclass

from federated.config import STRICT
from federated.config.wording import one_line
from federated.errors import ConfigError
from federated.logs import LogFormat

__all__ = ["TrainingConfig", "read_training_config"]

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, config=STRICT)
class TrainingConfig:
    """How a device takes part in a federation.

    Args:
        server: the door of the deployment, ``https://host:port``.
        client: the client's own file: data, model, limits (see ``docs/flower.md``).
        state: folder for what Flower keeps here: unpacked apps, a secret between its processes.
        ca: certificate of the authority that signed the server's; not needed with ``insecure``.
        node_key: private key that the SuperNode proves itself with; not needed with ``insecure``.
        apps: SHA-256 of each app bundle whose code may run here (``fedpeft deploy app`` prints it).
        unpinned: run whatever app the server sends. Said in every log, and to the server.
        warm: hold the libraries and the base model in memory, instead of loading them for each training.
        port: where the SuperNode serves its own processes, on loopback; 0: a free one.
        poll_seconds: between two looks for a message at the server; 3, as Flower's own, where the launcher does not
            know Flower's version. On the device the launcher looks 2.5 times as often, and at least twice a second.
        longest_task: seconds of work on one message, after which its process is killed: a training that hangs must not
            keep the device from all that comes after it.
        max_retry_seconds: longest pause before a SuperNode that ended is started again.
        insecure: no TLS, no authentication: for a try on loopback.
        log_format: of the lines that our own processes write: ``text``, or ``json`` with one object a line.
    """

    server: str
    client: Path
    state: Path
    ca: Path | None = None
    node_key: Path | None = None
    apps: tuple[str, ...] = ()
    unpinned: bool = False
    warm: bool = True
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    poll_seconds: Annotated[float, Field(ge=0.1, le=60)] = 3.0
    longest_task: Annotated[int, Field(ge=1, le=604_800)] = 21_600
    max_retry_seconds: Annotated[float, Field(ge=1)] = 30.0
    insecure: bool = False
    log_format: LogFormat = "text"

    @field_validator("server")
    @classmethod
    def _is_a_door(cls, value: str) -> str:
        parts = urlsplit(value)
        try:
            well = parts.scheme in ("https", "http") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            well = False
        if not well or parts.path.strip("/") or parts.query or parts.username:
            raise ValueError(f"expected https://HOST:PORT, found {value!r}")
        return value

    @field_validator("apps")
    @classmethod
    def _are_digests(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [one for one in value if not _SHA256.fullmatch(one)]
        if wrong:
            raise ValueError(f"expected the SHA-256 of an app bundle, 64 hexadecimal digits, found {wrong[0]!r}")
        return value

    @model_validator(mode="after")
    def _is_secured(self) -> Self:
        if bool(self.apps) == self.unpinned:
            raise ValueError(
                "apps: name the bundles whose code may run here, or say unpinned: true to run whatever the server "
                f"sends; found {len(self.apps)} and unpinned: {str(self.unpinned).lower()}"
            )
        if self.insecure and self.server.startswith("https"):
            raise ValueError(f"insecure: true goes with an http:// server, found {self.server}")
        if not self.insecure and not self.server.startswith("https"):
            raise ValueError(f"server: expected https://, found {self.server}; insecure: true is for loopback alone")
        if not self.insecure and (self.ca is None or self.node_key is None):
            raise ValueError("ca, node_key: both must be given; 'fedpeft device enroll' writes them")
        return self

    @property
    def address(self) -> str:
        """``host:port``, as Flower's SuperNode wants it."""
        parts = urlsplit(self.server)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        return f"{host}:{parts.port or (443 if parts.scheme == 'https' else 80)}"

    def below(self, folder: Path) -> Self:
        """The same with relative paths looked up from a folder."""
        return replace(
            self,
            client=folder / self.client,
            state=folder / self.state,
            ca=None if self.ca is None else folder / self.ca,
            node_key=None if self.node_key is None else folder / self.node_key,
        )


_CONFIG: TypeAdapter[TrainingConfig] = TypeAdapter(TrainingConfig)


def read_training_config(path: Path) -> TrainingConfig:
    """Read the section ``training``; relative paths in it are looked up from the file's folder.

    Raises:
        ConfigError: if it is not there or cannot be read, or in one line for the first fault.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        said = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(f"{path}: cannot read the device's configuration: {said}") from None
    section = found.get("training") if isinstance(found, dict) else None
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: expected a section 'training' with server, client and state; see docs/deploy.md")
    try:
        return _CONFIG.validate_python(section).below(path.absolute().parent)
    except ValidationError as error:
        raise ConfigError(f"{path}: training.{one_line(error)}") from None
