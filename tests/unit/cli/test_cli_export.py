"""``fedpeft registry export --as FORMAT``, on the versions of a finished federation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from federated.cli import export_formats
from federated.manifest import canonical_json
from federated.release import pem
from federated.release.exportable import Exportable

from .conftest import APP


def _manifest(subject: Exportable, folder: Path) -> None:
    assert subject.base.source.startswith("tiny:")
    (folder / "manifest.json").write_bytes(canonical_json(subject.manifest.to_dict()))


@pytest.fixture
def export(fedpeft: Callable[..., Any], finished: Path) -> Callable[..., Any]:
    def run(*arguments: object, code: int = 0) -> Any:
        return fedpeft("registry", "export", "v2", "--registry", finished / "registry", *arguments, code=code)

    return run


@pytest.fixture
def one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(export_formats.EXPORTERS, "manifest", lambda: _manifest)


def test_a_lineage_is_the_default(export: Callable[..., Any], here: Path) -> None:
    assert "and 2 ancestors" in export("--to", here / "out").out
    assert "and 2 ancestors" in export("--to", here / "again", "--as", "lineage").out
    assert (here / "out" / "lineage.json").is_file()


@pytest.mark.usefixtures("one_more")
def test_a_format_gets_the_version_and_its_base(export: Callable[..., Any], here: Path) -> None:
    out = export("--to", here / "out", "--as", "manifest").out
    assert "as manifest: manifest.json" in out
    assert (here / "out" / "manifest.json").is_file()


@pytest.mark.usefixtures("one_more")
def test_another_base_is_refused(export: Callable[..., Any], here: Path) -> None:
    error = export("--to", here / "out", "--as", "manifest", "--base", "tiny:gpt2", code=1).err
    assert "belongs to the base model" in error
    assert not (here / "out").exists()


def test_a_format_that_there_is_not(export: Callable[..., Any], here: Path) -> None:
    error = export("--to", here / "out", "--as", "tflite", code=2).err
    assert f"--as tflite: no such format; expected one of {export_formats.format_names()}" in " ".join(error.split())


def test_a_lineage_needs_no_base(export: Callable[..., Any], here: Path) -> None:
    assert "a lineage needs no base model" in export("--to", here / "out", "--base", "tiny:bert", code=2).err


def test_a_peft_folder_comes_back_as_a_version(
    export: Callable[..., Any], fedpeft: Callable[..., Any], here: Path
) -> None:
    out = export("--to", here / "out", "--as", "peft", "--base-name", "org/tiny").out
    assert "as peft: README.md, adapter_config.json, adapter_model.safetensors" in " ".join(out.split())
    fedpeft("registry", "init", here / "other")
    overrides = ("experiment=tiny", f"--registry={here / 'other'}", APP)
    assert "and 0 ancestors" in fedpeft("registry", "import", here / "out", *overrides).out


@pytest.fixture
def sealing(fedpeft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in keys/seal."""
    monkeypatch.setattr(pem, "COST", 2)
    monkeypatch.setenv("FEDPEFT_PASSPHRASE", "correct")
    assert "give keys/seal/seal.pub.pem to those" in fedpeft("release", "keys", "make", "seal").out.replace("\n", " ")


@pytest.mark.usefixtures("one_more", "sealing")
@pytest.mark.parametrize("format_", ["manifest", "lineage"])
def test_a_sealed_export_is_checked(
    export: Callable[..., Any], fedpeft: Callable[..., Any], here: Path, format_: str
) -> None:
    export("--to", here / "out", "--as", format_, "--seal", "seal")
    check = ("release", "check-seal", here / "out", "--public", here / "keys" / "seal" / "seal.pub.pem")
    out = fedpeft(*check).out
    for said in ("version: ", "base digest: ", "round: 2 of tiny-", "method: fedit + sgd", "privacy: not accounted"):
        assert said in out
    (here / "out" / "more.txt").touch()
    assert "refused, WrongContent" in fedpeft(*check, code=1).err


@pytest.mark.usefixtures("one_more", "sealing")
def test_a_key_in_a_file_seals(export: Callable[..., Any], here: Path) -> None:
    (here / "mine").write_bytes((here / "keys" / "seal" / "seal.pem").read_bytes())
    export("--to", here / "out", "--as", "manifest", "--seal", here / "mine")
    assert (here / "out" / "model.sig").is_file()


@pytest.mark.usefixtures("one_more", "sealing")
def test_keys_that_do_not_seal_leave_no_folder(
    export: Callable[..., Any], fedpeft: Callable[..., Any], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "there is no key other" in export("--to", here / "out", "--as", "manifest", "--seal", "other", code=1).err
    monkeypatch.setenv("FEDPEFT_PASSPHRASE", "wrong")
    assert "does not open" in export("--to", here / "out", "--seal", "seal", code=1).err
    assert not (here / "out").exists()
    assert "names no key" in fedpeft("release", "keys", "make", "../up", code=2).err
    missing = ("release", "check-seal", here, "--public", here / "nothing.pem")
    assert "cannot read the public key" in fedpeft(*missing, code=1).err
