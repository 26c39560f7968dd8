"""The client's own memory: two rounds, any name, atomic writes, a counter that only grows."""

import os
from pathlib import Path

import pytest

from federated.errors import DataError
from federated.flower.client_store import ClientStore


def make(root: Path, run_id: str = "run", client_id: str = "clinic") -> ClientStore:
    return ClientStore(root, run_id=run_id, client_id=client_id)


def rounds(store: ClientStore) -> set[str]:
    return {path.name for path in store.folder.iterdir() if path.is_dir()}


def test_what_was_put_is_there_for_another_process(tmp_path: Path) -> None:
    make(tmp_path).put(3, "answer", b"\x00bytes")
    assert make(tmp_path).get(3, "answer") == b"\x00bytes"


def test_nothing_is_none(tmp_path: Path) -> None:
    store = make(tmp_path)
    assert store.get(1, "answer") is None
    store.put(1, "other", b"")
    assert store.get(1, "answer") is None
    assert store.get(1, "other") == b""


def test_putting_again_replaces(tmp_path: Path) -> None:
    store = make(tmp_path)
    store.put(1, "answer", b"first")
    store.put(1, "answer", b"second")
    assert store.get(1, "answer") == b"second"


def test_two_rounds_are_kept(tmp_path: Path) -> None:
    store = make(tmp_path)
    for number in range(1, 6):
        store.put(number, "answer", b"x")
    assert rounds(store) == {"4", "5"}


def test_a_client_that_was_left_out_for_long_keeps_its_own_last_two_rounds(tmp_path: Path) -> None:
    store = make(tmp_path)
    store.put(1, "answer", b"x")
    store.put(2, "answer", b"x")
    store.put(40, "answer", b"x")
    assert rounds(store) == {"2", "40"}


def test_the_latest_entry_of_a_key(tmp_path: Path) -> None:
    store = make(tmp_path)
    assert store.latest("kept") is None
    store.put(9, "kept", b"nine")
    store.put(10, "other", b"x")
    assert store.latest("kept") == b"nine"
    store.put(10, "kept", b"ten")
    assert store.latest("kept") == b"ten"
    assert store.latest("nothing") is None


def test_rounds_that_are_done_again_replace_what_came_after_them(tmp_path: Path) -> None:
    """Rounds 3 to 6 missed their quorum and were never published: the resumed run starts at 3 once more."""
    store = make(tmp_path)
    for number in (1, 3, 4, 5, 6):
        store.put(number, "kept", str(number).encode())
    store.put(3, "kept", b"again")
    assert (rounds(store), store.latest("kept")) == ({"3"}, b"again")
    store.put(4, "kept", b"again")
    assert rounds(store) == {"3", "4"}


def test_an_entry_that_cannot_be_read_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(tmp_path)
    store.put(1, "kept", b"x")

    def refuses(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuses)
    for read in (lambda: store.get(1, "kept"), lambda: store.latest("kept")):
        with pytest.raises(DataError, match=r"cannot read the client's store in .*: Permission denied"):
            read()


def test_forgetting_leaves_the_counter(tmp_path: Path) -> None:
    store = make(tmp_path)
    assert store.next_counter() == 1
    for number in range(1, 6):
        store.put(number, "answer", b"x")
    assert store.next_counter() == 2


def test_the_counter_grows_across_restarts_and_is_each_run_s_own(tmp_path: Path) -> None:
    assert [make(tmp_path).next_counter() for _ in range(3)] == [1, 2, 3]
    assert make(tmp_path, run_id="other").next_counter() == 1
    assert make(tmp_path, client_id="other").next_counter() == 1


ODD_NAMES = [
    "../x",
    "/etc/passwd",
    "..",
    "",
    ".",
    "a/b",
    "a\\b",
    "x" * 5000,
    "Klinik Nürnberg 病院 🙂",
    "nul\0byte",
    "a\nb",
]


@pytest.mark.parametrize("name", ODD_NAMES, ids=lambda name: repr(name[:12]))
def test_any_name_is_safe_as_a_path(tmp_path: Path, name: str) -> None:
    root = tmp_path / "stores"
    for store in (make(root, client_id=name), make(root, run_id=name)):
        store.put(1, "answer", b"x")
        assert store.get(1, "answer") == b"x"
        assert store.folder.parent == root
        assert store.folder.name.isalnum()
    assert [path.name for path in tmp_path.iterdir()] == ["stores"]


def test_every_name_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = {make(tmp_path, client_id=name).folder for name in ODD_NAMES}
    assert len(folders) == len(ODD_NAMES)


def test_run_and_client_cannot_be_shifted_into_each_other(tmp_path: Path) -> None:
    assert make(tmp_path, "run-a", "b").folder != make(tmp_path, "run-", "ab").folder


def test_a_half_written_entry_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(tmp_path)
    store.put(1, "answer", b"old")

    def dies(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", dies)
    with pytest.raises(DataError, match="No space left on device"):
        store.put(1, "answer", b"new and longer")
    assert store.get(1, "answer") == b"old"


def test_a_disk_that_refuses_is_a_data_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    store = make(blocked)
    with pytest.raises(DataError, match="cannot write the client's store"):
        store.put(1, "answer", b"x")
    with pytest.raises(DataError, match="cannot write the client's store"):
        store.next_counter()


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"counter": "many"}', '{"count": 1}', '{"counter": null}'])
def test_a_damaged_counter_is_named_and_not_restarted(tmp_path: Path, text: str) -> None:
    store = make(tmp_path)
    store.next_counter()
    (store.folder / "counter.json").write_text(text)
    with pytest.raises(DataError, match=r"counter\.json is damaged; remove .* to leave this run"):
        store.next_counter()
    assert (store.folder / "counter.json").read_text() == text


def test_no_temporary_file_stays(tmp_path: Path) -> None:
    store = make(tmp_path)
    store.put(1, "answer", b"x")
    store.next_counter()
    names = {name for _, _, files in os.walk(tmp_path) for name in files}
    assert names == {"answer", "counter.json"}
