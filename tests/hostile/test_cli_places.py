"""Run folders and registries on full disks, read-only disks and in impossible places; an engine that is not there."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from federated.registry import Registry

Refused = Callable[..., str]
ROOT = Path(__file__).resolve().parents[2]
TINY = ("experiment=tiny", "rounds=2", "train.steps=1", "data.partition.num_clients=2", "tracking.progress=false")
SIZE = 1024 * 1024
BLOCK = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root and mount(8)")
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"this machine does not let root mount a tmpfs: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, *, leave: int = 0) -> None:
    """Take all of the small disk but ``leave`` bytes, and never more than the small disk."""
    assert disk.is_mount()
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while file.tell() < 2 * SIZE:
                file.write(bytes(BLOCK))
        except OSError:
            pass
        file.truncate(file.tell() - leave)


def test_full_disk_for_the_run_folder(refused: Refused, disk: Path) -> None:
    fill(disk)
    line = refused("simulate", f"--app={ROOT}", *TINY, "engine.workers=1", f"run_dir={disk}/run", code=2)
    assert line == f"run_dir = {disk}/run: No space left on device; choose another with run_dir="


def test_disk_that_fills_up_during_a_run(fedpeft: Callable[..., object], disk: Path) -> None:
    fill(disk, leave=25 * BLOCK)
    done = fedpeft("simulate", f"--app={ROOT}", *TINY, "engine.workers=1", f"run_dir={disk}/run")
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert (done.code, len(errors)) == (1, 1)
    assert "is full" in errors[0]
    assert "Traceback" not in done.err


@pytest.mark.parametrize("command", ["simulate", "train"])
def test_full_disk_for_the_registry_loses_no_version(
    refused: Refused, published: Path, disk: Path, command: str
) -> None:
    shutil.copytree(published / "registry", disk / "registry")
    fill(disk)
    line = refused(command, f"--app={ROOT}", *TINY, f"registry={disk}/registry")
    assert "is full" in line
    assert "Everything published before is intact" in line
    with Registry.open(disk / "registry", create=False) as registry:
        assert registry.verify() == []
        assert [record.number for record in registry.versions()] == [0, 1]


def test_read_only_disk(refused: Refused, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    line = refused("simulate", f"--app={ROOT}", *TINY, f"run_dir={disk}/run", code=2)
    assert line == f"run_dir = {disk}/run: Read-only file system; choose another with run_dir="


def test_run_folder_below_a_file(refused: Refused) -> None:
    Path("file").touch()
    line = refused("simulate", f"--app={ROOT}", *TINY, "run_dir=file/run", code=2)
    assert line == f"run_dir = {Path('file/run').absolute()}: Not a directory; choose another with run_dir="


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_run_folder_in_somebody_else_s_folder(refused: Refused) -> None:
    Path("locked").mkdir(mode=0o500)
    assert "Permission denied" in refused("simulate", f"--app={ROOT}", *TINY, "run_dir=locked/run", code=2)


def test_ray_that_is_not_installed(refused: Refused, versions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else found(name, *rest))
    line = refused("simulate", f"--app={ROOT}", *TINY, "engine=ray", f"registry={versions}", code=2)
    assert line == "engine.name = 'ray': Ray is not installed; install federated-peft[ray] or use inprocess"


@pytest.mark.parametrize(
    ("arguments", "code"), [(("simulate", "adapter.rank=0"), 2), (("device", "try", "--text", "x"), 1)]
)
def test_a_real_process_says_one_line_too(tmp_path: Path, arguments: tuple[str, ...], code: int) -> None:
    command = [sys.executable, "-m", "federated.cli.main", *arguments, f"--app={ROOT}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (code, "", 1)
    assert done.stderr.startswith("error: ")
