"""``--cfg job`` shows what would run, and that is what runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from federated.cli.compose import compose, compose_run
from federated.config import experiment_from
from federated.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("command", ["simulate", "train"])
@pytest.mark.parametrize("overrides", [(), ("experiment=airlines", "adapter.rank=4", "data.partition=dirichlet")])
def test_shown_configuration_composes_back(
    fedpeft: Callable[..., Any], command: str, overrides: tuple[str, ...]
) -> None:
    overrides = (*overrides, "run_dir=there")
    shown = fedpeft(command, f"--app={ROOT}", "--cfg=job", *overrides).out
    assert experiment_from(yaml.safe_load(shown)) == compose(ROOT, overrides)


def test_showing_runs_nothing(fedpeft: Callable[..., Any], here: Path) -> None:
    fedpeft("simulate", f"--app={ROOT}", "--cfg", "job")
    assert list(here.iterdir()) == []


def test_overrides_stand_before_or_after_options(fedpeft: Callable[..., Any]) -> None:
    first = fedpeft("simulate", "rounds=7", f"--app={ROOT}", "--cfg", "job", "run_dir=x").out
    last = fedpeft("simulate", "--cfg", "job", f"--app={ROOT}", "rounds=7", "run_dir=x").out
    assert first == last
    assert "rounds: 7" in first


def test_current_folder_is_the_app_folder(fedpeft: Callable[..., Any], here: Path) -> None:
    (here / "conf").symlink_to(ROOT / "conf")
    assert yaml.safe_load(fedpeft("simulate", "--cfg=job").out)["name"] == "tiny"


def test_a_run_elsewhere_is_checked_here() -> None:
    good = ("experiment=tiny", "run_dir=there")
    wrong = (*good, "strategy.server_optimizer.name=adam")
    compose(ROOT, wrong)
    with pytest.raises(ConfigError, match=r"server_optimizer\.learning_rate = 1: adam"):
        compose_run(ROOT, wrong)
    assert compose_run(ROOT, good) == compose(ROOT, good)
