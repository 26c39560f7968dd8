"""What a device's owner decides: ``device.yaml`` as frozen records, checked when read.

Unknown keys are refused by name. Nothing in it comes from a server. Called by `federated.cli` and by whoever runs an
agent in a process of his own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, TypeAdapter, ValidationError, field_validator
from pydantic.dataclasses import dataclass

from federated.config import STRICT, ModelConfig
from federated.config.wording import one_line
from federated.errors import ConfigError

__all__ = ["DeviceConfig", "LimitsConfig", "ProbationConfig", "ReportConfig", "device_config"]

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, config=STRICT)
class ProbationConfig:
    """When a new version has shown that it works.

    Args:
        requests: it is committed after so many successful requests ...
        seconds: ... or after so long without more than ``failures`` failed ones, whichever comes first.
        failures: failed requests that a version on probation may have; one more and it is given up.
        boots: starts without a commit or a sign of health, after which the active version is given up.
    """

    requests: Count = 20
    seconds: NonNegative = 60.0
    failures: Annotated[int, Field(ge=0)] = 2
    boots: Count = 3


@dataclass(frozen=True, config=STRICT)
class LimitsConfig:
    """The most that is fetched, whatever was signed.

    Args:
        max_bytes: of one file of a version.
    """

    max_bytes: Count = 2 * 1024**3


@dataclass(frozen=True, config=STRICT)
class ReportConfig:
    """The device's own log of events.

    Args:
        max_bytes: of one file of the log.
        files: how many are kept, the one that is written included.
    """

    max_bytes: Annotated[int, Field(ge=4096)] = 1_000_000
    files: Count = 3


@dataclass(frozen=True, config=STRICT)
class DeviceConfig:
    """One device.

    Args:
        device_id: its stable name, for reports.
        source: where releases come from: a folder, a bundle, or an ``http(s)://`` URL.
        root: file of the root metadata that is trusted without proof.
        state: the device's own folder: journal, versions, log.
        channel: whose current version the device follows.
        base: its own base model; None: the one that a version's record names.
        poll_seconds: time between two looks at the source.
        retry_seconds: time until the next look after one that failed; doubles until it reaches ``poll_seconds``.
        jitter: share by which these times vary by chance, so that a fleet does not come all at once.
        bandwidth: bytes per second that a fetch may use; 0: no limit.
        capacity: versions that are kept, in memory and on the disk each.
        probes: what a release without probes of its own is worth: ``builtin`` (the device's own inputs must show that
            the adapter has an effect) or ``required`` (it is refused).
        probation, limits, report: see there.
    """

    device_id: str
    source: str
    root: Path
    state: Path
    channel: str = "stable"
    base: ModelConfig | None = None
    poll_seconds: Positive = 900.0
    retry_seconds: Positive = 5.0
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.1
    bandwidth: Annotated[int, Field(ge=0)] = 0
    capacity: Annotated[int, Field(ge=2)] = 4
    probes: Literal["builtin", "required"] = "builtin"
    probation: ProbationConfig = Field(default_factory=ProbationConfig)
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)

    @field_validator("device_id")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if not value.strip() or not value.isprintable() or len(value) > 200:
            raise ValueError("expected a name of up to 200 printable characters")
        return value

    def below(self, folder: Path) -> Self:
        """The same with relative paths looked up from a folder."""
        places: dict[str, Any] = {"root": folder / self.root, "state": folder / self.state}
        if "://" not in self.source:
            places["source"] = str(folder / self.source)
        return type(self)(**{**vars(self), **places})


_CONFIG: TypeAdapter[DeviceConfig] = TypeAdapter(DeviceConfig)


def device_config(path: Path) -> DeviceConfig:
    """Read a device's file; relative paths in it are looked up from its folder.

    Raises:
        ConfigError: if it cannot be read, or in one line for the first fault: key, what was found, what is allowed.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        said = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(f"{path}: cannot read the device's configuration: {said}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ConfigError(f"{path}: expected keys and values such as 'channel: stable', found {type(found).__name__}")
    found.pop("training", None)  # another program's: see `federated.deployment.training_config`
    try:
        return _CONFIG.validate_python(found).below(path.absolute().parent)
    except ValidationError as error:
        raise ConfigError(f"{path}: {one_line(error)}") from None
