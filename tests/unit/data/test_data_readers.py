"""Records out of CSV, JSONL and Parquet, each with its place."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from federated.data.readers import column_names, read_records, short_path
from federated.errors import DataError


def test_csv_gives_text_cells_and_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"two\nlines, one cell",1\nNA,007\n')
    first, second = read_records(path)
    assert first.cells == {"text": "two\nlines, one cell", "label": "1"}
    assert first.where.endswith("/a.csv line 3")
    assert second.cells == {"text": "NA", "label": "007"}


def test_csv_may_start_with_a_byte_order_mark_and_hold_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext\r\nhello\r\n\r\nagain\r\n")
    assert [record.cells["text"] for record in read_records(path)] == ["hello", "again"]


@pytest.mark.parametrize("separator", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
@pytest.mark.parametrize("quote", ["", '"'], ids=["bare", "quoted"])
def test_csv_s_separator_is_told_by_its_header(tmp_path: Path, separator: str, quote: str) -> None:
    path = tmp_path / "a.csv"
    header = separator.join(f"{quote}{name}{quote}" for name in ("text", "label"))
    path.write_bytes(f'{header}\r\n"a, b; c\t""d""\r\ne"{separator}1\r\nplain{separator}2\r\n'.encode("utf-8-sig"))
    first, second = read_records(path, columns=("text", "label", "client"))
    assert first.cells == {"text": 'a, b; c\t"d"\r\ne', "label": "1"}
    assert second.cells == {"text": "plain", "label": "2"}


@pytest.mark.parametrize(
    ("header", "row", "found"),
    [
        ("text", "x; y", ["text"]),  # one column: nothing to tell
        ("text,a;b;c;d", "x; y,z", ["text", "a;b;c;d"]),
        ("text;a,b", "x, y;z", ["text", "a,b"]),
        ("label,text;more", "1,x", ["label", "text;more"]),
        ("text;a,label", "x;y,z", ["text;a", "label"]),  # as many wanted columns under both: a comma
        ("words;label", "x, y;1", ["words", "label"]),
        ("words;stars", "x, y;1", ["words", "stars"]),  # none that was wanted, but names all the same
        ("so so; never again", "x; y", ["so so; never again"]),  # a file without a header
        ("so so; fine, really", "x,y", ["so so; fine", " really"]),
    ],
)
def test_csv_is_split_at_another_separator_only_for_a_reason(
    tmp_path: Path, header: str, row: str, found: list[str]
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"{header}\n{row}\n")
    (record,) = read_records(path, columns=("text", "label"))
    assert list(record.cells) == found


def test_jsonl_keeps_types_and_skips_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "line \\u2028 separator \u2028 inside", "label": 1}\n\n{"values": [[1.5]]}\n')
    first, second = read_records(path)
    assert first.cells["text"] == "line \u2028 separator \u2028 inside"
    assert (second.where.rsplit("/")[-1], second.cells) == ("a.jsonl line 3", {"values": [[1.5]]})


def test_parquet_gives_nested_lists_and_row_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.PARQUET"
    pq.write_table(pa.table({"values": [[[1.0, 2.0]], [[3.0, 4.0]]], "label": [0, 1]}), path)
    first, second = read_records(path)
    assert first.cells == {"values": [[1.0, 2.0]], "label": 0}
    assert second.where.endswith("row 2")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"text\nhello\n", "unsupported file type '.txt'; expected .csv, .jsonl, .parquet"),
        ("a.csv", b"", "the file has no rows"),
        ("a.csv", b"text,label\n", "the file has no rows"),
        ("a.jsonl", b"\n\n", "the file has no rows"),
        ("a.csv", b"a,b\n1,2\nsecret,3,4\n", "line 3: found 3 fields separated by commas, expected 2 as in the header"),
        ("a.csv", b"a;b\n1;2\nsecret;3;4\n", "line 3: found 3 fields separated by semicolons, expected 2"),
        ("a.csv", b"a\tb\nsecret\n", "line 2: found 1 fields separated by tabs, expected 2"),
        ("a.csv", b'a,b\n1,"secret\n', "line 2: malformed CSV"),
        ("a.csv", b'"a";"b\n1;secret\n', "malformed CSV"),
        ("a.csv", b"a,a\n1,secret\n", "line 1: a column name stands twice"),
        ("a.csv", b"a\nok\nsecret \xff\n", "line 3: not UTF-8"),
        ("a.jsonl", b'{"a": 1}\n{"secret": \n', "line 2: malformed JSON: Expecting value"),
        ("a.jsonl", b'["secret"]\n', "line 1: found a JSON list, expected one object"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000 + b"\n", "line 1: malformed JSON"),
        ("a.jsonl", b'{"a": ' + b"1" * 5_000 + b"}\n", "line 1: malformed JSON: a value is too deep or too long"),
        ("a.parquet", b"secret", "malformed Parquet after row 0"),
        ("a.parquet", b"PAR1" + b"secret" * 9 + b"PAR1", "malformed Parquet after row 0"),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_place_and_quotes_nothing(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match=rf"gone\.{suffix}: no such file"):
        list(read_records(tmp_path / f"gone.{suffix}"))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_folder_in_place_of_a_file_is_one_error(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.{suffix}").mkdir()
    with pytest.raises(DataError, match=r"cannot be read: Is a directory"):
        list(read_records(tmp_path / f"a.{suffix}"))


def test_a_parquet_file_with_a_damaged_page_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {n}" for n in range(500)]}), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[8:200] = b"\0" * 192
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"malformed Parquet"):
        list(read_records(path))


def test_column_names_never_quote_what_looks_like_data() -> None:
    names = ["text", "I hate this airline", "x" * 50, "label"]
    assert column_names(names) == "text, (not a name), (not a name), label"


def test_many_column_names_are_cut() -> None:
    assert column_names(json.loads(json.dumps([f"c{n}" for n in range(20)]))).endswith("c11 ...")


def test_no_column_names_are_said() -> None:
    assert column_names([]) == "none"


def test_a_bare_file_name_stands_for_itself() -> None:
    assert short_path(Path("a.csv")) == "a.csv"
