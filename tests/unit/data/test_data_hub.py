"""Rows from the hub, through a loader that needs no network."""

import sys
from types import SimpleNamespace

import pytest

from federated.config import DataConfig
from federated.data.hub import hub_records, load_train_split
from federated.errors import DataError


def test_rows_come_with_their_place() -> None:
    records = list(hub_records(DataConfig(name="hub", path="o/n"), load=lambda name: [{"text": name}]))
    assert [(record.where, record.cells) for record in records] == [("o/n row 1", {"text": "o/n"})]


def test_a_failure_is_one_line_with_its_reason() -> None:
    def fail(name: str) -> list[dict[str, str]]:
        raise ConnectionError("no\nroute")

    with pytest.raises(DataError, match=r"the data set 'o/n' cannot be loaded from the hub: no route"):
        list(hub_records(DataConfig(name="hub", path="o/n"), load=fail))


def test_a_failure_without_words_is_named_by_its_kind() -> None:
    def fail(name: str) -> list[dict[str, str]]:
        raise TimeoutError

    with pytest.raises(DataError, match=r"from the hub: TimeoutError"):
        list(hub_records(DataConfig(name="hub", path="o/n"), load=fail))


def test_the_usual_loader_takes_the_train_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    fake = SimpleNamespace(load_dataset=lambda name, split: asked.append((name, split)) or [{"text": "x"}])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert load_train_split("o/n") == [{"text": "x"}]
    assert asked == [("o/n", "train")]
