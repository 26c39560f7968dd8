"""The house's own rules: light imports, declared names, sizes and words. Import-linter holds the layers."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import federated

ROOT = Path(federated.__file__).parent
SOURCES = sorted(path for path in ROOT.rglob("*.py") if "migrations" not in path.parts)
NAMES = [path.relative_to(ROOT.parent).as_posix() for path in SOURCES]
MODULES = [
    name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for name in NAMES
    if not Path(name).name.startswith("_") or name.endswith("__init__.py")
]
HEAVY = ("flwr", "ray", "opacus", "tuf", "transformers", "peft", "torch")
LONGEST = 400  # lines; most modules have fewer than 250

_BLOCK = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked here")
sys.meta_path.insert(0, Blocked())
"""


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_of_the_library_is_light() -> None:
    loaded = _python("import sys, federated; print(*{name.partition('.')[0] for name in sys.modules})").split()
    assert set(HEAVY) & set(loaded) == set()


@pytest.mark.parametrize(
    "module",
    [
        "errors",
        "manifest",
        "config",
        "wire",
        "tracking",
        "release",
        "release.export_peft",
        "release.seal",
        "device.slots",
    ],
)
def test_imports_without_torch_and_database(module: str) -> None:
    _python(_BLOCK.format(blocked=("torch", "sqlalchemy", "alembic")) + f"import federated.{module}")


def test_registry_imports_without_torch() -> None:
    _python(_BLOCK.format(blocked=("torch", "transformers", "peft", "flwr")) + "import federated.registry")


def test_block_blocks() -> None:
    with pytest.raises(AssertionError, match="torch is blocked here"):
        _python(_BLOCK.format(blocked=("torch",)) + "import torch")


def test_cli_answers_without_heavy_imports() -> None:
    code = "import sys, federated.cli.main; print(*{name.partition('.')[0] for name in sys.modules})"
    assert {"torch", "transformers", "peft", "ray"} & set(_python(code).split()) == set()


@pytest.mark.parametrize("name", MODULES)
def test_module_declares_its_names(name: str) -> None:
    module = importlib.import_module(name)
    declared = list(module.__all__)
    assert len(declared) == len(set(declared))
    assert [item for item in declared if not hasattr(module, item)] == []


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_module_is_documented_and_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "no docstring"
    assert len(text.splitlines()) <= LONGEST


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_module_validates_without_assert_and_pickle(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)] == []
    imported = {
        alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    assert imported & {"pickle", "marshal", "shelve", "dill", "cloudpickle"} == set()


def test_packages_mark_their_types() -> None:
    assert (ROOT / "py.typed").exists()
    assert [str(path) for path in ROOT.rglob("*") if path.is_dir() and not _is_room(path)] == []


def _is_room(path: Path) -> bool:
    """A folder with Python files must be a package; other folders hold data."""
    return not any(path.glob("*.py")) or (path / "__init__.py").exists() or "migrations" in path.parts
