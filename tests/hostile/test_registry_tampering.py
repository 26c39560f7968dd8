"""Somebody edits the registry's files behind its back: nothing false comes out."""

import sqlite3

import pytest

from federated.errors import CorruptBlob, RegistryError
from federated.manifest import AdapterSpec, VersionManifest, sha256_hex
from federated.registry import Registry
from federated.registry.records import manifest_text

SPEC = AdapterSpec("lora", 2, 4.0, False, ())


def manifest_of(weights, **fields):
    return VersionManifest(sha256_hex(weights), "b" * 64, SPEC, "fedit", "run-a", **({"round_number": 0} | fields))


@pytest.fixture
def folder(tmp_path):
    with Registry.open(tmp_path / "registry") as registry:
        first = registry.publish(manifest_of(b"one"), b"one", training_state=b"state", channel="dev")
        registry.publish(manifest_of(b"two", round_number=1, parent=first), b"two", channel="dev")
    return tmp_path / "registry"


def edit(folder, statement):
    raw = sqlite3.connect(folder / "registry.db")
    raw.execute(statement)
    raw.commit()
    raw.close()


def blob(folder, data):
    digest = sha256_hex(data)
    return folder / "blobs" / digest[:2] / digest


def test_clean_registry_verifies(folder):
    with Registry.open(folder) as registry:
        assert registry.verify() == []


@pytest.mark.parametrize("data", [b"one", b"two"])
@pytest.mark.parametrize("forged", [b"", b"x", b"onE"])
def test_changed_weights_never_come_out(folder, data, forged):
    blob(folder, data).write_bytes(forged)
    with Registry.open(folder) as registry, pytest.raises(CorruptBlob, match="expected " + sha256_hex(data)):
        registry.weights({b"one": "v0", b"two": "v1"}[data])


def test_missing_blobs_are_all_found(folder):
    blob(folder, b"two").unlink()
    blob(folder, b"state").unlink()
    with Registry.open(folder) as registry:
        found = [(registry.get(fault.version_id).number, fault.part) for fault in registry.verify()]
    assert found == [(0, "training_state"), (1, "weights")]


def test_blob_that_is_a_folder_is_a_fault(folder):
    blob(folder, b"two").unlink()
    blob(folder, b"two").mkdir()
    with Registry.open(folder) as registry:
        (fault,) = registry.verify()
    assert "Is a directory" in fault.message


@pytest.mark.parametrize(
    "change",
    [
        "manifest = replace(manifest, 'fedit', 'fedex')",
        "run_id = 'run-b'",
        "round_number = 7",
        "base_digest = 'c'",
        "weights_digest = '../../../etc/passwd'",
        "manifest = 5",
    ],
)
def test_changed_record_never_comes_out(folder, change):
    edit(folder, f"UPDATE registry_versions SET {change} WHERE sequence = 2")  # noqa: S608
    with Registry.open(folder) as registry:
        with pytest.raises(CorruptBlob, match="was changed"):
            registry.get("latest")
        assert "record" in {fault.part for fault in registry.verify()}


def test_forged_digest_of_a_training_state_reads_no_other_file(folder):
    edit(folder, "UPDATE registry_versions SET state_digest = '../../registry.db'")
    with Registry.open(folder) as registry, pytest.raises(CorruptBlob, match="no SHA-256"):
        registry.training_state("v0")


def test_loop_in_the_parents_ends(folder):
    edit(folder, "UPDATE registry_versions SET parent = (SELECT max(version_id) FROM registry_versions)")
    with Registry.open(folder) as registry, pytest.raises(CorruptBlob, match="column parent"):
        registry.lineage("latest")


def test_manifest_of_a_newer_library_says_upgrade(folder):
    text = '{"field_of_tomorrow":1}'
    change = f"manifest = '{text}', version_id = '{sha256_hex(text.encode())}'"
    edit(folder, f"UPDATE registry_versions SET {change} WHERE sequence = 2")  # noqa: S608
    with Registry.open(folder) as registry, pytest.raises(RegistryError, match="upgrade federated-peft"):
        registry.get("latest")


def test_truncated_database(folder):
    database = folder / "registry.db"
    database.write_bytes(database.read_bytes()[:5000])
    with (
        pytest.raises(RegistryError, match=r"damaged|no registry|the database says"),
        Registry.open(folder) as registry,
    ):
        registry.versions()


def test_table_that_went_away(folder):
    edit(folder, "DROP TABLE registry_channels")
    with Registry.open(folder) as registry, pytest.raises(RegistryError, match="no such table"):
        registry.channels()


COLUMNS = "at, actor, action, subject, details, previous, digest"


def edit_log(folder, *statements):
    """As somebody would who administers the database: the triggers first."""
    edit(folder, "DROP TRIGGER registry_audit_no_update")
    edit(folder, "DROP TRIGGER registry_audit_no_delete")
    for statement in statements:
        edit(folder, statement)


@pytest.mark.parametrize(
    ("change", "row"),
    [
        ("UPDATE registry_audit SET actor = 'eve' WHERE number = 3", 3),
        ("UPDATE registry_audit SET details = '{}' WHERE number = 2", 2),
        ("UPDATE registry_audit SET at = '2020-01-01' WHERE number = 5", 5),
        ("DELETE FROM registry_audit WHERE number = 3", 3),
        ("DELETE FROM registry_audit WHERE number = 1", 1),
        ("DELETE FROM registry_audit WHERE number = 5", 5),
        (f"INSERT INTO registry_audit SELECT 6, {COLUMNS} FROM registry_audit WHERE number = 2", 6),  # noqa: S608
        ("UPDATE registry_audit_head SET number = 4", 5),
    ],
)  # fmt: skip
def test_the_log_names_the_row_that_was_tampered_with(folder, change, row):
    edit_log(folder, change)
    with Registry.open(folder) as registry:
        assert registry.audit.verify()[0].number == row
        assert "audit" in {fault.part for fault in registry.verify()}


def test_swapped_rows_are_named(folder):
    swap = "UPDATE registry_audit SET number = {} WHERE number = {}"
    edit_log(folder, *(swap.format(*pair) for pair in ((99, 2), (2, 3), (3, 99))))
    with Registry.open(folder) as registry:
        assert [fault.number for fault in registry.audit.verify()][:2] == [2, 3]


def test_rows_cut_off_with_the_head_show_against_a_kept_head(folder):
    with Registry.open(folder) as registry:
        kept = registry.audit.head()
        fourth = registry.audit.entries()[3]
    edit_log(
        folder,
        "DELETE FROM registry_audit WHERE number = 5",
        f"UPDATE registry_audit_head SET number = 4, digest = '{fourth.digest}'",  # noqa: S608
    )
    with Registry.open(folder) as registry:
        assert registry.audit.verify() == []
        (fault,) = registry.audit.verify(kept)
    assert (fault.number, "cut off" in fault.message) == (5, True)


@pytest.mark.parametrize(
    ("change", "part", "message"),
    [
        ("UPDATE registry_channels SET version_id = (SELECT version_id FROM registry_versions WHERE sequence = 1)",
         "channel", "moved from outside"),
        ("DELETE FROM registry_channels", "channel", "is gone"),
        ("DELETE FROM registry_versions WHERE sequence = 2", "record", "its row is gone"),
        ("DELETE FROM registry_versions WHERE sequence = 1", "lineage", "is not in the registry"),
        ("UPDATE registry_versions SET sequence = 9 WHERE sequence = 1", "lineage", "published after it"),
        ("UPDATE registry_versions SET base_digest = 'c' WHERE sequence = 1", "lineage", "another base model"),
    ],
)  # fmt: skip
def test_what_the_log_does_not_know_is_a_fault(folder, change, part, message):
    edit(folder, change)
    with Registry.open(folder) as registry:
        assert [fault for fault in registry.verify() if fault.part == part and message in fault.message]


def test_a_version_put_in_from_outside_is_a_fault(folder):
    manifest = manifest_of(b"one", round_number=5)
    columns = "run_id, parent, base_digest, weights_digest, state_digest, created_at"
    new = f"'{manifest.version_id}', 5, '{manifest_text(manifest)}'"
    edit(
        folder,
        f"INSERT INTO registry_versions (version_id, round_number, manifest, {columns}) SELECT "  # noqa: S608
        f"{new}, {columns} FROM registry_versions WHERE sequence = 1",
    )
    with Registry.open(folder) as registry:
        (fault,) = registry.verify()
    assert (fault.version_id, "put in from outside" in fault.message) == (manifest.version_id, True)
