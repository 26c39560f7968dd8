"""Every rule has a recipe under `strategies/`, a value under `conf/strategy/`, and both make that rule."""

import importlib
from pathlib import Path

import pytest

from federated.aggregation import RULES
from federated.cli.compose import compose
from federated.flower import DeltaStrategy, open_session

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_has_a_recipe_and_a_value(name: str) -> None:
    config = compose(ROOT, [f"strategy={name}", "data.partition.num_clients=2"])
    assert config.strategy.rule == name
    session = open_session(config)
    recipe = importlib.import_module(f"strategies.{name}")
    parts = {"initial": session.initial, "base_digest": session.adapter.base.base_digest}
    made = recipe.make(config, **parts)
    assert isinstance(made, DeltaStrategy)
    assert made.rule.name == name
    assert made.method == DeltaStrategy(config, **parts).method


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_recipe_is_one_screen(name: str) -> None:
    lines = (ROOT / "strategies" / f"{name}.py").read_text().splitlines()
    assert len(lines) <= 40
    assert f"    fedpeft simulate strategy={name}" in lines
