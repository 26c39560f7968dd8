"""Hydra, once, where a run starts: an app folder's ``conf/`` plus overrides become one ExperimentConfig.

The only importer of hydra. What goes wrong in a config is said in one line: the key, what was found, what is allowed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from federated.config import ExperimentConfig, experiment_from
from federated.errors import ConfigError

__all__ = ["compose", "compose_run", "conf_folder", "from_hydra", "one_line", "spelt_out"]


def conf_folder(app_dir: Path) -> Path:
    """The app folder's ``conf/``.

    Raises:
        ConfigError: if there is none.
    """
    folder = app_dir.resolve() / "conf"
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{app_dir} is no app folder: expected conf/config.yaml in it; say --app DIR")
    return folder


def compose(app_dir: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Compose, resolve and validate.

    Raises:
        ConfigError: one line: the key, the value found, and what is allowed.
    """
    folder = conf_folder(app_dir)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            return from_hydra(hydra_compose("config", overrides=spelt_out(overrides)))
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
        raise ConfigError(one_line(error, folder)) from None


def compose_run(app_dir: Path, overrides: Sequence[str]) -> ExperimentConfig:
    """The experiment of a run on other processes: what is wrong with it is said here, and not in a server's log.

    Raises:
        ConfigError: also if its rule does not go with the rest.
    """
    from federated.aggregation import check_combination, make_rule

    config = compose(app_dir, overrides)
    check_combination(make_rule(config.strategy.rule, config.strategy.options), config)
    return config


def spelt_out(overrides: Sequence[str]) -> list[str]:
    """Overrides as Hydra takes them: ``data.partition=iid`` sets the kind, and leaves the rest of the partition alone.

    >>> spelt_out(["data.partition=dirichlet", "data.partition.alpha=0.1"])
    ['data.partition.kind=dirichlet', 'data.partition.alpha=0.1']
    """
    return [re.sub(r"^data\.partition=(?=[\w,]+$)", "data.partition.kind=", override) for override in overrides]


def from_hydra(config: DictConfig) -> ExperimentConfig:
    """The schema's records from what Hydra composed.

    Raises:
        ConfigError: for a wrong key, type or range, or a value that must be given.
    """
    try:
        plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(one_line(error)) from None
    plain.pop("hydra", None)
    return experiment_from(plain)


def one_line(error: Exception, folder: Path | None = None) -> str:
    """Say a Hydra, OmegaConf or YAML error in one line, with what would have been right."""
    text = " ".join(str(error).split())
    if isinstance(error, YAMLError):
        return f"not valid YAML: {text}"
    if not isinstance(error, HydraException | OmegaConfBaseException):  # what Hydra stumbles over
        return f"a group of conf/ takes the name of one of its files, such as experiment=tiny ({text})"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not an override; expected KEY=VALUE, in quotes where it holds brackets or spaces"
    if found := re.search(r"Could not (?:find|load) '([^']+)'", text):
        return _unknown_choice(found[1], folder)
    if found := re.search(r"Could not override '([^']+)'", text):
        return f"{found[1]}: unknown key{_closest(found[1], folder)}; see fedpeft simulate --cfg job"
    if found := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{found[1]}: must be given, such as {found[1]}=..."
    if found := re.search(r"Ambiguous value for argument '([^=]+)=(.*?)' 1\.", text):
        key, several = found.groups()
        advice = f"write [{several}] for a list, quote it if it is one text, or add --multirun to run each"
        return f"{key} = {several!r}: found several values, expected one; {advice}"
    if found := re.match(r"Error merging override (.+)", text):
        return _misshapen(found[1]) or text
    return text


def _misshapen(override: str) -> str:
    """What the schema says of a list or a mapping that cannot be merged into what conf/ has under its key."""
    try:
        parsed = OverridesParser.create().parse_override(override)
        value: Any = parsed.value()
        for part in reversed(parsed.key_or_group.split(".")):
            value = {part: value}
        experiment_from({"task": {"labels": ["a", "b"]}, **value})
    except ConfigError as error:
        return str(error)
    except HydraException:  # it was put on several lines
        return ""
    return ""


def _unknown_choice(name: str, folder: Path | None) -> str:
    group, _, choice = name.rpartition("/")
    options = sorted(path.stem for path in (folder / group).glob("*.yaml")) if folder and group else []
    shown = [option for option in options if not option.startswith("_")]
    return (
        f"{group or 'config'} = {choice!r}: no such choice; expected one of {', '.join(shown) or 'the files in conf/'}"
    )


def _closest(key: str, folder: Path | None) -> str:
    if folder is None:
        return ""
    names = _keys(OmegaConf.create(experiment_from({"task": {"labels": ["a", "b"]}}).to_dict()))
    if key in names:  # the schema knows it, the chosen file does not: a rank where the adapter has no factors
        return f" in the file that {key.partition('.')[0]}= chose"
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _keys(node: Any, prefix: str = "") -> list[str]:
    names = []
    for key, value in node.items():
        names.append(f"{prefix}{key}")
        if OmegaConf.is_dict(value):
            names += _keys(value, f"{prefix}{key}.")
    return names
