"""What stays on a client: recalled from its own disk, by the version that training started from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from federated.errors import DataError
from federated.flower.client_memory import recalled, remember
from federated.flower.client_store import ClientStore
from federated.manifest import AdapterSpec, ModuleSpec, TrainPlan, sha256_hex
from federated.state import AdapterState
from federated.wire import encode_packet

SPEC = AdapterSpec("lora", 2, 4.0, use_rslora=False, modules=(ModuleSpec("q", 3, 2, 2, 4.0),))
PLAN = TrainPlan(rank=2, kept=("factor_b", "dense"))


def adapter(value: float) -> AdapterState:
    shapes = {"q.factor_a": (2, 3), "q.factor_b": (2, 2), "head.weight": (5,)}
    return AdapterState(SPEC, {name: torch.full(shape, value) for name, shape in shapes.items()})


@pytest.fixture
def store(tmp_path: Path) -> ClientStore:
    return ClientStore(tmp_path, run_id="run", client_id="clinic")


def keep(store: ClientStore, before: float, after: float, *, number: int, version: str) -> None:
    pair = {"before": adapter(before), "after": adapter(after)}
    remember(store, PLAN, **pair, round_number=number, version_id=version)


def values(state: AdapterState) -> dict[str, float]:
    return {name: tensor.flatten()[0].item() for name, tensor in state.tensors.items()}


def test_who_keeps_nothing_yet_starts_from_what_it_was_sent(store: ClientStore) -> None:
    sent = adapter(1.0)
    assert recalled(store, PLAN, sent, version_id="v0") is sent


def test_a_client_goes_on_from_its_own_and_from_everybody_s_shared_part(store: ClientStore) -> None:
    keep(store, 1.0, 2.0, number=1, version="v0")
    found = recalled(store, PLAN, adapter(7.0), version_id="v1")
    assert values(found) == {"q.factor_a": 7.0, "q.factor_b": 2.0, "head.weight": 2.0}


def test_however_long_it_was_left_out(store: ClientStore) -> None:
    keep(store, 1.0, 2.0, number=1, version="v0")
    keep(store, 2.0, 3.0, number=40, version="v39")
    assert values(recalled(store, PLAN, adapter(7.0), version_id="v900"))["q.factor_b"] == 3.0


def test_the_same_version_again_starts_from_before(store: ClientStore) -> None:
    """An interrupted round is done again, and a round that missed its quorum did not happen."""
    keep(store, 1.0, 2.0, number=1, version="v0")
    for number in (2, 3, 4):
        start = recalled(store, PLAN, adapter(7.0), version_id="v1")
        assert values(start)["q.factor_b"] == 2.0
        keep(store, 2.0, 2.0 + number, number=number, version="v1")
    keep(store, 2.0, 9.0, number=2, version="v1")  # the run was killed and resumed from v1: round 2 once more
    assert values(recalled(store, PLAN, adapter(7.0), version_id="v1"))["q.factor_b"] == 2.0
    assert values(recalled(store, PLAN, adapter(7.0), version_id="v2"))["q.factor_b"] == 9.0


def test_nothing_is_read_or_written_where_nothing_is_kept(store: ClientStore) -> None:
    shared = TrainPlan(rank=2)
    remember(store, shared, before=adapter(1.0), after=adapter(2.0), round_number=1, version_id="v0")
    assert not store.folder.exists()
    keep(store, 1.0, 2.0, number=1, version="v0")
    sent = adapter(7.0)
    assert recalled(store, shared, sent, version_id="v1") is sent


def test_what_is_kept_comes_back_bit_for_bit_in_its_own_dtype(store: ClientStore) -> None:
    """After training it is float32, though the adapter travels in bfloat16."""
    exact = {**adapter(0.0).tensors, "q.factor_b": torch.tensor([[0.1, -1e-30], [3.0, torch.pi]])}
    start = adapter(0.5).cast("BF16")
    remember(store, PLAN, before=start, after=replace(start, tensors=exact), round_number=1, version_id="v0")
    found = recalled(store, PLAN, start, version_id="v1").tensors
    assert torch.equal(found["q.factor_b"], exact["q.factor_b"])
    assert found["q.factor_a"].dtype == torch.bfloat16
    again = recalled(store, PLAN, start, version_id="v0").tensors
    assert all(torch.equal(again[name], start.tensors[name]) for name in again)


def damaged(store: ClientStore, data: bytes) -> None:
    keep(store, 1.0, 2.0, number=1, version="v0")
    (store.folder / "1" / "kept").write_bytes(data)


def test_a_flipped_bit_a_cut_and_garbage_are_one_clear_error(store: ClientStore) -> None:
    keep(store, 1.0, 2.0, number=1, version="v0")
    whole = (store.folder / "1" / "kept").read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    for data in (b"", b"garbage", whole[:-1], whole[:40], bytes(flipped), whole + b"\0"):
        damaged(store, data)
        expected = (
            r"the client's store in .* is damaged: its bytes are not those .*; set that folder aside to start anew"
        )
        with pytest.raises(DataError, match=expected):
            recalled(store, PLAN, adapter(7.0), version_id="v1")
        assert (store.folder / "1" / "kept").read_bytes() == data


def test_a_record_in_another_format_is_the_same_error(store: ClientStore) -> None:
    damaged(store, sha256_hex(b"another format").encode() + b"another format")
    with pytest.raises(DataError, match=r"is damaged: found .* set that folder aside to start anew"):
        recalled(store, PLAN, adapter(7.0), version_id="v1")


@pytest.mark.parametrize("header", [{}, {"version": 5}, {"version": None}], ids=str)
def test_a_record_that_names_no_version_is_older_than_any(store: ClientStore, header: dict[str, object]) -> None:
    keep(store, 1.0, 2.0, number=1, version="v0")
    packet = encode_packet(header, {})
    damaged(store, sha256_hex(packet).encode() + packet)
    with pytest.raises(DataError, match="holds another adapter's tensors"):
        recalled(store, PLAN, adapter(7.0), version_id="v0")


def test_another_adapter_s_tensors_are_not_taken(store: ClientStore) -> None:
    keep(store, 1.0, 2.0, number=1, version="v0")
    wider = replace(adapter(7.0), tensors={**adapter(7.0).tensors, "q.factor_b": torch.ones(2, 3)})
    for state, plan in ((wider, PLAN), (adapter(7.0), replace(PLAN, kept=("factor_b",)))):
        with pytest.raises(DataError, match=r"holds another adapter's tensors; set that folder aside to start anew"):
            recalled(store, plan, state, version_id="v1")


def test_a_disk_that_refuses_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    blocked = ClientStore(tmp_path / "file", run_id="run", client_id="clinic")
    with pytest.raises(DataError, match="cannot write the client's store"):
        keep(blocked, 1.0, 2.0, number=1, version="v0")
