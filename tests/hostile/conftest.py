"""The command line under bad input: run it here, in this process, and insist on one clear line."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from federated.cli import main
from federated.registry import Registry

ROOT = Path(__file__).resolve().parents[2]
APP = f"--app={ROOT}"
TINY = (
    "experiment=tiny",
    "rounds=1",
    "train.steps=1",
    "data.partition.num_clients=2",
    "engine.workers=1",
    "tracking.progress=false",
)


@dataclass(frozen=True)
class Done:
    """What a command left."""

    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def fedpeft(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> Command:
    """Runs ``fedpeft`` in an empty working directory."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    for name in ("FEDPEFT_APP", "FEDPEFT_CLIENT_STORE"):  # commands set these for their children: put them back
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.delenv("FEDPEFT_REGISTRY", raising=False)

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["fedpeft", *map(str, arguments)])
        capsys.readouterr()
        code = main._run()
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of one round."""
    folder = tmp_path_factory.mktemp("published") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FEDPEFT_APP", "FEDPEFT_CLIENT_STORE"):
            patch.setenv(name, "")
        patch.setattr(sys, "argv", ["fedpeft", "simulate", APP, *TINY, f"run_dir={folder}"])
        assert main._run() == 0
    return folder


@pytest.fixture
def versions(published: Path) -> Iterator[Path]:
    """A registry of two versions, which must be what it was when the test is over."""
    folder = published / "registry"
    before = _contents(folder)
    yield folder
    assert _contents(folder) == before


def _contents(folder: Path) -> list[tuple[str, bytes]]:
    with Registry.open(folder, create=False) as registry:
        assert registry.verify() == []
        return [(record.version_id, registry.weights(record.version_id)) for record in registry.versions()]


@pytest.fixture
def refused(fedpeft: Command) -> Callable[..., str]:
    """Runs a command that must fail with exactly one line on stderr; returns that line."""

    def run(*arguments: object, code: int = 1) -> str:
        done = fedpeft(*arguments)
        lines = done.err.splitlines()
        assert (done.code, len(lines)) == (code, 1), done.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in done.out
        return lines[0].removeprefix("error: ")

    return run


@pytest.fixture
def simulate_refused(refused: Callable[..., str], versions: Path) -> Callable[..., str]:
    """The same for a tiny federation that would publish into a registry; the registry must stay as it is."""

    def run(*overrides: str, code: int = 1) -> str:
        return refused("simulate", APP, *TINY, f"registry={versions}", *overrides, code=code)

    return run
