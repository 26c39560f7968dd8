"""Files that are whole or not there."""

import os
import stat
from pathlib import Path

import pytest

from federated.files import write_new, write_whole


def test_a_new_file_is_written(tmp_path: Path) -> None:
    write_new(tmp_path / "a", b"one", mode=0o600)
    assert (tmp_path / "a").read_bytes() == b"one"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"one"


def test_a_link_to_nowhere_is_something_too(tmp_path: Path) -> None:
    """Following it would write where somebody else chose."""
    (tmp_path / "a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "a", b"two")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("write", [write_new, write_whole])
def test_nothing_else_is_left(tmp_path: Path, write: object) -> None:
    assert callable(write)
    write(tmp_path / "a", b"one")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_new(tmp_path / "a", b"one")
    assert not list(tmp_path.iterdir())
