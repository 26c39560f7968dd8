"""``fedpeft simulate``: sweeps, experiments, and everybody's own data."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from federated.tracking import read_events

ROOT = Path(__file__).resolve().parents[3]
APP = f"--app={ROOT}"
Simulate = Callable[..., Path]


def participants(run: Path) -> list[int]:
    """Good updates of each round."""
    return [event["participants"] for event in read_events(run / "metrics.jsonl") if event["event"] == "round"]


def test_run_folder_is_complete(finished: Path) -> None:
    assert {"config.yaml", "run.json", "metrics.jsonl", "versions.json", "report.html", "registry"} <= {
        path.name for path in finished.iterdir()
    }
    assert [row["number"] for row in json.loads((finished / "versions.json").read_text())] == [0, 1, 2]


def test_says_where_everything_is(fedpeft: Callable[..., Any], here: Path) -> None:
    tiny = ("experiment=tiny", "data.partition.num_clients=2", "train.steps=1", "rounds=1", "engine.workers=1")
    done = fedpeft("simulate", APP, *tiny, "tracking.progress=false", "run_dir=out")
    last = json.loads((here / "out" / "versions.json").read_text())[-1]
    lines = dict(line.split(maxsplit=1) for line in done.out.splitlines() if line.split()[0] in ("registry", "report"))
    assert lines == {"registry": str(here / "out" / "registry"), "report": str(here / "out" / "report.html")}
    assert f"{last['version_id'][:16]}  (weights {last['weights_digest'][:16]})" in done.out


DIVERGING = ("experiment=tiny", "train.steps=4", "train.learning_rate=1e6", "engine.workers=1", "run_dir=out")


def warnings_of(run: Path) -> list[str]:
    """What the run's metrics warn of."""
    return [event["message"] for event in read_events(run / "metrics.jsonl") if event["event"] == "warning"]


@pytest.mark.parametrize("command", ["simulate", "train"])
def test_a_run_that_made_its_adapter_worse_says_so_everywhere(
    fedpeft: Callable[..., Any], here: Path, command: str
) -> None:
    done = fedpeft(command, APP, *DIVERGING, "rounds=1")
    (message,) = warnings_of(here / "out")
    assert message.startswith("the last adapter is worse than the initial one: held-out loss ")
    assert f"\nwarning: {message}\ncompleted\n" in done.out
    assert f"<b>Warning:</b> {message}" in (here / "out" / "report.html").read_text()


def test_the_warning_is_logged_where_nothing_is_displayed(
    fedpeft: Callable[..., Any], here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fedpeft("simulate", APP, *DIVERGING, "rounds=1", "tracking.progress=false")
    (message,) = warnings_of(here / "out")
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"warning: {message}"
    ]


def test_a_resumed_run_is_compared_with_its_first_round(fedpeft: Callable[..., Any], here: Path) -> None:
    for more in (("rounds=1", *DIVERGING), ("rounds=2", "--resume=out")):
        fedpeft("simulate", APP, *more)
    starts = [message.partition("at the start ")[2] for message in warnings_of(here / "out")]
    assert len(starts) == 2
    assert starts[0] == starts[1]


def test_a_run_that_learnt_warns_of_nothing(simulate: Simulate) -> None:
    assert warnings_of(simulate("experiment=tiny", "train.steps=4")) == []


def test_two_runs_of_one_second_get_two_folders(simulate: Simulate, here: Path) -> None:
    for _ in range(2):
        simulate("experiment=tiny", "data.partition.num_clients=2")
    assert (here / "run-2" / "versions.json").exists()


def test_sweep_makes_a_run_for_each_value(fedpeft: Callable[..., Any], here: Path) -> None:
    quick = ("experiment=tiny", "data.partition.num_clients=2", "train.steps=1", "rounds=1", "engine.workers=1")
    done = fedpeft("simulate", APP, "--multirun", *quick, "tracking.progress=false", "seed=0,1")
    runs = sorted((here / "runs" / "tiny").iterdir())
    assert len(runs) == 2
    assert len({json.loads((run / "versions.json").read_text())[0]["weights_digest"] for run in runs}) == 2
    shown = [line for line in done.out.splitlines() if line.startswith("│ tiny-")]
    assert [run.name in line for run, line in zip(runs, shown, strict=True)] == [True, True]


def test_partition_by_its_name_keeps_the_number_of_clients(simulate: Simulate) -> None:
    assert participants(simulate("data.partition=pathological")) == [10]


@pytest.mark.parametrize(
    ("overrides", "clients"),
    [
        (("experiment=sensor",), 10),
        (("experiment=tiny", "task=causal_lm", "model=tiny_llama"), 10),
        (("experiment=tiny", "task=chat", "model=tiny_llama", "task.max_length=64"), 10),
        (("experiment=tiny", "data.partition=dirichlet", "data.partition.num_clients=3"), 3),
        (("experiment=tiny", "data.partition=iid", "data.partition.num_clients=3"), 3),
        (("experiment=tiny", "strategy=fedyogi", "selection.fraction=0.5"), 5),
        (("experiment=tiny", "adapter=rslora", "adapter.dtype=bfloat16", "train=sgd"), 10),
        (("experiment=tiny", "engine.workers=2"), 10),
        (("experiment=tiny", "strategy=krum"), 10),
        (("experiment=tiny", "strategy=bulyan", "strategy.options.nnm=true"), 10),
    ],
)
def test_a_round_of(simulate: Simulate, overrides: tuple[str, ...], clients: int) -> None:
    assert participants(simulate(*overrides)) == [clients]


def test_buffered_rounds_from_data_to_report(simulate: Simulate) -> None:
    run = simulate(
        *("experiment=tiny", "round.mode=buffered", "round.buffer=2", "round.concurrency=3"),
        *("rounds=3", "selection.policy=availability", "engine.workers=2"),
    )
    events = read_events(run / "metrics.jsonl")
    rounds = [event for event in events if event["event"] == "round"]
    assert [(event["published"], event["participants"]) for event in rounds] == [(True, 2)] * 3
    assert any(event["rule"]["staleness_max"] > 0 for event in rounds)
    assert [row["number"] for row in json.loads((run / "versions.json").read_text())] == [0, 1, 2, 3]
    assert "staleness: mean" in (run / "report.html").read_text()


def test_a_buffer_larger_than_the_federation_is_refused_before_anything_starts(
    fedpeft: Callable[..., Any], here: Path
) -> None:
    done = fedpeft("simulate", APP, "experiment=tiny", "round.mode=buffered", "round.buffer=11", code=2)
    assert "round.buffer = 11: the data has 10 clients, and each is in a buffer at most once" in done.err
    assert list(here.iterdir()) == []


def test_more_hostile_clients_than_the_rule_withstands_are_refused_before_anything_is_left(
    fedpeft: Callable[..., Any], here: Path
) -> None:
    hostile = ("experiment=tiny", "strategy=krum", "strategy.options.byzantine=4", "run_dir=out")
    done = fedpeft("simulate", APP, *hostile, code=2)
    assert "10 clients at selection.fraction = 1: a cohort of 10, and krum needs at least 11 updates" in done.err
    assert "that takes 11 clients" in done.err
    assert not (here / "out").exists()


ROWS = [
    {"user": user, "said": text, "mood": mood}
    for user in ("ann", "ben", "eve")
    for text, mood in (("fine", "good"), ("awful", "bad"), ("nice", "good"), ("poor", "bad"))
]


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, rows: list[dict[str, str]]) -> None:
    parquet.write_table(pa.Table.from_pylist(rows), path)


WRITERS = {"csv": write_csv, "jsonl": write_jsonl, "parquet": write_parquet}
COLUMNS = ("data.text_column=said", "data.label_column=mood", "task.labels=[bad,good]")


@pytest.mark.parametrize("kind", WRITERS)
def test_own_table(simulate: Simulate, here: Path, kind: str) -> None:
    WRITERS[kind](here / f"all.{kind}", ROWS)
    run = simulate("data=table", f"data.path=all.{kind}", "data.client_column=user", *COLUMNS)
    assert participants(run) == [3]


@pytest.mark.parametrize("kind", WRITERS)
def test_own_files(simulate: Simulate, here: Path, kind: str) -> None:
    (here / "mine").mkdir()
    for user in ("ann", "ben", "eve"):
        WRITERS[kind](here / "mine" / f"{user}.{kind}", [row for row in ROWS if row["user"] == user])
    assert participants(simulate("data=files", "data.path=mine", *COLUMNS)) == [3]


def test_own_table_is_divided_anew(simulate: Simulate, here: Path) -> None:
    write_csv(here / "all.csv", ROWS)
    run = simulate("data=table", "data.path=all.csv", *COLUMNS, "data.partition=iid", "data.partition.num_clients=2")
    assert participants(run) == [2]


def test_own_data_in_the_app_folder(fedpeft: Callable[..., Any], here: Path) -> None:
    for name in ("conf", "clients"):
        (here / name).symlink_to(ROOT / name)
    write_csv(here / "all.csv", ROWS)
    (here / "elsewhere").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here / "elsewhere")
        columns = (*COLUMNS, "data.client_column=user", "rounds=1", "train.steps=1", "engine.workers=1")
        fedpeft("simulate", f"--app={here}", "data=table", "data.path=all.csv", *columns, "run_dir=run")
        assert participants(Path("run")) == [3]


def test_resumed_run_goes_on(fedpeft: Callable[..., Any], simulate: Simulate) -> None:
    run = simulate("experiment=tiny", "data.partition.num_clients=2")
    fedpeft("simulate", APP, "--resume", run, "rounds=2")
    assert [row["number"] for row in json.loads((run / "versions.json").read_text())] == [0, 1, 2]


def test_report_is_written_again(fedpeft: Callable[..., Any], simulate: Simulate) -> None:
    run = simulate("experiment=tiny", "data.partition.num_clients=2")
    (run / "report.html").unlink()
    assert fedpeft("report", run).out.strip() == str(run / "report.html")
    assert (run / "report.html").exists()
