import errno
import logging
import sqlite3
import subprocess
import sys

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from federated.errors import RegistryError, StorageFull
from federated.registry import Registry, database, upgrades
from federated.registry.blobs import BlobStore
from federated.registry.schema import HEAD, SCHEMA_TABLE, Base


def test_head_is_the_newest_migration():
    config = Config()
    config.set_main_option("script_location", str(upgrades.MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_current_head() == HEAD


def test_migrations_make_the_models_tables(location):
    Registry.open(location).close()
    engine = database.open_engine(database.locate(location))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": SCHEMA_TABLE})
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_sqlite_is_set_for_durability(location):
    Registry.open(location).close()
    engine = database.open_engine(database.locate(location))
    with engine.connect() as connection:
        found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous",
                 "foreign_keys", "busy_timeout")]  # fmt: skip
    engine.dispose()
    assert found == ["wal", 2, 1, 30_000]


def test_opening_again_skips_alembic(location, monkeypatch):
    Registry.open(location).close()

    def migrate(*_):
        raise RuntimeError("not needed")

    monkeypatch.setattr(upgrades, "_migrate", migrate)
    Registry.open(location).close()


def test_opening_is_silent(location, caplog, capfd):
    with caplog.at_level(logging.INFO):
        Registry.open(location).close()
    assert (caplog.records, capfd.readouterr()) == ([], ("", ""))


def test_newer_schema_is_refused(location):
    Registry.open(location).close()
    with sqlite3.connect(location / "registry.db") as raw:
        raw.execute("UPDATE registry_schema SET version_num = '9999'")
    raw.close()
    with pytest.raises(RegistryError, match="schema 9999, newer than this library's"):
        Registry.open(location)


def test_file_that_is_no_database(location):
    location.mkdir()
    (location / "registry.db").write_bytes(b"these are no pages of SQLite" * 100)
    with pytest.raises(RegistryError, match="no SQLite database"):
        Registry.open(location)


def test_location_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RegistryError, match="cannot open the registry"):
        Registry.open(tmp_path / "file")


def test_nothing_there_and_not_to_be_made(location):
    with pytest.raises(RegistryError, match="there is no registry at"):
        Registry.open(location, create=False)
    assert not location.exists()


def test_empty_database_and_not_to_be_made(location):
    location.mkdir()
    (location / "registry.db").touch()
    with pytest.raises(RegistryError, match="holds no registry"):
        Registry.open(location, create=False)


def test_creation_that_was_cut_short_is_finished(location, manifest_for):
    location.mkdir()
    (location / "registry.db").touch()
    with Registry.open(location) as registry:
        registry.publish(manifest_for(b"one"), b"one")


def test_unwritable_folder(location, monkeypatch):
    Registry.open(location).close()
    monkeypatch.setattr(database.os, "access", lambda folder, mode: False)
    with pytest.raises(RegistryError, match="cannot be written to"):
        Registry.open(location)


def test_url_with_blobs(tmp_path, manifest_for):
    url = f"sqlite:///{tmp_path}/meta.db"
    with Registry.open(url, blobs=tmp_path / "blobs") as registry:
        version_id = registry.publish(manifest_for(b"one"), b"one")
        assert (registry.location, registry.weights(version_id)) == (url, b"one")


def test_folder_with_blobs_elsewhere(location, tmp_path, manifest_for):
    with Registry.open(location, blobs=tmp_path / "elsewhere") as registry:
        registry.publish(manifest_for(b"one"), b"one")
    assert any((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"])
def test_database_in_memory_is_refused(url, tmp_path):
    with pytest.raises(RegistryError, match="plain file"):
        Registry.open(url, blobs=tmp_path)


def test_url_without_blobs_hides_the_password():
    with pytest.raises(RegistryError, match="blobs=FOLDER") as caught:
        Registry.open("postgresql://me:secret@host/db")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("://", "cannot open the registry"),
        ("nonsense://host/db", "found a URL of 'nonsense'"),
        ("mysql://h/d", "'mysql'"),
    ],
)
def test_url_of_no_known_database(url, message, tmp_path):
    with pytest.raises(RegistryError, match=message):
        Registry.open(url, blobs=tmp_path)


def test_missing_driver_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(RegistryError, match="needs the Python package 'psycopg2'"):
        Registry.open("postgresql+psycopg2://host/db", blobs=tmp_path)


def test_waiting_writer_gives_up_with_advice(location, manifest_for, monkeypatch):
    Registry.open(location).close()
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.1)
    other = sqlite3.connect(location / "registry.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        with (
            Registry.open(location) as registry,
            pytest.raises(RegistryError, match="another process has been writing"),
        ):
            registry.publish(manifest_for(b"one"), b"one")
    finally:
        other.close()


class LockedCursor:
    """Refuses a number of times, then obeys."""

    def __init__(self, refusals, name):
        self.refusals, self.name, self.calls = refusals, name, 0

    def execute(self, _):
        self.calls += 1
        if self.calls <= self.refusals:
            error = sqlite3.OperationalError("locked")
            error.sqlite_errorname = self.name
            raise error


def test_switch_to_the_log_waits_for_another_opener():
    cursor = LockedCursor(2, "SQLITE_BUSY")
    database._use_wal(cursor)
    assert cursor.calls == 3


@pytest.mark.parametrize(("name", "patience"), [("SQLITE_BUSY", -1.0), ("SQLITE_READONLY", 30.0)])
def test_switch_to_the_log_gives_up(monkeypatch, name, patience):
    monkeypatch.setattr(database, "BUSY_SECONDS", patience)
    with pytest.raises(sqlite3.OperationalError):
        database._use_wal(LockedCursor(99, name))


def test_frozen_engine_needs_a_file_without_a_log(location, tmp_path):
    place = database.locate(location)
    assert database.open_frozen(place) is None
    Registry.open(location).close()
    (location / "registry.db-wal").write_bytes(b"not written back yet")
    assert database.open_frozen(place) is None
    server = database.locate("postgresql://host/db", tmp_path)
    assert database.open_frozen(server) is None


def without_space(self):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_opens_for_reading(location, manifest_for, monkeypatch):
    with Registry.open(location) as registry:
        registry.publish(manifest_for(b"one"), b"one")
    monkeypatch.setattr(BlobStore, "sweep", without_space)
    with Registry.open(location) as registry:
        assert registry.weights("latest") == b"one"
        with pytest.raises(RegistryError, match="open for reading only"):
            registry.channel("stable").promote("v0", expected=None)


def test_full_disk_makes_no_new_registry(location, monkeypatch):
    monkeypatch.setattr(BlobStore, "sweep", without_space)
    with pytest.raises(StorageFull):
        Registry.open(location)


def test_library_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import federated.registry"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_postgresql_is_reached_by_psycopg(tmp_path):
    engine = database.open_engine(database.locate("postgresql://host/db", tmp_path))
    assert engine.url.drivername == "postgresql+psycopg"
    assert database.reading(engine).get_execution_options()["isolation_level"] == "REPEATABLE READ"
    engine.dispose()


def test_missing_psycopg_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(RegistryError, match=r"install federated-peft\[postgres\]"):
        Registry.open("postgresql://host/db", blobs=tmp_path)


class Server:
    """What is asked of a PostgreSQL connection."""

    def __init__(self, dialect="postgresql"):
        self.said, self.committed, self.dialect = [], False, self
        self.name = dialect

    def cursor(self):
        return self

    def execute(self, statement):
        self.said.append(statement)

    exec_driver_sql = execute

    def close(self):
        self.said.append("close")

    def commit(self):
        self.committed = True


def test_writers_wait_on_postgresql_as_long_as_on_sqlite():
    server = Server()
    database._on_postgres(server, None)
    assert (server.said, server.committed) == (["SET lock_timeout = 30000", "close"], True)


@pytest.mark.parametrize(("dialect", "locks"), [("postgresql", 1), ("sqlite", 0)])
def test_one_process_at_a_time_changes_the_schema(dialect, locks):
    server = Server(dialect)
    database.lock_for_upgrade(server)
    assert [said.startswith("SELECT pg_advisory_xact_lock(") for said in server.said] == [True] * locks


@pytest.mark.parametrize(
    ("location", "blobs", "disk"),
    [("{0}", None, "{0}/blobs"), ("{0}", "memory://x", "{0}"), ("postgresql://host/db", "memory://x", ".")],
)
def test_the_disk_whose_space_counts(tmp_path, location, blobs, disk):
    place = database.locate(location.format(tmp_path), blobs)
    assert str(place.disk) == disk.format(tmp_path)
