"""The recipe in a version's record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from federated.config import AdapterConfig, ModelConfig, TaskConfig
from federated.device import recipe_of
from federated.errors import DeviceError

TASK = TaskConfig(labels=("no", "yes"))


def record(**changes: Any) -> dict[str, Any]:
    whole = {"task": asdict(TASK), "model": asdict(ModelConfig()), "adapter": asdict(AdapterConfig()), "seed": 7}
    return {**whole, **changes}


def test_a_recipe_comes_back_as_it_was_written(version: Callable[..., Any]) -> None:
    recipe = recipe_of(version(1, task=record()).manifest)
    assert (recipe.model, recipe.adapter, recipe.task, recipe.seed) == (ModelConfig(), AdapterConfig(), TASK, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "tiny:bert"}, r"task\['model'\] is 'tiny:bert', expected a record"),
        ({"seed": "7"}, r"task\['seed'\] is '7', expected an integer"),
        ({"task": {"name": "chess"}}, r"task\.name: Input should be"),
        ({"adapter": {"auto_mapping": {"parent_library": "os"}}}, r"adapter\.auto_mapping: Unexpected keyword"),
    ],
)
def test_a_wrong_part_is_named(version: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        recipe_of(version(1, task=record(**changes)).manifest)


def test_a_missing_part_is_named(version: Callable[..., Any]) -> None:
    with pytest.raises(DeviceError, match=r"no 'model', found \['seed'\]"):
        recipe_of(version(1, task={"seed": 1}).manifest)
