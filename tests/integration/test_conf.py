"""Every file of the Hydra tree composes and builds, names the command that runs it, and names no class."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from federated import server_optimizers
from federated.adapters import attach, load_base
from federated.aggregation import make_rule
from federated.cli.compose import compose
from federated.config import ExperimentConfig, ModelConfig
from federated.data import ASSETS, is_fetched
from federated.tasks import make_task
from federated.training import LocalTrainer

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "conf").rglob("*.yaml"))
NEEDS = {"model": {"sensor_net": ["task=sensor", "adapter=lora_all"], "tiny_llama": ["task=causal_lm"],
                   "sotu_llama": ["task=causal_lm"], "smollm2": ["task=chat"]},
         "task": {"causal_lm": ["model=tiny_llama"], "chat": ["model=tiny_llama"],
                  "sensor": ["model=sensor_net", "adapter=lora_all"]},
         "data": {"files": ["data.path=x"], "table": ["data.path=x"], "hub": ["data.path=x"]}}  # fmt: skip


def _choices() -> Iterator[tuple[str, str]]:
    for path in FILES:
        if path.parent != ROOT / "conf" and not path.stem.startswith("_"):
            yield path.parent.name, path.stem


def _compose(group: str, choice: str) -> ExperimentConfig:
    return compose(ROOT, [f"{group}={choice}", *NEEDS.get(group, {}).get(choice, [])])


def _build(config: ExperimentConfig) -> None:
    adapter = attach(load_base(config.model, app_dir=ROOT), config.adapter, config.task, seed=config.seed)
    LocalTrainer(adapter, make_task(config.task, adapter.base.tokenizer), config.train)
    assert make_rule(config.strategy.rule).init(adapter.spec) is not None
    server_optimizers.init(config.strategy.server_optimizer, adapter.read())


@pytest.mark.parametrize(("group", "choice"), list(_choices()))
def test_every_choice_composes_and_builds(group: str, choice: str) -> None:
    config = _compose(group, choice)
    name = config.model.source.removeprefix("asset:")
    if name != config.model.source and not is_fetched(ASSETS[name]):
        stand_in = "tiny:llama" if config.task.name == "causal_lm" else "tiny:bert"
        config = ExperimentConfig(**{**vars(config), "model": ModelConfig(source=stand_in)})
    _build(config)


def test_the_root_composes_and_builds() -> None:
    _build(compose(ROOT))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_says_how_to_run_it(path: Path) -> None:
    head = "\n".join(path.read_text().splitlines()[:4])
    assert "fedpeft " in head or path.stem.startswith("_")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_names_no_class(path: Path) -> None:
    assert "_target_" not in path.read_text()
    yaml.safe_load(path.read_text())
