"""Flower's app bundle (FAB): `flwr build` makes it, and nodes are sent what it should hold and nothing else."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "fab"
DOCS = Path(__file__).resolve().parents[2] / "docs"
NOT_FOR_NODES = (
    "federated/__init__.py",
    "tests/integration/helper.py",
    "simulations/demo.py",
    "docs/index.md",
    "models/sotu-llama/config.json",
    "runs/tiny/config.yaml",
    ".cache/assets/config.json",
    ".venv/lib/python3.11/site-packages/somebody.py",
    "CONTRIBUTING.md",
)


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fab_golden_make", GOLDEN / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bundle(make: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the app's own files alone."""
    folder = tmp_path_factory.mktemp("bare") / "federated-peft"
    folder.mkdir()
    make.copy_app(folder)
    path: Path = make.build(folder, home=folder.parent / "home")
    return path


def test_bundle_holds_the_golden_list(make: ModuleType, bundle: Path) -> None:
    assert make.names(bundle) == (GOLDEN / "files.txt").read_text(encoding="utf-8").splitlines()


def test_bundle_holds_the_app_alone(make: ModuleType, bundle: Path) -> None:
    tops = {name.partition("/")[0] for name in make.names(bundle)}
    assert tops == {".info", "LICENSE", "README.md", "clients", "conf", "pyproject.toml", "strategies"}


def test_bundle_does_not_depend_on_what_else_is_in_the_checkout(make: ModuleType, bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "federated-peft"
    folder.mkdir()
    make.copy_app(folder)
    for name in NOT_FOR_NODES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}\n")
    assert make.build(folder, home=tmp_path / "home").read_bytes() == bundle.read_bytes()


def test_app_folder_of_the_docs_can_be_built(make: ModuleType, tmp_path: Path) -> None:
    page = (DOCS / "flower.md").read_text(encoding="utf-8")
    (settings,) = re.findall(r"^```toml\n(\[project\]\n.*?)^```", page, re.MULTILINE | re.DOTALL)
    folder = tmp_path / "my-app"
    folder.mkdir()
    make.copy_app(folder)
    (folder / "pyproject.toml").write_text(settings)
    for name in ("README.md", "LICENSE"):
        (folder / name).unlink()
    assert "strategies/app.py" in make.names(make.build(folder, home=tmp_path / "home"))
