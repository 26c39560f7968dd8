"""How a version's record says what to rebuild around its weights: base model, adapter, task.

Plain data in the manifest becomes the validated records of `federated.config`; no class, import path or
``adapter_config.json`` is ever taken from it. Imports neither torch nor SQLAlchemy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from federated.config import AdapterConfig, ModelConfig, TaskConfig
from federated.errors import DeviceError
from federated.manifest import VersionManifest

__all__ = ["Recipe", "check_task", "recipe_of"]

_Record = TypeVar("_Record")


@dataclass(frozen=True)
class Recipe:
    """What stands around an adapter's weights.

    Args:
        model: the base model.
        adapter: how the adapter is attached.
        task: what it answers.
        seed: seeds the weights that do not travel, such as a frozen head's.
    """

    model: ModelConfig
    adapter: AdapterConfig
    task: TaskConfig
    seed: int


def recipe_of(manifest: VersionManifest) -> Recipe:
    """Read the recipe in a version's record.

    Raises:
        DeviceError: if a part is missing or is not valid: which one, and what was found.
    """
    return Recipe(
        _part(manifest, "model", ModelConfig),
        _part(manifest, "adapter", AdapterConfig),
        _part(manifest, "task", TaskConfig),
        _seed(manifest),
    )


def check_task(manifest: VersionManifest, task: TaskConfig) -> None:
    """Refuse a version whose answers would be read as another task's.

    Args:
        manifest: the version's record.
        task: what a runtime answers.

    Raises:
        DeviceError: if the version's task differs, or its head does not fit the task.
    """
    theirs = recipe_of(manifest).task
    if theirs != task:
        raise DeviceError(
            f"version {manifest.version_id[:12]} answers {theirs.name} with labels {list(theirs.labels)}; this "
            f"runtime answers {task.name} with labels {list(task.labels)} or other settings: open a runtime for that "
            "version"
        )
    head = manifest.spec.head
    found = "no head" if head is None else f"a {head.kind} head for {head.num_labels} labels"
    expected = "no head" if task.name == "causal_lm" else f"a {task.head} head for {len(task.labels)} labels"
    if found != expected:
        raise DeviceError(f"version {manifest.version_id[:12]} has {found}; its task needs {expected}")


def _part(manifest: VersionManifest, key: str, record: type[_Record]) -> _Record:
    value = _value(manifest, key)
    if not isinstance(value, Mapping):
        raise _fault(manifest, f"task[{key!r}] is {value!r}, expected a record")
    try:
        return TypeAdapter(record).validate_python(dict(value))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in (key, *first["loc"]))
        raise _fault(manifest, f"{where}: {first['msg']}") from None


def _seed(manifest: VersionManifest) -> int:
    value = _value(manifest, "seed")
    if type(value) is not int:
        raise _fault(manifest, f"task['seed'] is {value!r}, expected an integer")
    return value


def _value(manifest: VersionManifest, key: str) -> Any:
    if key not in manifest.task:
        raise _fault(manifest, f"its task record has no {key!r}, found {sorted(manifest.task)}")
    return manifest.task[key]


def _fault(manifest: VersionManifest, what: str) -> DeviceError:
    return DeviceError(f"version {manifest.version_id[:12]} does not say how to rebuild its model: {what}")
