"""Registries that do not fit, are damaged or not there, and versions that nobody published."""

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

Refused = Callable[..., str]
ROOT = Path(__file__).resolve().parents[2]
LLAMA = ("experiment=tiny", "model=tiny_llama", "task=causal_lm", "rounds=1", "tracking.progress=false")


@pytest.mark.parametrize("command", ["simulate", "train"])
def test_registry_of_another_base(refused: Refused, versions: Path, command: str) -> None:
    line = refused(command, f"--app={ROOT}", *LLAMA, f"registry={versions}")
    assert line.startswith(f"registry {versions} holds versions of base model ")
    assert line.endswith("use that base model, or another registry")


@pytest.fixture
def copy(fedpeft: object, published: Path) -> Path:
    """A registry that a test may damage."""
    return Path(shutil.copytree(published / "registry", "copy"))


def _blobs(registry: Path) -> list[Path]:
    return [path for path in (registry / "blobs").rglob("*") if path.is_file()]


def _damage(registry: Path) -> None:
    for path in _blobs(registry):
        path.chmod(0o600)
        path.write_bytes(path.read_bytes()[:-1] + b"?")


def test_corrupt_blob_is_not_served(refused: Refused, copy: Path) -> None:
    _damage(copy)
    line = refused("device", "try", "--text", "hello", "--registry", copy)
    assert "is damaged: its SHA-256 is" in line


def test_lost_blob_is_not_served(refused: Refused, copy: Path) -> None:
    for path in _blobs(copy):
        path.unlink()
    assert " is missing (expected " in refused("device", "try", "--text", "hello", "--registry", copy)


def test_record_of_a_corrupt_blob_can_still_be_shown(fedpeft: Callable[..., object], copy: Path) -> None:
    _damage(copy)
    assert fedpeft("registry", "show", "v1", "--registry", copy).code == 0


def test_null_adapter_answers_beside_a_corrupt_blob(fedpeft: Callable[..., object], copy: Path) -> None:
    _damage(copy)
    assert fedpeft("device", "try", "--text", "hello", "--version", "null", "--registry", copy).code == 0


@pytest.mark.parametrize(
    "command", [("registry", "list"), ("registry", "show", "v1"), ("device", "try", "--text", "x")]
)
def test_file_that_is_no_database(refused: Refused, command: tuple[str, ...]) -> None:
    Path("wrong").mkdir()
    Path("wrong", "registry.db").write_bytes(b"this is no database" * 100)
    assert "the file is no SQLite database" in refused(*command, "--registry", "wrong")


def test_simulation_into_a_file_that_is_no_database(refused: Refused) -> None:
    Path("wrong").mkdir()
    Path("wrong", "registry.db").write_bytes(b"this is no database" * 100)
    line = refused("simulate", f"--app={ROOT}", *LLAMA, "registry=wrong")
    assert "the file is no SQLite database" in line
    assert Path("wrong", "registry.db").read_bytes() == b"this is no database" * 100


@pytest.mark.parametrize("version", ["v9", "stable", "deadbeef"])
@pytest.mark.parametrize("command", [("registry", "show"), ("device", "try", "--text", "x", "--version")])
def test_version_that_nobody_published(
    refused: Refused, versions: Path, command: tuple[str, ...], version: str
) -> None:
    assert version in refused(*command, version, "--registry", versions)


@pytest.mark.parametrize("command", [("registry", "list"), ("registry", "lineage"), ("device", "try", "--text", "x")])
def test_registry_that_is_not_there(refused: Refused, command: tuple[str, ...]) -> None:
    assert refused(*command, "--registry", "nowhere").startswith("there is no registry at ")
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("command", [("registry", "list"), ("device", "try", "--text", "x")])
def test_no_registry_at_all(refused: Refused, command: tuple[str, ...]) -> None:
    assert "run a simulation here first, pass --registry PATH" in refused(*command)


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_report_of_a_folder_without_a_run(refused: Refused, folder: str) -> None:
    Path("empty").mkdir()
    assert refused("report", folder).startswith(f"cannot read {folder}/metrics.jsonl")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ("channel", "promote", "v1", "--to", "stabel"),
            "there is no channel 'stabel'; expected one of canary, dev, stable",
        ),
        (("channel", "promote", "v1", "--to", "../up"), "is no channel name"),
        (("channel", "promote", "v1", "--to", "/etc", "--expect", "nothing"), "is no channel name"),
        (("channel", "promote", "../../etc", "--to", "stable"), "no version is named '../../etc'"),
        (("channel", "promote", "v1", "--to", "dev", "--expect", "v0"), "moved meanwhile"),
        (("channel", "rollback", "stable"), "points at nothing yet"),
        (("channel", "rollback", "nowhere"), "there is no channel 'nowhere'"),
        (("channel", "require", "dev", "--approvals", "2"), "runs move it by themselves"),
        (("channel", "require", "stable", "--approvals", "-1"), "expected 0 to 100"),
        (("approve", "v1", "--for", "stabel", "--as", "Ann"), "there is no channel 'stabel'"),
        (("approve", "v1", "--for", "stable", "--as", " "), "1 to 200 printable characters"),
        (("registry", "tag", "v1", "../up"), "is no tag"),
        (("registry", "tag", "v1", "dev"), "is a channel"),
        (("registry", "tag", "--remove", "nothing"), "there is no tag 'nothing'"),
        (("registry", "show", "/etc/passwd"), "no version is named '/etc/passwd'"),
        (("registry", "diff", "v0", "v9"), "has no v9"),
        (("registry", "export", "v1", "--to", "."), "not an empty folder"),
        (("registry", "import", "nowhere"), "is missing"),
        (("audit", "verify", "--head", "latest"), "expected NUMBER:DIGEST"),
        (("audit", "verify", "--head", f"99:{'a' * 64}"), "tampered with at row"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_done_is_one_clear_error(
    refused: Refused, versions: Path, command: tuple[str, ...], message: str
) -> None:
    Path("here").touch()
    assert message in refused(*command, "--registry", versions)


def test_rotten_blob_and_edited_manifest_are_named(refused: Refused, copy: Path) -> None:
    _damage(copy)
    assert "faults; what is named above" in refused("registry", "verify", "--registry", copy)
    assert "is damaged: its SHA-256 is" in refused("registry", "export", "v1", "--to", "out", "--registry", copy)


def test_manifest_edited_by_hand(refused: Refused, copy: Path) -> None:
    raw = sqlite3.connect(copy / "registry.db")
    raw.execute("UPDATE registry_versions SET manifest = replace(manifest, 'fedit', 'fedex')")
    raw.commit()
    raw.close()
    for command in (("registry", "show", "v1"), ("registry", "list"), ("channel", "promote", "v1", "--to", "stable")):
        assert "was changed: its SHA-256 is" in refused(*command, "--registry", copy)


def test_newer_schema(refused: Refused, copy: Path) -> None:
    raw = sqlite3.connect(copy / "registry.db")
    raw.execute("UPDATE registry_schema SET version_num = '9999'")
    raw.commit()
    raw.close()
    assert "has schema 9999, newer than this library's" in refused("channel", "list", "--registry", copy)


def test_pickled_peft_folder(refused: Refused, versions: Path) -> None:
    Path("peft").mkdir()
    Path("peft", "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    Path("peft", "adapter_model.bin").write_bytes(b"\x80\x04N.")
    line = refused("registry", "import", "peft", f"--app={ROOT}", "--registry", versions)
    assert "only pickled weights (adapter_model.bin), which can run code" in line
