"""What users install is the wheel: it is built, looked into, installed and used from another folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def _run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**environment, "COLUMNS": "120", "TERM": "dumb"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; its dependencies are borrowed from the running one."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    _run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    # A path that a .pth file adds is not searched for .pth files: the editable checkout stays out of sight.
    (site,) = (folder / "lib").glob("python*/site-packages")
    borrowed = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (site / "borrowed.pth").write_text("".join(f"{path}\n" for path in borrowed))
    return python


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The app folder, copied as a user would."""
    folder = tmp_path_factory.mktemp("app")
    for name in ("conf", "clients", "strategies"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_wheel_holds_the_library_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"federated", "federated_peft"}
    assert [name for name in names if "__pycache__" in name] == []


@pytest.mark.parametrize(
    "pattern",
    [
        "federated/py.typed",
        "federated/templates/report.html.j2",
        "federated/registry/migrations/env.py",
        "federated/registry/migrations/versions/*.py",
        "federated_peft-*.dist-info/licenses/LICENSE",
    ],
)
def test_wheel_holds(wheel: Path, pattern: str) -> None:
    assert [name for name in zipfile.ZipFile(wheel).namelist() if Path(name).match(pattern)]


def test_every_source_file_is_in_the_wheel(wheel: Path) -> None:
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "federated").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sources - set(zipfile.ZipFile(wheel).namelist()) == set()


def test_wheel_is_what_gets_imported(python: Path, tmp_path: Path) -> None:
    found = _run(python, "-c", "import federated; print(federated.__file__)", cwd=tmp_path).strip()
    assert Path(found).is_relative_to(python.parents[1])


def test_command_answers_from_anywhere(python: Path, tmp_path: Path) -> None:
    assert "simulate" in _run(python.with_name("fedpeft"), "--help", cwd=tmp_path)


def test_a_federation_runs_from_the_wheel_with_a_copied_app(python: Path, app: Path, tmp_path: Path) -> None:
    fedpeft = python.with_name("fedpeft")
    _run(fedpeft, "simulate", "experiment=tiny", "rounds=1", "--app", app, cwd=tmp_path)
    (report,) = tmp_path.rglob("report.html")
    assert "completed" in report.read_text(encoding="utf-8")
