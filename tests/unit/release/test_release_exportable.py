"""An export is one folder, whole or not there, of a version with the base model that it belongs to."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from federated.config import TaskConfig
from federated.errors import BaseMismatch, ModelError, ReleaseError
from federated.release.exportable import Exportable, export

from .conftest import BASE, artefact_of


def subject(base_digest: str = BASE) -> Exportable:
    base: Any = SimpleNamespace(base_digest=base_digest, source="tiny:bert")
    return Exportable(artefact_of(b"weights"), base, TaskConfig())


def two_files(one: Exportable, folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "b.txt").write_text(one.manifest.run_id)
    (folder / "a.txt").touch()


def test_a_folder_and_what_is_in_it(tmp_path: Path) -> None:
    assert export(subject(), two_files, tmp_path / "new" / "out") == ("a.txt", "deep/b.txt")
    assert (tmp_path / "new" / "out" / "deep" / "b.txt").read_text() == "run-a"
    (tmp_path / "empty").mkdir()
    assert export(subject(), two_files, tmp_path / "empty") == ("a.txt", "deep/b.txt")


def test_what_a_format_refuses_leaves_nothing(tmp_path: Path) -> None:
    def refuse(one: Exportable, folder: Path) -> None:
        two_files(one, folder)
        raise ModelError("kind full cannot be said in this format")

    with pytest.raises(ModelError, match="kind full"):
        export(subject(), refuse, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_stays(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full" / "of").mkdir(parents=True)
    for name in ("file", "full"):
        with pytest.raises(ReleaseError, match="not an empty folder"):
            export(subject(), two_files, tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "of"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ReleaseError, match="cannot write the export"):
        export(subject(), two_files, tmp_path / "file" / "out")


def test_another_base_is_refused() -> None:
    with pytest.raises(BaseMismatch, match="belongs to the base model bbbbbbbbbbbb, but tiny:bert is cccccccccccc"):
        subject("c" * 64)
