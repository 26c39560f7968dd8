"""Personal adapters on the disk: whole or not there, checked when read, the user's alone."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from federated.device.personal_store import PersonalStore, PersonalVersion, Standing
from federated.errors import DeviceError
from federated.manifest import AdapterSpec, ModuleSpec, RawTensor, sha256_hex
from federated.wire import encode_tensors

SPEC = AdapterSpec("lora", 2, 4.0, False, (ModuleSpec("layer", 3, 3, 2, 4.0),))


def tensors(value: float) -> dict[str, RawTensor]:
    return {"layer.factor_a": RawTensor.from_array(np.full((2, 3), value, np.float32))}


def version(name: str, number: int) -> PersonalVersion:
    digest = sha256_hex(encode_tensors(tensors(number)))
    return PersonalVersion(name, number, number - 1, digest, "b" * 64, "g" * 64, "v" * 64, SPEC, {"train_loss": 0.5})


def put(store: PersonalStore, name: str, number: int) -> None:
    store.put(version(name, number), tensors(number))
    store.stand(name, Standing(number, "g" * 64))


@pytest.fixture
def store(tmp_path: Path) -> PersonalStore:
    return PersonalStore(tmp_path / "personal", keep=3)


def test_what_is_stored_is_what_is_read(store: PersonalStore) -> None:
    put(store, "ann", 1)
    record, found = store.get("ann", 1)
    assert record == version("ann", 1)
    assert found["layer.factor_a"].array.tolist() == tensors(1)["layer.factor_a"].array.tolist()
    assert (store.names(), store.numbers("ann"), store.next_number("ann")) == (["ann"], [1], 2)
    assert store.standing("ann") == Standing(1, "g" * 64)
    assert (store.standing("bob"), store.numbers("bob"), store.next_number("bob")) == (None, [], 1)


def test_names_that_differ_in_case_alone_are_two(store: PersonalStore, tmp_path: Path) -> None:
    put(store, "ann", 1)
    put(store, "Ann", 2)
    assert (store.names(), store.numbers("ann"), store.numbers("Ann")) == (["Ann", "ann"], [1], [2])
    assert len({path.name.lower() for path in (tmp_path / "personal").iterdir()}) == 2


def test_only_the_owner_may_read(store: PersonalStore, tmp_path: Path) -> None:
    put(store, "ann", 1)
    for path in (tmp_path / "personal").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_the_newest_few_stay_and_the_one_in_use(store: PersonalStore, tmp_path: Path) -> None:
    put(store, "ann", 1)
    for number in (2, 3, 4, 5):
        store.put(version("ann", number), tensors(number))
    assert store.numbers("ann") == [1, 4, 5]
    assert len(list((tmp_path / "personal").rglob("*.safetensors"))) == 3
    with pytest.raises(DeviceError, match=r"'ann' has no version 2, found \[1, 4, 5\]"):
        store.get("ann", 2)


def test_keeping_one_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="leave nothing to roll back to"):
        PersonalStore(tmp_path, keep=1)


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.mark.parametrize("moment", range(20))
def test_a_kill_at_any_step_leaves_the_old_version_or_the_new_one(
    moment: int, store: PersonalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that touches the disk is a moment at which the process may end."""
    put(store, "ann", 1)
    steps = 0

    def dying(call: Any) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps > moment:
                raise Killed
            return call(*args, **options)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", dying(os.open))
        patch.setattr(os, "fsync", dying(os.fsync))
        patch.setattr(Path, "replace", dying(Path.replace))
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # a dead process tidies nothing up
        died = False
        try:
            put(store, "ann", 2)
        except Killed:
            died = True
    again = PersonalStore(store._folder, keep=3)
    standing = again.standing("ann")
    assert standing in (Standing(1, "g" * 64), Standing(2, "g" * 64))
    assert died == (moment < 15), "three files, each opened, flushed, renamed, and its folder opened and flushed"
    assert standing.number == 2 or moment < 13
    assert again.get("ann", standing.number)[0].number == standing.number
    put(again, "ann", again.next_number("ann"))
    assert again.standing("ann").number == again.next_number("ann") - 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("1.safetensors", b"other bytes"),
        ("1.json", b"{"),
        ("1.json", b"[]"),
        ("1.json", b"{}"),
        ("1.json", b'{"spec": 3}'),
        ("standing.json", b'{"number": "x", "onto": "", "stale": false}'),
        ("standing.json", b"{}"),
        ("standing.json", b"\xff"),
    ],
)
def test_damage_is_named_and_never_answered(file: str, content: bytes, store: PersonalStore, tmp_path: Path) -> None:
    put(store, "ann", 1)
    (path,) = (tmp_path / "personal").rglob(file)
    path.write_bytes(content)
    with pytest.raises(DeviceError, match=rf"{file} is damaged; delete the personal adapter"):
        store.standing("ann")
        store.get("ann", 1)


def test_another_names_record_is_damage(store: PersonalStore, tmp_path: Path) -> None:
    put(store, "ann", 1)
    (path,) = (tmp_path / "personal").rglob("1.json")
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "name": "bob"}))
    with pytest.raises(DeviceError, match="is damaged"):
        store.get("ann", 1)


def test_bytes_of_the_right_digest_that_are_no_tensors_are_damage(store: PersonalStore, tmp_path: Path) -> None:
    put(store, "ann", 1)
    (weights,), (record,) = ((tmp_path / "personal").rglob(name) for name in ("1.safetensors", "1.json"))
    weights.write_bytes(b"nothing")
    told = json.loads(record.read_text())
    record.write_text(json.dumps({**told, "weights_digest": sha256_hex(b"nothing")}))
    with pytest.raises(DeviceError, match="is damaged"):
        store.get("ann", 1)


def test_a_disk_that_refuses_is_one_clear_error(store: PersonalStore, tmp_path: Path) -> None:
    (tmp_path / "personal").write_text("a file where the folder should be")
    with pytest.raises(DeviceError, match=r"cannot write 1\.safetensors: .*check that the state folder exists"):
        put(store, "ann", 1)


def test_forgetting_leaves_nothing_and_others_alone(store: PersonalStore, tmp_path: Path) -> None:
    put(store, "ann", 1)
    put(store, "bob", 1)
    store.forget("ann")
    store.forget("ann")
    assert store.names() == ["bob"]
    assert store.standing("ann") is None


def test_a_record_keeps_its_spec(store: PersonalStore) -> None:
    record = replace(version("ann", 1), spec=replace(SPEC, peft_type="ia3", trained=("v",)))
    store.put(record, tensors(1))
    assert store.get("ann", 1)[0].spec.trained == ("v",)
