"""`fedpeft assets`: fetch and list."""

import hashlib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from federated.cli import assets as cli
from federated.data.assets import Asset
from federated.data.fetching import Carrier
from federated.errors import DataError

PLAIN = b"plain"
DIGEST = hashlib.sha256(PLAIN).hexdigest()


def toy(name: str, *, gguf: bool = False) -> Asset:
    carrier = Carrier(f"{name}==1.0", DIGEST, len(PLAIN), is_file=True)
    return Asset(name, f"the {name}", "none", {f"{name}.bin": DIGEST}, (carrier,), gguf=gguf)


@pytest.fixture(autouse=True)
def _toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {name: toy(name, gguf=name == "smollm2") for name in ("minilm", "airlines", "smollm2")}
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path))
    monkeypatch.setattr(cli, "ASSETS", table)

    def download(carrier: Carrier, folder: Path, on_bytes: object) -> Path:
        on_bytes(3)
        (folder / "archive").write_bytes(PLAIN)
        return folder / "archive"

    real = cli.fetch
    monkeypatch.setattr(cli, "fetch", lambda names, report: real(names, assets=table, download=download, report=report))


def here(tmp_path: Path) -> set[str]:
    return {path.name for path in tmp_path.glob("*/*.bin")}


def test_fetch_without_names_brings_what_the_demo_needs(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["fetch"])
    assert result.exit_code == 0
    assert here(tmp_path) == {"minilm.bin", "airlines.bin"}


def test_fetch_brings_what_is_named_and_says_where(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["fetch", "airlines"])
    assert here(tmp_path) == {"airlines.bin"}
    assert str(tmp_path) in result.output


def test_fetch_says_that_gguf_is_converted_later() -> None:
    assert "converted once" in CliRunner().invoke(cli.app, ["fetch", "smollm2"]).output


def test_an_unknown_name_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["fetch", "airlines", "nope"])
    assert isinstance(result.exception, DataError)
    assert str(result.exception) == "no asset is called 'nope'; expected one of minilm, airlines, smollm2"
    assert here(tmp_path) == set()


def test_list_shows_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    CliRunner().invoke(cli.app, ["fetch", "airlines"])
    lines = CliRunner().invoke(cli.app, ["list"]).output.splitlines()
    shown = {name: line for line in lines for name in ("minilm", "airlines") if f" {name} " in line}
    assert " yes " in shown["airlines"]
    assert " no " in shown["minilm"]
