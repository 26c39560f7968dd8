"""``fedpeft device try`` against a registry on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from federated.cli.device import app
from federated.device import NULL, open_runtime
from federated.errors import RegistryError, VersionNotFound
from federated.registry import Registry

Make = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def versions(recipe: Make, real_version: Make) -> list[Any]:
    first = real_version(recipe(), 1)
    return [first, real_version(recipe(), 2, parent=first.version_id)]


@pytest.fixture
def registry(tmp_path: Path, versions: list[Any]) -> Path:
    with Registry.open(tmp_path / "registry") as store:
        for version in versions:
            store.publish(version.manifest, version.weights, channel="stable")
    return tmp_path / "registry"


def ask(registry: Path, *options: str) -> Result:
    arguments = ["try", "--registry", str(registry), *options]
    return CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "100"})


@pytest.mark.parametrize(("name", "index"), [("v1", 0), ("v2", 1), ("latest", 1), ("stable", 1)])
def test_a_version_answers(registry: Path, versions: list[Any], name: str, index: int) -> None:
    version = versions[index]
    runtime = open_runtime(version.manifest)
    expected = runtime.predict([{"text": "late again"}], digest=version.install(runtime).digest).predictions[0]
    done = ask(registry, "--text", "late again", "--version", name)
    assert done.exit_code == 0
    assert f"Answers of v{index + 1}" in done.output
    assert [cell.strip() for cell in _row(done, "late again")] == [
        "late again", expected.label, f"{expected.probability:.3f}"
    ]  # fmt: skip
    assert f"v{index + 1} ({version.digest[:12]}) activated in" in done.output


def test_the_null_adapter_answers(registry: Path, versions: list[Any]) -> None:
    expected = open_runtime(versions[0].manifest).predict([{"text": "hi"}], digest=NULL).predictions[0]
    done = ask(registry, "--text", "hi", "--version", "null")
    assert _row(done, "hi")[1].strip() == expected.label
    assert "null (null) activated in" in done.output


@pytest.mark.parametrize("name", ["v2", "null"])
def test_an_exported_base_answers_as_torch_does(
    registry: Path, versions: list[Any], onnx_base: Make, name: str
) -> None:
    folder = onnx_base(versions[1].manifest)
    torch, found = (ask(registry, "--text", "hi", "--version", name, *more) for more in ((), ("--onnx", str(folder))))
    assert _row(found, "hi") == _row(torch, "hi")


def test_several_texts_are_shown_as_they_are(registry: Path) -> None:
    done = ask(registry, "--text", "[red]markup[/red]", "--text", "line\nbreak \x1b[2Jclear")
    assert "[red]markup[/red]" in done.output
    assert "line break  [2Jclear" in done.output


def test_an_unknown_version_is_an_error_for_the_caller(registry: Path) -> None:
    with pytest.raises(VersionNotFound, match="v9"):
        ask(registry, "--text", "hi", "--version", "v9")


def test_a_missing_registry_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(RegistryError):
        ask(tmp_path / "nowhere", "--text", "hi")
    assert not (tmp_path / "nowhere").exists()


def test_a_text_is_required(registry: Path) -> None:
    assert ask(registry).exit_code == 2


def _row(done: Result, beginning: str) -> list[str]:
    line = next(line for line in done.output.splitlines() if line.strip("│ ").startswith(beginning))
    return line.strip("│ ").split("│")
