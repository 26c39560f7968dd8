"""Updates on disk: what comes back, in which order, and what is refused."""

import pytest
import torch

from federated.aggregation.spool import Spool
from federated.errors import AggregationError


def test_tensors_come_back_bit_for_bit_in_the_order_of_client_ids() -> None:
    spool = Spool()
    given = {name: {"a": torch.randn(3, 2), "b": torch.randn(2, 1)} for name in ("north", "east", "west")}
    for name, tensors in given.items():
        spool.put(name, tensors)
    assert spool.client_ids == ["east", "north", "west"]
    for name, tensors in given.items():
        assert all(torch.equal(spool.get(name, key), tensor) for key, tensor in tensors.items())


def test_what_comes_back_is_a_copy_in_float32() -> None:
    spool = Spool()
    spool.put("east", {"a": torch.ones(2, dtype=torch.bfloat16)})
    first = spool.get("east", "a")
    first.mul_(5)
    assert first.dtype == torch.float32
    assert torch.equal(spool.get("east", "a"), torch.ones(2))


def test_a_view_is_written_as_it_looks() -> None:
    spool, matrix = Spool(), torch.arange(6.0).reshape(2, 3)
    spool.put("east", {"a": matrix.T})
    assert torch.equal(spool.get("east", "a"), matrix.T)


def test_a_second_update_of_a_client_is_refused_and_the_first_kept() -> None:
    spool = Spool()
    spool.put("east", {"a": torch.ones(2)})
    with pytest.raises(AggregationError, match="two updates of east in one round"):
        spool.put("east", {"a": torch.zeros(2)})
    assert torch.equal(spool.get("east", "a"), torch.ones(2))


def test_a_disk_that_refuses_loses_nothing_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool()
    spool.put("east", {"a": torch.ones(2)})

    class Full:
        def __init__(self, file) -> None:
            self._file = file

        def __getattr__(self, name: str):
            return getattr(self._file, name)

        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    whole = spool._file
    monkeypatch.setattr(spool, "_file", Full(whole))
    with pytest.raises(AggregationError, match="cannot keep the update of west on disk: No space left"):
        spool.put("west", {"a": torch.ones(2)})
    monkeypatch.setattr(spool, "_file", whole)
    assert spool.client_ids == ["east"]
    spool.put("west", {"a": torch.full((2,), 3.0)})
    assert torch.equal(spool.get("east", "a"), torch.ones(2))
    assert torch.equal(spool.get("west", "a"), torch.full((2,), 3.0))


def test_one_tensor_of_all_clients_in_the_order_of_their_ids() -> None:
    spool = Spool()
    for name, value in (("west", 3.0), ("east", 1.0), ("north", 2.0)):
        spool.put(name, {"a": torch.full((2, 2), value)})
    found = spool.stacked("a")
    assert found.dtype == torch.float64
    assert found[:, 0, 0].tolist() == [1.0, 2.0, 3.0]
