"""Records from one CSV, JSONL or Parquet file, with the place of each for error messages.

Messages name file and line, and never quote a cell: a file's content is private. CSV goes through the standard
library, which reports exact lines and guesses no types; only Parquet needs pyarrow, imported when used.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from federated.errors import DataError

__all__ = ["SUFFIXES", "Record", "column_names", "read_records", "short_path"]

_NAME = re.compile(r"[A-Za-z_][\w.-]{0,31}")
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}


class Record(NamedTuple):
    """One raw row: where it stands (``"a.csv line 3"``) and its cells by column name."""

    where: str
    cells: Mapping[str, Any]


def read_records(path: Path, *, columns: Collection[str] = ()) -> Iterator[Record]:
    """Read a file's rows one by one; blank lines are skipped.

    Args:
        path: the file; the ending of its name says what it is.
        columns: names to look for in a CSV's header, by which its separator is told: a comma, semicolon or tab.

    Raises:
        DataError: if the file is missing, of an unsupported kind, malformed or without rows.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{short_path(path)}: unsupported file type {path.suffix!r}; expected {', '.join(SUFFIXES)}")
    found = False
    try:
        for record in reader(path, columns):
            found = True
            yield record
    except FileNotFoundError:
        raise DataError(f"{short_path(path)}: no such file") from None
    except OSError as error:
        raise DataError(f"{short_path(path)}: cannot be read: {error.strerror or type(error).__name__}") from None
    if not found:
        raise DataError(f"{short_path(path)}: the file has no rows; expected at least 2 per client")


def short_path(path: Path) -> str:
    """Folder and file name: enough to find it, without the owner's directories (a message may reach the server)."""
    return f"{path.parent.name}/{path.name}" if path.parent.name else path.name


def column_names(names: Iterable[str]) -> str:
    """Column names for a message; what does not look like a name (a file without its header row) is not quoted."""
    shown = [name if _NAME.fullmatch(name) else "(not a name)" for name in names]
    return ", ".join(shown[:12]) + (" ..." if len(shown) > 12 else "") or "none"


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{short_path(path)} line {line}: not UTF-8 text; save the file as UTF-8") from None


def _read_csv(path: Path, columns: Collection[str]) -> Iterator[Record]:
    name, text = short_path(path), _text(path)
    delimiter = _delimiter(text, columns)
    lines = _lines(text, delimiter)
    try:
        header: list[str] = next(lines, [])
        if len(set(header)) < len(header):
            raise DataError(f"{name} line 1: a column name stands twice in the header; expected different names")
        for cells in lines:
            if not cells:
                continue
            where = f"{name} line {lines.line_num}"
            if len(cells) != len(header):
                found = f"found {len(cells)} fields separated by {_DELIMITERS[delimiter]}"
                raise DataError(f"{where}: {found}, expected {len(header)} as in the header")
            yield Record(where, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{name} line {lines.line_num}: malformed CSV: {error}") from None


def _lines(text: str, delimiter: str) -> Any:
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)


def _delimiter(text: str, columns: Collection[str]) -> str:
    """The separator under which the header names most of the columns; a comma unless another one names more.

    Where none names any, a header that is one cell to a comma, and several names to another separator, is split there:
    the error then says which columns were found.
    """
    headers = {delimiter: _header(text, delimiter) for delimiter in _DELIMITERS}
    best = max(headers, key=lambda delimiter: len(set(columns).intersection(headers[delimiter])))
    if len(headers[","]) > 1 or set(columns).intersection(headers[best]):
        return best
    named = [delimiter for delimiter in _DELIMITERS if all(_NAME.fullmatch(cell) for cell in headers[delimiter])]
    return max(named, key=lambda delimiter: len(headers[delimiter]), default=",")


def _header(text: str, delimiter: str) -> list[str]:
    try:
        return list(next(_lines(text, delimiter), []))
    except csv.Error:  # a quoted name followed by another separator
        return []


def _read_jsonl(path: Path, _: Collection[str]) -> Iterator[Record]:
    name = short_path(path)
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{name} line {number}"
        try:
            cells = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "a value is too deep or too long"
            raise DataError(f"{where}: malformed JSON: {reason}; expected one object per line") from None
        if not isinstance(cells, dict):
            raise DataError(f"{where}: found a JSON {type(cells).__name__}, expected one object per line")
        yield Record(where, cells)


def _read_parquet(path: Path, _: Collection[str]) -> Iterator[Record]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    name, number = short_path(path), 0
    try:
        with path.open("rb") as file, ParquetFile(file) as table:
            for batch in table.iter_batches():
                for cells in batch.to_pylist():
                    number += 1
                    yield Record(f"{name} row {number}", cells)
    except (ArrowException, OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
            raise
        raise DataError(f"{name}: malformed Parquet after row {number} ({type(error).__name__})") from None


_READERS: Mapping[str, Callable[[Path, Collection[str]], Iterator[Record]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}

SUFFIXES = tuple(_READERS)
"""File types that can be read."""
