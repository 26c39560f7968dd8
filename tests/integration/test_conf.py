"""Every file of the Hydra tree composes and builds, names the command that runs it, and names no class."""

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from federated import server_optimizers
from federated.adapters import attach, load_base
from federated.aggregation import make_rule
from federated.cli.compose import compose
from federated.config import ExperimentConfig, ModelConfig, TaskConfig, experiment_from
from federated.data import ASSETS, is_fetched, open_source
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


def _choices_of(group: str) -> list[str]:
    return [choice for name, choice in _choices() if name == group]


def _need(asset: str) -> None:
    if not is_fetched(ASSETS[asset]):
        pytest.skip(f"asset {asset} is not in the cache: fedpeft assets fetch {asset}")


@pytest.mark.parametrize("choice", _choices_of("model"))
def test_base_model_loads(choice: str) -> None:
    config = _compose("model", choice).model
    if config.source.startswith("asset:"):
        _need(config.source.removeprefix("asset:"))
    assert load_base(config, app_dir=ROOT).num_parameters > 0


@pytest.mark.parametrize("choice", sorted({*_choices_of("data")} - {"files", "table", "hub"}))
def test_data_opens(choice: str) -> None:
    config = _compose("data", choice)
    if choice in ASSETS:
        _need(choice)
    task = _task_for(choice, config)
    source = open_source(config.data, task)
    data = source.load(source.client_ids[0])
    assert min(len(data.train), len(data.test)) >= 1


def _task_for(choice: str, config: ExperimentConfig) -> TaskConfig:
    """The task of the experiment that goes with a data set."""
    return _compose("experiment", choice).task if choice in _choices_of("experiment") else config.task


@pytest.mark.parametrize("choice", ["files", "table"])
def test_own_data_opens(choice: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("client,text,label\na,fine,positive\na,awful,negative\n")
    place = tmp_path if choice == "files" else tmp_path / "a.csv"
    config = compose(ROOT, [f"data={choice}", f"data.path={place}"])
    assert open_source(config.data, config.task).client_ids == ("a",)


def _commands(path: Path) -> list[list[str]]:
    """Overrides of every ``fedpeft simulate`` that the comments at the top of a file show."""
    comments = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    shown = [part for line in comments for part in re.split(r"; |  +", line.removeprefix("# "))]
    return [shlex.split(part)[2:] for part in shown if part.startswith("fedpeft simulate")]


@pytest.mark.parametrize(("group", "choice"), list(_choices()))
def test_first_lines_show_a_command_that_runs_the_file(group: str, choice: str) -> None:
    commands = _commands(ROOT / "conf" / group / f"{choice}.yaml")
    assert commands, "no command"
    assert all(f"{group}={choice}" in command for command in commands)
    for command in commands:
        compose(ROOT, command)


def test_first_lines_of_the_root_show_commands() -> None:
    assert [] in _commands(ROOT / "conf" / "config.yaml")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_names_no_class(path: Path) -> None:
    assert "_target_" not in path.read_text()
    assert isinstance(yaml.safe_load(path.read_text()), dict)


@pytest.mark.parametrize(("group", "choice"), list(_choices()))
def test_every_choice_can_be_shown_and_read_again(group: str, choice: str) -> None:
    config = _compose(group, choice)
    assert experiment_from(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
