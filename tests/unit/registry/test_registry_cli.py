import os

import pytest
from typer.testing import CliRunner

from federated.cli.registry import app
from federated.errors import RegistryError

PRIVACY = {
    "accounts": [
        {
            "unit": "client",
            "epsilon": 3.0,
            "target_delta": 1e-5,
            "accountant": "rdp",
            "private": True,
            "not_protected": [],
        }
    ]
}


@pytest.fixture
def invoke(monkeypatch):
    monkeypatch.delenv("FEDPEFT_REGISTRY", raising=False)

    def run(*arguments, ok=True):
        result = CliRunner().invoke(app, list(arguments))
        assert (result.exception is None) is ok, result.output
        return result

    return run


@pytest.fixture
def filled(registry, publish, location):
    first = publish(b"one", channel="dev", task={"name": "sensor"})
    publish(b"two", round_number=1, parent=first, metrics={"train_loss": 0.123456, "steps": 5})
    registry.close()
    return str(location)


def test_list_is_newest_first(invoke, filled):
    lines = invoke("list", "--registry", filled).stdout.splitlines()
    rows = [line for line in lines if "│ v" in line]
    assert [row.split()[1] for row in rows] == ["v1", "v0"]
    assert "steps 5, train_loss 0.1235" in rows[0]
    assert "dev" in rows[1]


def test_show_gives_whole_digests(invoke, filled):
    output = invoke("show", "v1", "--registry", filled).stdout
    assert "b" * 64 in output
    assert '"train_loss": 0.123456' in output


def test_show_says_what_privacy_was_spent(invoke, registry, publish, location):
    publish(b"one", privacy=PRIVACY, servable=False, code_version="0.1.0")
    registry.close()
    assert '"epsilon": 3.0' in invoke("show", "latest", "--registry", str(location)).stdout


def test_lineage_of_a_version(invoke, filled):
    rows = [
        line.split()[1] for line in invoke("lineage", "v1", "--registry", filled).stdout.splitlines() if "│ v" in line
    ]
    assert rows == ["v1", "v0"]


def test_channels(invoke, filled):
    assert "│ dev     │ v0" in invoke("channels", "--registry", filled).stdout


def test_markup_and_control_characters_are_shown_not_obeyed(invoke, registry, publish, location):
    publish(b"one", method="[red]\x1b[31mx")
    registry.close()
    assert "[red]\\x1b[31mx" in invoke("list", "--registry", str(location)).stdout


def test_environment_names_the_registry_and_stderr_says_so(invoke, filled, monkeypatch):
    monkeypatch.setenv("FEDPEFT_REGISTRY", filled)
    assert f"registry: {filled} (from FEDPEFT_REGISTRY)" in invoke("list").stderr


def test_newest_below_runs_is_taken(invoke, filled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, place in enumerate(["runs/a/registry", "runs/b/c/registry"]):
        (tmp_path / place).mkdir(parents=True)
        file = tmp_path / place / "registry.db"
        file.write_bytes((tmp_path / "registry" / "registry.db").read_bytes())
        os.utime(file, (1000 + number, 1000 + number))
    assert "runs/b/c/registry (the newest one in runs/)" in invoke("list").stderr


def test_none_at_all_says_what_to_do(invoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = invoke("list", ok=False).exception
    assert isinstance(error, RegistryError)
    assert "pass --registry PATH" in str(error)


def test_url_takes_its_blobs(invoke, filled):
    assert "v1" in invoke("list", "--registry", f"sqlite:///{filled}/registry.db", "--blobs", f"{filled}/blobs").stdout


def test_output_of_a_terminal_keeps_its_width(invoke, filled, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    assert "dev" in invoke("channels", "--registry", filled).stdout
