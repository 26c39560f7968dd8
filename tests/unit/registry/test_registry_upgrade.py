"""A database that the library made in its first form opens, keeps everything, and goes on."""

import importlib
import io
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations

from federated.manifest import sha256_hex
from federated.registry import Registry
from federated.registry.schema import HEAD

DUMP = Path(__file__).resolve().parents[2] / "golden" / "registry" / "form-0001.sql"


@pytest.fixture
def old(location):
    """A registry of the first form: v0 to v2 of one run, dev at v2, stable at v1."""
    location.mkdir()
    raw = sqlite3.connect(location / "registry.db")
    raw.executescript(DUMP.read_text(encoding="utf-8"))
    raw.close()
    for number in range(3):
        for data in (f"weights {number}".encode(), f"state {number}".encode()):
            path = location / "blobs" / sha256_hex(data)[:2] / sha256_hex(data)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return location


def test_everything_is_still_there(old):
    with Registry.open(old, create=False) as registry:
        assert [record.number for record in registry.lineage("dev")] == [2, 1, 0]
        assert {name: registry.get(at).number for name, at in registry.channels().items()} == {"dev": 2, "stable": 1}
        assert registry.weights("v1") == b"weights 1"
        assert registry.training_state("v2") == b"state 2"
        assert registry.verify() == []


def test_the_log_begins_with_what_there_was(old):
    with Registry.open(old, create=False, actor="Ann") as registry:
        (first,) = registry.audit.entries()
        details = json.loads(first.details)
        assert (first.action, first.actor, details["from"], details["schema"]) == ("upgrade", "Ann", "0001", HEAD)
        assert details["versions"] == [record.version_id for record in registry.versions()]
        assert details["channels"] == registry.channels()


def test_it_goes_on(old, manifest_for):
    with Registry.open(old) as registry:
        parent = registry.get("v2").version_id
        fields = {"run_id": "old-run", "round_number": 3, "parent": parent}
        registry.publish(manifest_for(b"three", **fields), b"three", channel="dev")
        assert registry.channel("dev").rollback().number == 2
        assert [move.action for move in registry.channel("dev").history()] == ["rollback", "promote", "upgrade"]
        assert registry.verify() == []


def test_it_is_upgraded_once(old):
    for _ in range(2):
        with Registry.open(old) as registry:
            assert len(registry.audit.entries()) == 1


def test_an_upgrade_that_fails_leaves_the_first_form(old, monkeypatch):
    from federated.registry import upgrades

    def fail(*_, **__):
        raise RuntimeError("killed")

    monkeypatch.setattr(upgrades, "begin", fail)
    with pytest.raises(RuntimeError):
        Registry.open(old)
    monkeypatch.undo()
    raw = sqlite3.connect(old / "registry.db")
    assert raw.execute("SELECT version_num FROM registry_schema").fetchall() == [("0001",)]
    raw.close()
    Registry.open(old).close()


@pytest.mark.slow
def test_two_processes_upgrade_it_at_once(old, tmp_path):
    code = (
        "import sys, pathlib; from federated.registry import Registry; print('ready', flush=True)\n"
        "while not pathlib.Path(sys.argv[2]).exists(): pass\n"
        "with Registry.open(sys.argv[1]) as registry: print(len(registry.audit.entries()), registry.verify())"
    )
    arguments = [sys.executable, "-c", code, str(old), str(tmp_path / "go")]
    processes = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        process.stdout.readline()
    (tmp_path / "go").touch()
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == ["1 []", "1 []"]


def test_a_log_that_is_there_is_not_begun_again(location, monkeypatch):
    from federated.registry import upgrades

    Registry.open(location).close()
    monkeypatch.setattr(upgrades, "HEAD", "as if there were a third form")
    with Registry.open(location) as registry:
        assert len(registry.audit.entries()) == 1


@pytest.mark.parametrize(("dialect", "frozen"), [("sqlite", 2), ("postgresql", 1), ("mysql", 0)])
def test_what_freezes_the_audit_log_is_in_each_database_s_own_words(dialect, frozen):
    """Run on SQLite above and on PostgreSQL under `make test-interop`; here as text."""
    written = io.StringIO()
    context = MigrationContext.configure(dialect_name=dialect, opts={"as_sql": True, "output_buffer": written})
    module = importlib.import_module("federated.registry.migrations.versions.r0002_audit_approvals_tags")
    with Operations.context(context):
        module._audit()
    assert written.getvalue().count("CREATE TRIGGER") == frozen
    assert written.getvalue().count("the audit log is append-only") == frozen
