"""Raw cells become rows of the task, or one error that quotes no cell."""

from collections.abc import Mapping
from typing import Any

import pytest

from federated.config import DataConfig, TaskConfig
from federated.data.readers import Record
from federated.data.rows import RowReader, check_client_id
from federated.errors import DataError

SENTIMENT = TaskConfig(labels=("bad", "good"))
SENSOR = TaskConfig(name="sensor", labels=("idle", "busy"))
TEXT = TaskConfig(name="causal_lm")
CHAT = TaskConfig(name="causal_lm", chat=True)


def read(task: TaskConfig, *cells: Mapping[str, Any], **config: Any) -> list[Mapping[str, Any]]:
    records = [Record(f"a.csv line {number}", row) for number, row in enumerate(cells, start=2)]
    return list(RowReader(DataConfig(**config), task).rows(records))


@pytest.mark.parametrize(("label", "index"), [("bad", 0), ("good", 1), (1, 1), ("1", 1), ("0", 0)])
def test_a_label_is_a_name_or_a_number(label: Any, index: int) -> None:
    assert read(SENTIMENT, {"text": "hm", "label": label}) == [{"text": "hm", "label": index}]


def test_a_label_that_is_a_number_by_name_is_taken_by_name() -> None:
    task = TaskConfig(labels=("1", "0"))
    assert read(task, {"text": "hm", "label": "1"})[0]["label"] == 0


@pytest.mark.parametrize("label", ["", "Bad", "secret", 2, -1, "2", "99999999999", True, 1.0, None, [0]])
def test_an_unknown_label_names_the_row_and_the_allowed_ones(label: Any) -> None:
    with pytest.raises(DataError) as caught:
        read(SENTIMENT, {"text": "hm", "label": "bad"}, {"text": "hm", "label": label})
    assert "a.csv line 3: unknown label" in str(caught.value)
    assert "bad, good (task.labels)" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_columns_are_named_by_the_configuration() -> None:
    rows = read(SENTIMENT, {"review": "fine", "stars": "good"}, text_column="review", label_column="stars")
    assert rows == [{"text": "fine", "label": 1}]


def test_a_missing_column_says_which_were_found() -> None:
    with pytest.raises(DataError, match=r"no column 'text'; found columns: review, label; set data\.text_column"):
        read(SENTIMENT, {"review": "fine", "label": "good"})


@pytest.mark.parametrize(("text", "fault"), [("", "empty"), (" \n", "empty"), (5, "type int"), (None, "type NoneType"),
                                             ("\ud800", "surrogate")])  # fmt: skip
def test_a_bad_text_is_one_error(text: Any, fault: str) -> None:
    with pytest.raises(DataError, match=rf"a\.csv line 2: the text .*{fault}"):
        read(TEXT, {"text": text})


@pytest.mark.parametrize(
    ("task", "columns"),
    [
        (SENTIMENT, {"review", "label", "client"}),
        (TEXT, {"review", "client"}),
        (CHAT, {"messages", "client"}),
        (SENSOR, {"values", "label", "client"}),
    ],
    ids=["labelled", "text", "chat", "sensor"],
)
def test_columns_that_are_looked_at(task: TaskConfig, columns: set[str]) -> None:
    assert set(RowReader(DataConfig(text_column="review"), task).columns) == columns


def test_language_modelling_needs_no_label() -> None:
    assert read(TEXT, {"text": "to be"}) == [{"text": "to be"}]


def test_chat_rows_keep_their_messages_only() -> None:
    messages = [{"role": "user", "content": "hi", "id": 7}, {"role": "assistant", "content": "hello"}]
    assert read(CHAT, {"messages": messages}) == [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    ]


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([], "not a list with at least one"),
        ("no json", "not a JSON list"),
        ("{}", "not a list"),
        (["hi"], "no role"),
        ([{"role": "root", "content": "hi"}], "no role"),
        ([{"role": "user"}], "type NoneType"),
        ([{"role": "user", "content": "hi"}], "no message of the assistant"),
    ],
)
def test_bad_messages_are_one_error(messages: Any, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        read(CHAT, {"messages": messages})


def test_a_missing_messages_column_is_said() -> None:
    with pytest.raises(DataError, match=r"no column 'messages'; found columns: text$"):
        read(CHAT, {"text": "hi"})


def test_sensor_values_come_as_lists_or_as_json_in_a_cell() -> None:
    rows = read(SENSOR, {"values": [[1, 2], [3, 4]], "label": "idle"}, {"values": "[[5, 6.5]]", "label": "1"})
    assert rows == [{"values": [[1.0, 2.0], [3.0, 4.0]], "label": 0}, {"values": [[5.0, 6.5]], "label": 1}]


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ([], "at least one element"),
        ([[]], "time step 0"),
        ([1.0], "time step 0"),
        ([[1.0], [1.0, 2.0]], "time step 1 of 'values' is not a list of 1 channels"),
        ([[float("nan")]], "no finite number"),
        ([[10**400]], "no finite number"),
        ([[True]], "no finite number"),
        ([["1"]], "no finite number"),
        ("[" * 100_000, "not a JSON list"),
    ],
)
def test_bad_sensor_values_are_one_error(values: Any, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        read(SENSOR, {"values": values, "label": 0})


def test_one_client_has_one_number_of_channels() -> None:
    with pytest.raises(DataError, match=r"row 2 of the client has 1 channels, expected 2"):
        read(SENSOR, {"values": [[1, 2]], "label": 0}, {"values": [[1]], "label": 0})


def test_no_sensor_rows_are_no_error_here() -> None:
    assert read(SENSOR) == []


@pytest.mark.parametrize("client_id", ["united", "hamlet/OPHELIA", "Zürich 7", "x" * 128, "a.b"])
def test_a_usable_client_id_is_kept_as_it_is(client_id: str) -> None:
    assert check_client_id(client_id, "here") == client_id


@pytest.mark.parametrize(
    "client_id",
    [
        "",
        "x" * 129,
        "a\0b",
        "a\nb",
        ".hidden",
        "..",
        "a/../b",
        "a//b",
        "/etc",
        "a/",
        "a\\b",
        " a",
        "a ",
        "\u202ea",
        "\x7f",
    ],
)
def test_an_unusable_client_id_is_refused(client_id: str) -> None:
    with pytest.raises(DataError, match=r"^here: the client id .*; expected 1 to 128 printable characters"):
        check_client_id(client_id, "here")


@pytest.mark.parametrize(("cell", "expected"), [("a", "a"), (7, "7")])
def test_a_client_is_text_or_a_number(cell: Any, expected: str) -> None:
    assert RowReader(DataConfig(), TEXT).client_id(Record("here", {"client": cell})) == expected


@pytest.mark.parametrize("cell", [None, 1.5, True, ["a"]])
def test_a_client_of_another_type_is_refused(cell: Any) -> None:
    with pytest.raises(DataError, match=r"here: the client id is of type"):
        RowReader(DataConfig(), TEXT).client_id(Record("here", {"client": cell}))


def test_a_labelled_text_fits_every_text_task() -> None:
    def row(task: TaskConfig) -> Any:
        return RowReader(DataConfig(name="airlines"), task).labelled("late", "bad", question="How?")

    assert row(SENTIMENT) == {"text": "late", "label": 0}
    assert row(TEXT) == {"text": "late"}
    assert row(CHAT)["messages"] == [
        {"role": "user", "content": "How?\nlate"},
        {"role": "assistant", "content": "bad"},
    ]


def test_a_labelled_text_does_not_fit_sensors() -> None:
    with pytest.raises(DataError, match=r"data=airlines holds texts; task=sensor"):
        RowReader(DataConfig(name="airlines"), SENSOR).labelled("late", "bad", question="How?")


def test_a_label_of_the_data_that_the_task_lacks_is_an_error() -> None:
    with pytest.raises(DataError, match=r"label 'neutral', which task.labels lacks: found bad, good"):
        RowReader(DataConfig(name="airlines"), SENTIMENT).labelled("late", "neutral", question="How?")


def test_a_text_without_label_does_not_fit_classification() -> None:
    with pytest.raises(DataError, match=r"data=shakespeare has no labels"):
        RowReader(DataConfig(name="shakespeare"), SENTIMENT).spoken("Speak.", "to be")
