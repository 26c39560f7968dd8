"""The ``fedpeft`` command, run in this process on federations of a second."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from federated.cli import main

ROOT = Path(__file__).resolve().parents[3]
APP = f"--app={ROOT}"
QUICK = ("rounds=1", "train.steps=1", "engine.workers=1", "tracking.progress=false")
TINY = ("experiment=tiny", "data.partition.num_clients=2", *QUICK)


@dataclass(frozen=True)
class Done:
    """What a command left."""

    code: int
    out: str
    err: str


@contextmanager
def _clean(folder: Path) -> Iterator[pytest.MonkeyPatch]:
    """In a folder; what commands set for their children is put back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "200")
        for name in ("FEDPEFT_APP", "FEDPEFT_CLIENT_STORE", "FEDPEFT_REGISTRY"):
            patch.setenv(name, "")
            patch.delenv(name)
        yield patch


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The working directory of the commands of a test."""
    return tmp_path


@pytest.fixture
def fedpeft(here: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Done]]:
    """Runs ``fedpeft``; it must succeed unless told otherwise."""
    with _clean(here) as patch:

        def run(*arguments: object, code: int = 0) -> Done:
            patch.setattr(sys, "argv", ["fedpeft", *map(str, arguments)])
            capsys.readouterr()
            found = main._run()
            done = Done(found, *capsys.readouterr())
            assert found == code, done.err
            return done

        yield run


@pytest.fixture
def simulate(fedpeft: Callable[..., Done], here: Path) -> Callable[..., Path]:
    """Runs a quick federation and returns its folder."""

    def run(*overrides: str) -> Path:
        fedpeft("simulate", APP, *QUICK, *overrides, f"run_dir={here / 'run'}")
        return here / "run"

    return run


def _once(folder: Path, *arguments: str) -> Path:
    with _clean(folder) as patch:
        patch.setattr(sys, "argv", ["fedpeft", *arguments, f"run_dir={folder / 'run'}"])
        assert main._run() == 0
    return folder / "run"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished federation of two rounds."""
    return _once(tmp_path_factory.mktemp("finished"), "simulate", APP, *TINY, "rounds=2")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished central training."""
    return _once(tmp_path_factory.mktemp("trained"), "train", APP, *TINY)
