"""Wrong configuration on the command line: exit code 2, the key, what was found, and what would have been right."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Refused = Callable[..., str]
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "strategy=fedawg",
            "strategy = 'fedawg': no such choice; expected one of bulyan, centered_clipping,",
        ),
        ("experiment=tinny", "experiment = 'tinny': no such choice; expected one of airlines,"),
        ("strategy.rule=mode", "strategy.rule = 'mode': unknown rule; expected one of bulyan"),
        ("adapter.rnk=4", "adapter.rnk: unknown key; did you mean adapter.rank?"),
        ("adaptor.rank=4", "adaptor.rank: unknown key; did you mean adapter.rank?"),
        ("stratgy=fedadam", "stratgy: unknown key; did you mean strategy?"),
        ("zzz=4", "zzz: unknown key; see fedpeft simulate --cfg job"),
        ("+adapter.extra=4", "adapter.extra = 4: unknown key"),
        ("adapter.rank=many", "adapter.rank = 'many': Input should be a valid integer"),
        ("rounds=1.5", "rounds = 1.5: Input should be a valid integer"),
        ("adapter.rank=0", "adapter.rank = 0: Input should be greater than or equal to 1"),
        ("train.learning_rate=-1", "train.learning_rate = -1: Input should be greater than 0"),
        ("train.learning_rate=nan", "train.learning_rate = nan: Input should be"),
        ("data.test_fraction=1.0", "data.test_fraction = 1.0: Input should be less than 1"),
        ("seed=-1", "seed = -1: Input should be greater than or equal to 0"),
        ("engine.name=cluster", "engine.name = 'cluster': Input should be 'inprocess', 'ray' or 'deployment'"),
        ("task.labels=[one]", "task.labels: sequence_classification needs at least two labels, found ['one']"),
        ("task.labels=bad", "task.labels = 'bad': expected a list, such as [bad,good]"),
        ("task.labels={bad:0,good:1}", "task.labels = {'bad': 0, 'good': 1}: expected a list, such as [bad,good]"),
        (
            "task.labels=bad,good",
            "task.labels = 'bad,good': found several values, expected one; write [bad,good] for a",
        ),
        ("train.scheduler_args=[1]", "train.scheduler_args = [1]: expected a mapping, such as {gamma: 0.9}"),
        ("rounds=[1,2]", "rounds = [1, 2]: found a list, expected one whole number"),
        ("train.optimizer={name:sgd}", "train.optimizer = {'name': 'sgd'}: found a mapping, expected 'adamw' or 'sgd'"),
        (
            "strategy.server_optimizer=adam",
            "strategy.server_optimizer = 'adam': expected a section: strategy.server_optimizer.KEY, where KEY is",
        ),
        (
            "tracking=[progress]",
            "tracking = ['progress']: expected a section: tracking.KEY, where KEY is one of tensor",
        ),
        (
            "strategy=[fedawg]",
            "strategy = 'fedawg': no such choice; expected one of bulyan, centered_clipping,",
        ),
        ("train.scheduler=Sometimes", "train.scheduler = 'Sometimes' is not in torch.optim.lr_scheduler"),
        ("rounds", "rounds: not an override; expected KEY=VALUE"),
        ("rounds=[1", "rounds=[1: not an override; expected KEY=VALUE"),
        ("model=3", "a group of conf/ takes the name of one of its files, such as experiment=tiny"),
        ("experiment=[1,2]", "a group of conf/ takes the name of one of its files, such as experiment=tiny"),
        ("run_dir=${nowhere}", "Interpolation key 'nowhere' not found"),
        ("selection.min_clients=3", "selection.min_clients = 3: the data has 2 clients, so no round would start"),
    ],
)
def test_wrong_override(simulate_refused: Refused, override: str, message: str) -> None:
    assert simulate_refused(override, code=2).startswith(message)


def test_config_that_is_neither_here_nor_there(refused: Refused) -> None:
    assert refused("simulate", f"--app={ROOT}", "--cfg", "hydra", code=2) == "--cfg hydra: expected --cfg job"


@pytest.mark.parametrize("option", ["--cfg=job", "--resume=there"])
def test_sweep_that_is_also_something_else(refused: Refused, option: str) -> None:
    line = refused("simulate", f"--app={ROOT}", "--multirun", option, "seed=0,1", code=2)
    assert line.startswith(f"--multirun does not go with {option.partition('=')[0]}")


def test_sweep_with_a_wrong_value_still_runs_the_others(fedpeft: Callable[..., object], versions: Path) -> None:
    tiny = ("experiment=tiny", "train.steps=1", "data.partition.num_clients=2", "engine.workers=1")
    done = fedpeft("simulate", f"--app={ROOT}", "-m", *tiny, "tracking.progress=false", "rounds=0,1")
    assert done.code == 2
    assert "1 of 2 jobs failed; the first, " in done.err
    assert "rounds = 0: Input should be greater than or equal to 1" in done.err
    assert len(done.err.splitlines()) == 1
    assert [path.name for path in Path("runs/tiny").iterdir()] != []


# ---- app folders -----------------------------------------------------------------------------------------------------


def test_app_folder_that_is_not_there(refused: Refused) -> None:
    assert refused("simulate", "--app=nowhere", code=2).startswith("--app nowhere: no such folder; expected one with")


def test_app_folder_without_conf(refused: Refused) -> None:
    Path("mine").mkdir()
    assert "is no app folder: expected conf/config.yaml in it" in refused("simulate", "--app=mine", code=2)


@pytest.fixture
def mine(fedpeft: object) -> Path:
    """An app folder of one's own, with the clients still missing."""
    shutil.copytree(ROOT / "conf", "mine/conf")
    return Path("mine")


def test_app_folder_without_clients(refused: Refused, mine: Path) -> None:
    assert "has no clients/app.py; copy the folder clients/" in refused(
        "simulate", "--app=mine", "experiment=tiny", code=2
    )


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("app = 3", "expected a Flower ClientApp named 'app'"),
        ("import nothing_of_this_name", "cannot be imported: ModuleNotFoundError: No module named"),
        ("app = (", "cannot be imported: SyntaxError"),
    ],
)
def test_app_folder_with_broken_clients(refused: Refused, mine: Path, code: str, message: str) -> None:
    (mine / "clients").mkdir()
    (mine / "clients" / "__init__.py").touch()
    (mine / "clients" / "app.py").write_text(code)
    assert message in refused("simulate", "--app=mine", "experiment=tiny", code=2)


def test_broken_yaml(refused: Refused, mine: Path) -> None:
    (mine / "conf" / "config.yaml").write_text("defaults: [\n")
    line = refused("simulate", "--app=mine", code=2)
    assert line.startswith("not valid YAML: ")
    assert "mine/conf/config.yaml" in line


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_resume_of_a_folder_without_a_run(refused: Refused, folder: str) -> None:
    Path("empty").mkdir()
    line = refused("simulate", f"--app={ROOT}", f"--resume={folder}", code=2)
    assert line == f"--resume {folder}: no config.yaml there; expected the folder of an interrupted run"


@pytest.mark.parametrize("override", ["adapter.rank=4", "rounds=many", "seed=1"])
def test_resume_with_another_configuration(refused: Refused, published: Path, versions: Path, override: str) -> None:
    line = refused("simulate", f"--app={ROOT}", f"--resume={published}", override, code=2)
    assert line == f"{override}: a resumed run keeps its configuration; only rounds=N may be given"


def test_resume_to_no_rounds(refused: Refused, published: Path, versions: Path) -> None:
    line = refused("simulate", f"--app={ROOT}", f"--resume={published}", "rounds=0", code=2)
    assert line == "rounds = 0: Input should be greater than or equal to 1"


@pytest.mark.parametrize("content", [b"a: [1", b"", b"\xff\xfe", b"- 1\n"])
def test_resume_of_a_damaged_configuration(refused: Refused, content: bytes) -> None:
    Path("run").mkdir()
    Path("run", "config.yaml").write_bytes(content)
    line = refused("simulate", f"--app={ROOT}", "--resume=run", code=2)
    assert line == "--resume: run/config.yaml is damaged: expected the run's configuration; start a new run"


@pytest.mark.parametrize(
    ("content", "message"), [(None, "holds no run (no run.json)"), ("{", "run.json is damaged"), ("{}", "is damaged")]
)
def test_resume_without_the_run_s_name(refused: Refused, published: Path, content: str | None, message: str) -> None:
    Path("run").mkdir()
    shutil.copy(published / "config.yaml", "run")
    if content is not None:
        Path("run", "run.json").write_text(content)
    assert message in refused("simulate", f"--app={ROOT}", "--resume=run", code=2)
