"""Opening data: files, tables and made-up sets become clients; who is left out is said."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from federated.config import DataConfig, PartitionConfig, TaskConfig
from federated.data import sources
from federated.data.source import Source
from federated.data.sources import open_source
from federated.errors import DataError

SENTIMENT = TaskConfig(labels=("bad", "good"))


@pytest.fixture(autouse=True)
def _no_cache() -> Iterator[None]:
    sources._open.cache_clear()
    yield
    sources._open.cache_clear()


def write_client(folder: Path, name: str, count: int) -> None:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"text": f"{name} {number}", "label": number % 2}) for number in range(count)]
    (folder / f"{name}.jsonl").write_text("\n".join(lines))


def write_table(path: Path, counts: dict[str, int]) -> Path:
    lines = [f"{name},{name} {number},good" for name, count in counts.items() for number in range(count)]
    path.write_text("\n".join(["client,text,label", *lines]))
    return path


def open_files(folder: Path, **config: Any) -> Source:
    return open_source(DataConfig(name="files", path=str(folder), **config), SENTIMENT)


def open_table(path: Path, **config: Any) -> Source:
    return open_source(DataConfig(name="table", path=str(path), **config), SENTIMENT)


def test_one_file_is_one_client(tmp_path: Path) -> None:
    write_client(tmp_path / "d", "b", 5)
    (tmp_path / "d" / "a.csv").write_text("text,label\nx,bad\ny,good\n")
    source = open_files(tmp_path / "d")
    assert source.client_ids == ("a", "b")
    assert source.labels == ("bad", "good")
    assert {row["text"] for row in source.load("a").train + source.load("a").test} == {"x", "y"}


def test_opening_files_reads_none_of_them(tmp_path: Path) -> None:
    write_client(tmp_path / "d", "good", 5)
    (tmp_path / "d" / "broken.jsonl").write_text("{")
    assert len(open_files(tmp_path / "d").load("good").train) == 4


def test_a_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    write_client(tmp_path / "d", "a", 5)
    before = open_files(tmp_path / "d", min_per_client=3)
    write_client(tmp_path / "d", "a", 10)
    assert len(before.load("a").train) + len(open_files(tmp_path / "d", min_per_client=3).load("a").train) == 8 + 8
    write_client(tmp_path / "d", "b", 3)
    assert open_files(tmp_path / "d", min_per_client=3).client_ids == ("a", "b")


def test_hidden_files_are_not_read_and_said(tmp_path: Path) -> None:
    write_client(tmp_path / "d", "a", 5)
    (tmp_path / "d" / ".DS_Store").touch()
    source = open_files(tmp_path / "d")
    assert (source.client_ids, source.notes) == (("a",), ("did not read hidden files: .DS_Store",))


def test_small_files_are_left_out_by_name_when_asked(tmp_path: Path) -> None:
    for name, count in {"a": 5, "b": 2, "c": 1}.items():
        write_client(tmp_path / "d", name, count)
    source = open_files(tmp_path / "d", min_per_client=3)
    assert source.client_ids == ("a",)
    assert source.notes == ("left out 2 clients with fewer than 3 rows: b (2), c (1)",)


def test_a_file_with_one_example_is_an_error_of_that_client(tmp_path: Path) -> None:
    write_client(tmp_path / "d", "a", 5)
    write_client(tmp_path / "d", "c", 1)
    source = open_files(tmp_path / "d")
    assert source.load("a").train
    with pytest.raises(DataError, match=r"client 'c' has one example"):
        source.load("c")


def test_a_table_is_grouped_by_its_client_column(tmp_path: Path) -> None:
    source = open_table(write_table(tmp_path / "t.csv", {"b": 3, "a": 5}))
    assert source.client_ids == ("a", "b")
    assert {row["text"].split()[0] for row in source.load("a").train} == {"a"}


def test_a_table_with_semicolons_is_read_as_one_with_commas(tmp_path: Path) -> None:
    with_commas = write_table(tmp_path / "t.csv", {"a": 3, "b": 2})
    with_semicolons = tmp_path / "s.csv"
    with_semicolons.write_text(with_commas.read_text().replace(",", ";"))
    loaded = [[open_table(path).load(client) for client in ("a", "b")] for path in (with_commas, with_semicolons)]
    assert loaded[0] == loaded[1]


def test_a_table_is_parsed_once_for_all_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_table(tmp_path / "t.csv", {"a": 3, "b": 3})
    reads = []
    real = sources.read_records
    monkeypatch.setattr(sources, "read_records", lambda path, **rest: reads.append(path) or real(path, **rest))
    for client_id in ("a", "b"):
        open_table(path).load(client_id)
    assert len(reads) == 1


def test_a_table_with_a_client_of_one_example_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"client 'lonely' has one example; expected at least 2"):
        open_table(write_table(tmp_path / "t.csv", {"a": 3, "lonely": 1}))


def test_small_clients_of_a_table_are_left_out_by_name_when_asked(tmp_path: Path) -> None:
    source = open_table(write_table(tmp_path / "t.csv", {"a": 3, "lonely": 1}), min_per_client=3)
    assert source.notes == ("left out 1 clients with fewer than 3 rows: lonely (1)",)


def test_no_client_left_is_an_error_that_names_the_largest(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"^data=table leaves no client: expected at least 9 rows per client, the largest of 2, 'b', has 4$",
    ):
        open_table(write_table(tmp_path / "t.csv", {"a": 3, "b": 4}), min_per_client=9)


def test_data_without_any_client_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tweets.csv"
    path.write_text("sentiment,text\nbad,@nobody hello\n")
    monkeypatch.setattr(sources, "asset_path", lambda name: path)
    with pytest.raises(DataError, match=r"^data=airlines leaves no client: .*, there is none$"):
        open_source(DataConfig(name="airlines"), SENTIMENT)


def test_the_first_clients_by_name_are_kept(tmp_path: Path) -> None:
    source = open_table(write_table(tmp_path / "t.csv", {"b": 2, "a": 2, "c": 2}), max_clients=2)
    assert source.client_ids == ("a", "b")
    assert source.notes == ("kept the first 2 of 3 clients by name (data.max_clients)",)


def test_a_pooled_table_needs_no_client_column(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("text,label\n" + "".join(f"t{number},good\n" for number in range(8)))
    source = open_table(path, partition=PartitionConfig(kind="iid", num_clients=2))
    assert source.client_ids == ("client-000", "client-001")
    assert sum(len(source.load(name).train) + len(source.load(name).test) for name in source.client_ids) == 8


def test_files_can_be_pooled_and_divided_anew(tmp_path: Path) -> None:
    write_client(tmp_path / "d", "a", 5)
    write_client(tmp_path / "d", "b", 1)
    source = open_files(tmp_path / "d", partition=PartitionConfig(kind="iid", num_clients=3))
    texts = {row["text"] for name in source.client_ids for row in source.load(name).train + source.load(name).test}
    assert texts == {"a 0", "a 1", "a 2", "a 3", "a 4", "b 0"}


def test_a_made_client_with_one_row_is_left_out_and_named(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.csv", {"a": 5})
    source = open_table(path, partition=PartitionConfig(kind="iid", num_clients=3))
    assert source.client_ids == ("client-000", "client-001")
    assert source.notes == ("left out 1 clients with fewer than 2 rows: client-002 (1)",)


def test_a_relative_path_is_looked_up_in_the_app_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "app").mkdir()
    write_client(tmp_path / "app" / "d", "a", 5)
    monkeypatch.chdir(tmp_path)
    config = DataConfig(name="files", path="d")
    assert open_source(config, SENTIMENT, app_dir=tmp_path / "app").client_ids == ("a",)
    with pytest.raises(DataError, match=r"no such file or folder: 'd' \(looked in the working directory\)"):
        open_source(config, SENTIMENT)
    with pytest.raises(DataError, match=r"the working directory and the app folder"):
        open_source(config, SENTIMENT, app_dir=tmp_path / "other")


def test_data_that_was_not_fetched_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"^asset 'airlines' is not here; run: fedpeft assets fetch airlines$"):
        open_source(DataConfig(name="airlines"), SENTIMENT)


def test_hub_rows_are_grouped_by_client(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"client": name, "text": f"t{number}", "label": 0} for number in range(2) for name in "ab"]
    monkeypatch.setattr("federated.data.hub.load_train_split", lambda name: rows)
    assert open_source(DataConfig(name="hub", path="o/n"), SENTIMENT).client_ids == ("a", "b")


TASKS = {
    "classification": SENTIMENT,
    "text": TaskConfig(name="causal_lm"),
    "chat": TaskConfig(name="causal_lm", chat=True),
    "sensor": TaskConfig(name="sensor", labels=("idle", "walk", "run"), max_length=16),
    "many labels": TaskConfig(labels=tuple(f"l{number}" for number in range(11))),
}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_has_synthetic_data_that_its_own_reader_accepts(task: TaskConfig) -> None:
    from federated.data.readers import Record
    from federated.data.rows import RowReader

    config = DataConfig(partition=PartitionConfig(num_clients=2))
    data = open_source(config, task).load("client-001")
    read = RowReader(config, task).rows(Record("synthetic", row) for row in data.train)
    assert read == data.train


@pytest.mark.parametrize("task", [SENTIMENT, TASKS["sensor"]], ids=["text", "sensor"])
def test_synthetic_data_is_a_function_of_the_seed(task: TaskConfig) -> None:
    def load(seed: int) -> Any:
        sources._open.cache_clear()
        return open_source(DataConfig(seed=seed), task).load("client-003")

    assert load(0) == load(0)
    assert load(0).train != load(1).train


def test_synthetic_clients_are_as_many_as_asked_and_differ() -> None:
    source = open_source(DataConfig(partition=PartitionConfig(num_clients=12)), SENTIMENT)
    assert len(source.client_ids) == 12
    assert source.load("client-000").train != source.load("client-001").train


def test_synthetic_sensor_rows_have_the_shape_of_the_task() -> None:
    row = open_source(DataConfig(), TASKS["sensor"]).load("client-000").train[0]
    assert (len(row["values"]), {len(step) for step in row["values"]}) == (16, {3})


def test_synthetic_clients_hold_every_label() -> None:
    data = open_source(DataConfig(), TASKS["sensor"]).load("client-000")
    assert {row["label"] for row in data.train} == {0, 1, 2}


def test_synthetic_data_can_be_divided_by_label() -> None:
    config = DataConfig(partition=PartitionConfig(kind="pathological", num_clients=4, classes_per_client=1))
    source = open_source(config, SENTIMENT)
    assert [len({row["label"] for row in source.load(name).train}) for name in source.client_ids] == [1] * 4
