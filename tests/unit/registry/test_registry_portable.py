"""A lineage as a folder: there and back again, and nothing that was touched on the way is let in."""

import json
import shutil

import numpy as np
import pytest

from federated.errors import BaseMismatch, CorruptBlob, RegistryError
from federated.manifest import RawTensor, canonical_json, sha256_hex
from federated.registry import Registry
from federated.wire import encode_tensors


def adapter(value):
    return encode_tensors({"a": RawTensor.from_array(np.full(3, value, np.float32))})


@pytest.fixture
def lineage(publish):
    """v0 to v2 of one run; v1 and v2 have equal weights."""
    ids = []
    for number, value in enumerate((0.0, 1.0, 1.0)):
        parent = ids[-1] if ids else None
        ids.append(publish(adapter(value), round_number=number, parent=parent, training_state=b"client-007 took part"))
    return ids


@pytest.fixture
def folder(registry, lineage, tmp_path):
    registry.export("v2", tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def other(tmp_path):
    with Registry.open(tmp_path / "other") as opened:
        yield opened


def test_there_and_back_again(registry, folder, other, lineage):
    records = other.import_folder(folder)
    assert [record.version_id for record in records] == lineage[::-1]
    assert [record.manifest for record in records] == [record.manifest for record in registry.lineage("v2")]
    assert other.weights("v2") == adapter(1.0)
    assert [entry.action for entry in other.audit.entries()] == ["init", "import", "import", "import"]
    assert other.channels() == {}
    assert other.verify() == []


def test_the_folder_holds_records_and_adapters_alone(folder, lineage):
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    weights = [f"weights/{sha256_hex(adapter(value))}.safetensors" for value in (0.0, 1.0)]
    assert set(files) == {"lineage.json", *weights, *(f"manifests/{one}.json" for one in lineage)}
    assert not any(b"client-007" in data for data in files.values())


def test_importing_again_changes_nothing(folder, other):
    other.import_folder(folder)
    before = other.audit.head()
    other.import_folder(folder)
    assert other.audit.head() == before


def test_a_lineage_that_grew_goes_on(registry, folder, other, lineage, publish, tmp_path):
    other.import_folder(folder)
    publish(adapter(2.0), round_number=3, parent=lineage[-1])
    registry.export("v3", tmp_path / "more")
    assert other.import_folder(tmp_path / "more")[0].number == 3
    assert len(other.versions()) == 4


def test_a_middle_version_is_exported_without_what_came_after(registry, lineage, other, tmp_path):
    registry.export("v1", tmp_path / "out")
    assert [record.number for record in other.import_folder(tmp_path / "out")] == [1, 0]


def test_a_folder_that_is_in_use_is_not_written_to(registry, lineage, folder, tmp_path):
    with pytest.raises(RegistryError, match="not an empty folder"):
        registry.export("v2", folder)
    (tmp_path / "file").touch()
    with pytest.raises(RegistryError, match="not an empty folder"):
        registry.export("v2", tmp_path / "file")


def test_an_empty_folder_will_do(registry, lineage, other, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RegistryError, match=r"lineage\.json is missing"):
        other.import_folder(tmp_path / "empty")


def test_damaged_bytes_are_not_exported(registry, lineage, location, tmp_path):
    digest = sha256_hex(adapter(0.0))
    (location / "blobs" / digest[:2] / digest).write_bytes(b"rot")
    with pytest.raises(CorruptBlob):
        registry.export("v2", tmp_path / "out")
    assert not (tmp_path / "out" / "lineage.json").exists()


def index(folder, **change):
    value = json.loads((folder / "lineage.json").read_bytes())
    (folder / "lineage.json").write_bytes(canonical_json(value | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "another 1"}, "does not say 'federated-peft lineage 1'"),
        ({"versions": "all"}, "with a list of versions"),
        ({"versions": ["../../../etc/passwd"]}, "64 hexadecimal"),
        ({"versions": ["/etc/passwd"]}, "64 hexadecimal"),
        ({"versions": [5]}, "64 hexadecimal"),
        ({"versions": []}, "names 0 versions"),
        ({"versions": ["a" * 64, "a" * 64]}, "of which 1 differ"),
        ({"versions": ["a" * 64]}, "is missing"),
    ],
)
def test_an_index_that_somebody_wrote_is_refused(folder, other, change, message):
    index(folder, **change)
    with pytest.raises(RegistryError, match=message):
        other.import_folder(folder)
    assert other.versions() == []


@pytest.mark.parametrize("data", [b"", b"[", b"[]", b"\xff", b"[" * 100_000])
def test_an_index_that_is_no_json_object_is_refused(folder, other, data):
    (folder / "lineage.json").write_bytes(data)
    with pytest.raises(RegistryError, match=r"lineage\.json"):
        other.import_folder(folder)


def test_a_lineage_without_its_beginning_is_refused(folder, other, lineage):
    index(folder, versions=lineage[1:])
    with pytest.raises(RegistryError, match="is not in this registry"):
        other.import_folder(folder)
    assert (other.versions(), len(other.audit.entries())) == ([], 1)


def first(folder, kind):
    return sorted((folder / kind).iterdir())[0]


@pytest.mark.parametrize("kind", ["manifests", "weights"])
def test_a_changed_file_is_refused(folder, other, kind):
    path = first(folder, kind)
    path.write_bytes(path.read_bytes().replace(b"a", b"b", 1))
    with pytest.raises(CorruptBlob, match="was changed"):
        other.import_folder(folder)
    assert other.versions() == []


@pytest.mark.parametrize("kind", ["manifests", "weights"])
def test_a_link_is_refused(folder, other, kind, tmp_path):
    path = first(folder, kind)
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RegistryError, match="is a link"):
        other.import_folder(folder)


def forge(folder, manifest_text, weights=None):
    """A folder of one version that somebody wrote, with the right names."""
    shutil.rmtree(folder)
    for name in ("manifests", "weights"):
        (folder / name).mkdir(parents=True)
    version_id = sha256_hex(manifest_text)
    (folder / "manifests" / f"{version_id}.json").write_bytes(manifest_text)
    if weights is not None:
        (folder / "weights" / f"{sha256_hex(weights)}.safetensors").write_bytes(weights)
    (folder / "lineage.json").write_bytes(
        canonical_json({"format": "federated-peft lineage 1", "versions": [version_id]})
    )


@pytest.mark.parametrize("weights", [b"", b"\x80\x04pickle", b"one"])
def test_what_is_no_adapter_is_refused(folder, other, manifest_for, weights):
    forge(folder, canonical_json(manifest_for(weights).to_dict()), weights)
    with pytest.raises(RegistryError, match="holds no adapter"):
        other.import_folder(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lambda one: canonical_json({**one, "code": "import os"}), "upgrade federated-peft"),
        (lambda one: canonical_json([one]), "upgrade federated-peft"),
        (lambda one: json.dumps(one).encode(), "not canonical JSON"),
        (lambda one: canonical_json({**one, "participants": ["client-007"]}), "participants"),
        (lambda one: canonical_json({**one, "adapter_id": "../up"}), "adapter_id"),
        (lambda one: b"{", "is not JSON"),
    ],
)
def test_a_record_of_another_form_is_refused(folder, other, manifest_for, text, message):
    weights = adapter(5.0)
    forge(folder, text(manifest_for(weights).to_dict()), weights)
    with pytest.raises(RegistryError, match=message):
        other.import_folder(folder)
    assert other.versions() == []


def test_weights_that_are_missing(folder, other):
    first(folder, "weights").unlink()
    with pytest.raises(RegistryError, match="is missing"):
        other.import_folder(folder)


def test_a_parent_of_another_base_is_refused(registry, folder, other, lineage, manifest_for):
    record = registry.get("v2").manifest
    weights = adapter(1.0)
    stranger = manifest_for(weights, base_digest="c" * 64, parent=lineage[0], round_number=9)
    text = canonical_json(stranger.to_dict())
    (folder / "manifests" / f"{sha256_hex(text)}.json").write_bytes(text)
    index(folder, versions=[lineage[0], sha256_hex(text)])
    with pytest.raises(BaseMismatch):
        other.import_folder(folder)
    assert record.base_digest == "b" * 64
    assert other.versions() == []
