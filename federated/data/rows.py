"""From raw cells to rows of the task: text, label, messages or sensor values, each checked.

Messages say where and what kind of thing was found, never the cell itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from federated.config import DataConfig, TaskConfig
from federated.data.readers import Record, column_names
from federated.data.source import Row
from federated.errors import DataError

__all__ = ["RowReader", "check_client_id"]

_ROLES = ("system", "user", "assistant")


def check_client_id(client_id: str, where: str) -> str:
    """Check a client's name: it becomes a file name in stores and a field in records.

    Returns:
        The name, unchanged.

    Raises:
        DataError: unless it is 1 to 128 printable characters without backslashes, surrounding spaces, or a path
            segment that is empty or starts with a dot. A slash may stand between two parts (``"hamlet/OPHELIA"``).
    """
    fault = ""
    if not 1 <= len(client_id) <= 128:
        fault = f"has {len(client_id)} characters"
    elif not client_id.isprintable() or "\\" in client_id:
        fault = "holds a control character or a backslash"
    elif client_id != client_id.strip():
        fault = "starts or ends with a space"
    elif any(not part or part.startswith(".") for part in client_id.split("/")):
        fault = "has a part that is empty or starts with a dot"
    if fault:
        raise DataError(f"{where}: the client id {fault}; expected 1 to 128 printable characters, as in 'clinic-7'")
    return client_id


@dataclass(frozen=True)
class RowReader:
    """Turns records into rows of one task.

    Args:
        config: names the columns.
        task: says what a row holds, and the allowed labels.
    """

    config: DataConfig
    task: TaskConfig

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that are looked at: the task's, and the client's."""
        config = self.config
        if self.task.name == "sensor":
            return "values", config.label_column, config.client_column
        if self.task.name == "causal_lm":
            return "messages" if self.task.chat else config.text_column, config.client_column
        return config.text_column, config.label_column, config.client_column

    def rows(self, records: Iterable[Record]) -> list[Row]:
        """Convert all records.

        Raises:
            DataError: for the first missing column, unknown label or malformed cell.
        """
        rows = [self.row(record) for record in records]
        if self.task.name == "sensor" and rows:
            width = len(rows[0]["values"][0])
            for number, row in enumerate(rows, start=1):
                if len(row["values"][0]) != width:
                    found = len(row["values"][0])
                    raise DataError(f"row {number} of the client has {found} channels, expected {width} as in row 1")
        return rows

    def row(self, record: Record) -> Row:
        """Convert one record.

        Raises:
            DataError: for a missing column, an unknown label or a malformed cell.
        """
        if self.task.name == "sensor":
            return {"values": _series(record, self._cell(record, "values")), "label": self.label(record)}
        if self.task.name == "causal_lm" and self.task.chat:
            return {"messages": _messages(record, self._cell(record, "messages"))}
        text = _checked_text(self._cell(record, self.config.text_column, option="text_column"), record.where)
        return {"text": text} if self.task.name == "causal_lm" else {"text": text, "label": self.label(record)}

    def client_id(self, record: Record) -> str:
        """The record's client.

        Raises:
            DataError: if the column is missing or holds no usable name.
        """
        value = self._cell(record, self.config.client_column, option="client_column")
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise DataError(f"{record.where}: the client id is of type {type(value).__name__}, expected text")
        return check_client_id(str(value), record.where)

    def label(self, record: Record) -> int:
        """The record's label as an index into ``task.labels``: by name first, then by number.

        Raises:
            DataError: if the column is missing or the label is not allowed.
        """
        value = self._cell(record, self.config.label_column, option="label_column")
        labels = self.task.labels
        if isinstance(value, str):
            if value in labels:
                return labels.index(value)
            value = int(value) if value.isascii() and value.isdecimal() and len(value) < 10 else None
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(labels):
            return value
        raise DataError(
            f"{record.where}: unknown label in column {self.config.label_column!r}; expected one of "
            f"{', '.join(labels)} (task.labels) or a number from 0 to {len(labels) - 1}"
        )

    def labelled(self, text: str, label: str, *, question: str) -> Row:
        """A row of a bundled labelled text, for any text task; as chat, ``question`` asks for the label.

        Raises:
            DataError: if ``task.labels`` does not have the label, or the task is not about text.
        """
        if self.task.name == "causal_lm":
            return self.spoken(f"{question}\n{text}", label) if self.task.chat else {"text": text}
        self._need_text_task()
        if label not in self.task.labels:
            found = ", ".join(self.task.labels) or "none"
            raise DataError(f"data={self.config.name} has the label {label!r}, which task.labels lacks: found {found}")
        return {"text": text, "label": self.task.labels.index(label)}

    def spoken(self, prompt: str, text: str) -> Row:
        """A row for language modelling: the text itself, or as chat the answer to ``prompt``.

        Raises:
            DataError: if the task is not language modelling.
        """
        if self.task.name != "causal_lm":
            raise DataError(f"data={self.config.name} has no labels; task={self.task.name} needs them, use causal_lm")
        if not self.task.chat:
            return {"text": text}
        return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]}

    def _need_text_task(self) -> None:
        if self.task.name == "sensor":
            raise DataError(
                f"data={self.config.name} holds texts; task=sensor needs series, use data=synthetic or files"
            )

    def _cell(self, record: Record, column: str, *, option: str = "") -> Any:
        if column in record.cells:
            return record.cells[column]
        advice = f"; set data.{option}" if option else ""
        raise DataError(f"{record.where}: no column {column!r}; found columns: {column_names(record.cells)}{advice}")


def _checked_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: the text is of type {type(value).__name__}, expected text")
    if not value.strip():
        raise DataError(f"{where}: the text is empty; expected at least one character, remove the row")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: the text holds half a surrogate pair; expected valid Unicode") from None
    return value


def _decoded(record: Record, value: Any, column: str) -> list[Any]:
    """A list as it stands, or from the JSON in a CSV cell."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(f"{record.where}: column {column!r} holds text that is not a JSON list") from None
    if not isinstance(value, list) or not value:
        raise DataError(f"{record.where}: column {column!r} is not a list with at least one element")
    return value


def _messages(record: Record, value: Any) -> list[dict[str, str]]:
    messages = []
    for message in _decoded(record, value, "messages"):
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
            raise DataError(f"{record.where}: a message has no role; expected one of {', '.join(_ROLES)}")
        content = _checked_text(message.get("content"), record.where)
        messages.append({"role": str(message["role"]), "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{record.where}: no message of the assistant; expected one, it is what is learnt")
    return messages


def _series(record: Record, value: Any) -> list[list[float]]:
    steps = _decoded(record, value, "values")
    width = len(steps[0]) if isinstance(steps[0], list) else 0
    for number, step in enumerate(steps):
        if not isinstance(step, list) or len(step) != width or width == 0:
            raise DataError(
                f"{record.where}: time step {number} of 'values' is not a list of {width or 'some'} channels"
            )
        if not all(_is_finite(x) for x in step):
            raise DataError(f"{record.where}: time step {number} of 'values' holds something that is no finite number")
    return [[float(x) for x in step] for step in steps]


def _is_finite(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False
