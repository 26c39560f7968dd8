"""What ``train`` publishes, and what ``registry`` and ``device`` make of a run."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from federated.registry import Registry

Command = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[3]


def rows(text: str) -> list[list[str]]:
    """The cells of a table's rows; what is folded below a row is left out."""
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[:1] == "│"]
    return [row for row in cells if row[0]]


def test_train_publishes_before_and_after(trained: Path) -> None:
    with Registry.open(trained / "registry", create=False) as registry:
        found = [(record.number, record.manifest.method) for record in registry.versions()]
        lineage = [record.number for record in registry.lineage("v1")]
    assert found == [(0, "central"), (1, "central")]
    assert lineage == [1, 0]


def test_train_leaves_a_report(trained: Path) -> None:
    assert "central" in (trained / "report.html").read_text()


def test_train_starts_from_the_federation_s_adapter(trained: Path, finished: Path) -> None:
    digests = []
    for folder in (trained, finished):
        with Registry.open(folder / "registry", create=False) as registry:
            digests.append(registry.get("v0").manifest.weights_digest)
    assert digests[0] == digests[1]


def test_train_goes_into_the_federation_s_registry(fedpeft: Command, finished: Path, here: Path) -> None:
    registry = here / "both"
    root = ROOT
    quick = ("experiment=tiny", "rounds=1", "train.steps=1", "engine.workers=1", "data.partition.num_clients=2")
    for command in ("simulate", "train"):
        fedpeft(command, f"--app={root}", *quick, "tracking.progress=false", f"registry={registry}")
    runs = {row[2].rpartition("-")[0] for row in rows(fedpeft("registry", "list", "--registry", registry).out)}
    assert runs == {"tiny", "tiny-central"}


def test_list_is_newest_first(fedpeft: Command, finished: Path) -> None:
    listed = rows(fedpeft("registry", "list", "--registry", finished / "registry").out)
    assert [row[0] for row in listed] == ["v2", "v1", "v0"]
    assert [row[3] for row in listed] == ["fedit + sgd"] * 3
    assert [row[-1] for row in listed] == ["dev", "", ""]


def test_lineage_ends_at_the_first(fedpeft: Command, finished: Path) -> None:
    shown = rows(fedpeft("registry", "lineage", "v1", "--registry", finished / "registry").out)
    assert [row[0] for row in shown] == ["v1", "v0"]


def test_show_names_parent_and_base(fedpeft: Command, finished: Path) -> None:
    with Registry.open(finished / "registry", create=False) as registry:
        record = registry.get("v2")
    shown = fedpeft("registry", "show", "v2", "--registry", finished / "registry").out
    assert str(record.manifest.parent) in shown
    assert record.manifest.base_digest in shown


def test_a_run_that_published_nothing_is_not_the_newest(fedpeft: Command, finished: Path, here: Path) -> None:
    (here / "runs").mkdir(exist_ok=True)
    shutil.copytree(finished / "registry", here / "runs" / "a" / "registry")
    Registry.open(here / "runs" / "b" / "registry").close()
    done = fedpeft("registry", "list")
    assert "runs/a/registry (the newest one in runs/)" in done.err


def test_a_refused_combination_leaves_nothing_behind(fedpeft: Command, here: Path) -> None:
    arguments = ("strategy=flexlora", "strategy.server_optimizer.learning_rate=0.5", "run_dir=runs/refused")
    done = fedpeft("simulate", f"--app={ROOT}", *arguments, code=2)
    assert done.err.startswith("error: strategy.server_optimizer = sgd with learning rate 0.5: flexlora makes")
    assert len(done.err.splitlines()) == 1
    assert not (here / "runs").exists()


def test_newest_run_is_found(fedpeft: Command, finished: Path, here: Path) -> None:
    (here / "runs").mkdir()
    (here / "runs" / "a").symlink_to(finished)
    done = fedpeft("registry", "list")
    assert "runs/a/registry (the newest one in runs/)" in done.err
    assert len(rows(done.out)) == 3


@pytest.mark.parametrize("version", ["null", "v1", "latest", "dev"])
def test_device_answers(fedpeft: Command, finished: Path, version: str) -> None:
    texts = ("lost my bag", "thank you")
    asked = [part for text in texts for part in ("--text", text)]
    done = fedpeft("device", "try", *asked, "--version", version, "--registry", finished / "registry")
    answers = rows(done.out)
    assert [row[0] for row in answers] == list(texts)
    assert {row[1] for row in answers} <= {"negative", "neutral", "positive"}
    assert re.search(r"activated in \d+\.\d{3} ms", done.out)


def test_device_with_the_null_adapter_differs_from_a_trained_one(fedpeft: Command, finished: Path) -> None:
    answers = [
        rows(fedpeft("device", "try", "--text=hi", f"--version={version}", "--registry", finished / "registry").out)
        for version in ("null", "v2")
    ]
    assert answers[0][0][2] != answers[1][0][2]


def test_device_runs_the_registry_of_central_training(fedpeft: Command, trained: Path) -> None:
    done = fedpeft("device", "try", "--text=hi", "--version=v1", "--registry", trained / "registry")
    assert "Answers of v1" in done.out


@pytest.mark.parametrize("version", ["latest", "null"])
def test_device_says_that_a_sensor_version_takes_series(
    fedpeft: Command, simulate: Callable[..., Path], version: str
) -> None:
    registry = simulate("experiment=sensor", "data.partition.num_clients=2") / "registry"
    done = fedpeft("device", "try", "--text=hi", f"--version={version}", "--registry", registry, code=1)
    (line,) = done.err.splitlines()
    assert re.match(
        r"error: version v1 \(\w{12}\) answers task=sensor, which takes series of numbers, found texts", line
    )
    assert "--version" in line and "runtime.predict" in line


def test_records_of_a_run_say_how_many_took_part_and_never_who(finished: Path) -> None:
    with Registry.open(finished / "registry", create=False) as registry:
        manifests = [record.manifest for record in registry.versions()]
        log = registry.audit.entries()
    assert [(one.adapter_id, one.release_counter, one.participants) for one in manifests] == [
        ("tiny", 1, 0),
        ("tiny", 2, 2),
        ("tiny", 3, 2),
    ]
    assert manifests[0].base["class"] == "BertModel"
    told = " ".join([*(str(one.to_dict()) for one in manifests), *(f"{entry}" for entry in log)])
    assert "client-0" not in told
    assert {entry.actor for entry in log} == {f"run {manifests[0].run_id}"}


def test_a_gate_promotes_what_was_measured_well(fedpeft: Command, simulate: Callable[..., Path]) -> None:
    gate = ("gate.enabled=true", "gate.metric=accuracy", "gate.min_improvement=-1")
    folder = simulate("experiment=tiny", "data.partition.num_clients=2", "rounds=2", *gate)
    with Registry.open(folder / "registry", create=False) as registry:
        pointed = {name: registry.get(at).number for name, at in registry.channels().items()}
        measured = [len(registry.evaluations(f"v{number}")) for number in range(3)]
        moves = [registry.get(move.version_id).number for move in registry.channel("canary").history()]
    assert pointed == {"canary": 2, "dev": 2}
    assert (measured, moves) == ([1, 1, 1], [2, 1])
    assert "measured later" in fedpeft("registry", "show", "v2", "--registry", folder / "registry").out
    assert (folder / "report.html").is_file()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's, with transformers
def test_a_peft_folder_becomes_version_1_and_answers(fedpeft: Command, here: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from federated.adapters.tiny import tiny_model

    config = LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    get_peft_model(tiny_model("bert")[0], config).save_pretrained(here / "peft")
    fedpeft("registry", "init", "store")
    fedpeft("registry", "import", "peft", "name=support", "licence=MIT", f"--app={ROOT}", "--registry", here / "store")
    with Registry.open(here / "store", create=False) as registry:
        record = registry.get("v1")
        assert (record.manifest.method, record.manifest.adapter_id, record.manifest.licence) == (
            "import",
            "support",
            "MIT",
        )
        assert (record.manifest.spec.rank, record.manifest.parent, registry.channels()) == (4, None, {})
        assert registry.verify() == []
    done = fedpeft("device", "try", "--text=hi", "--version=v1", "--registry", here / "store", f"--app={ROOT}")
    assert "Answers of v1" in done.out


def test_overrides_are_for_peft_folders_alone(fedpeft: Command, here: Path) -> None:
    fedpeft("registry", "init", "store")
    done = fedpeft("registry", "import", "store", "name=x", "--registry", here / "store", code=2)
    assert "overrides say what a PEFT folder is for" in done.err
