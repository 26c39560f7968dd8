"""Bad local data: one clear DataError, and the other clients stay usable."""

from pathlib import Path

import pytest

from federated.config import DataConfig, TaskConfig
from federated.data import check_source, open_source
from federated.errors import DataError

TASK = TaskConfig(labels=("bad", "good"))


def load_all(name: str, path: Path) -> None:
    check_source(open_source(DataConfig(name=name, path=str(path)), TASK))


def folder_with(tmp_path: Path, files: dict[str, str]) -> Path:
    folder = tmp_path / "clients"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


GOOD = "text,label\nx,bad\ny,good\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "the folder clients is empty; expected one file per client"),
        ({"a.csv": GOOD, "notes.md": "hi"}, "notes.md: unsupported file type '.md'"),
        ({"a.csv": GOOD, "README": "hi"}, "README: unsupported file type ''"),
        ({"a.csv": GOOD, "a.jsonl": "{}"}, "two files for client 'a': a.csv and a.jsonl"),
        ({"a.csv": GOOD, "b.csv": ""}, "clients/b.csv: the file has no rows"),
        ({"a.csv": GOOD, "b.csv": "text,label\nx,ugly\ny,bad\n"}, "clients/b.csv line 2: unknown label"),
        ({"a.csv": GOOD, "b.csv": "text\nx\ny\n"}, "clients/b.csv line 2: no column 'label'; found columns: text"),
        ({"a.csv": GOOD, "b.csv": "text,label\nx,bad\n"}, "client 'b' has one example"),
        ({"a.csv": GOOD, "b.parquet": "PAR1"}, "clients/b.parquet: malformed Parquet"),
        ({"a.csv": GOOD, "b\nc.csv": GOOD}, "the client id holds a control character"),
        ({"a.csv": GOOD, "x" * 140 + ".csv": GOOD}, "the client id has 140 characters"),
    ],
)
def test_a_bad_folder_is_one_error(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_all("files", folder_with(tmp_path, files))
    assert message.replace("clients is", f"{tmp_path.name}/clients is") in str(caught.value)


def test_a_folder_inside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"a.csv": GOOD})
    (folder / "more.csv").mkdir()
    with pytest.raises(DataError, match=r"clients/more.csv: a folder; expected one file per client"):
        load_all("files", folder)


def test_a_bad_client_leaves_the_others_usable(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"a.csv": GOOD, "b.csv": "text\nx\n"})
    source = open_source(DataConfig(name="files", path=str(folder)), TASK)
    with pytest.raises(DataError):
        source.load("b")
    assert len(source.load("a").train) == 1


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"a.csv": GOOD})
    source = open_source(DataConfig(name="files", path=str(folder)), TASK)
    (folder / "a.csv").unlink()
    with pytest.raises(DataError, match=r"clients/a\.csv: no such file"):
        source.load("a")


@pytest.mark.parametrize("name", ["files", "table"])
def test_a_missing_path_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"data\.path: no such file or folder: .*gone"):
        load_all(name, tmp_path / "gone")


@pytest.mark.parametrize("name", ["files", "table", "hub"])
def test_no_path_at_all_is_an_error(name: str) -> None:
    with pytest.raises(DataError, match=f"data={name} needs data.path"):
        open_source(DataConfig(name=name), TASK)


def test_a_table_in_place_of_a_folder_says_which_to_use(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(GOOD)
    with pytest.raises(DataError, match=r"t\.csv is a file; data=files expects a folder, or use data=table"):
        load_all("files", path)


def test_a_folder_in_place_of_a_table_says_which_to_use(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder; data=table expects one file, or use data=files"):
        load_all("table", tmp_path)


def test_a_table_without_its_client_column_says_which_columns_it_has(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(GOOD)
    with pytest.raises(DataError, match=r"no column 'client'; found columns: text, label; set data.client_column"):
        load_all("table", path)


def test_a_table_cannot_name_a_client_outside_a_store(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("client,text,label\n../../etc,x,bad\n../../etc,y,bad\n")
    with pytest.raises(DataError, match=r"t\.csv line 2: the client id has a part that is empty or starts with a dot"):
        load_all("table", path)


def test_a_file_without_its_header_does_not_leak_its_first_row(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("my private diary entry,bad\nanother one,good\n")
    with pytest.raises(DataError) as caught:
        load_all("table", path)
    assert "diary" not in str(caught.value)


def test_an_unreadable_path_under_a_file_is_missing_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(GOOD)
    with pytest.raises(DataError, match=r"no such file or folder"):
        load_all("files", tmp_path / "a.csv" / "b")


def test_a_path_that_the_system_refuses_is_one_error() -> None:
    with pytest.raises(DataError, match=r"data\.path: .* cannot be read: File name too long"):
        load_all("files", Path("x" * 5000))
