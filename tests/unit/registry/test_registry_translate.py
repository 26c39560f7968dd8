import errno
import sqlite3

import pytest
from sqlalchemy.exc import ArgumentError, DBAPIError

from federated.errors import RegistryError, StorageFull, VersionNotFound
from federated.registry import translate
from federated.registry.translate import translated


def sqlite_error(name, text="the database's own words"):
    error = sqlite3.OperationalError(text)
    error.sqlite_errorname = name
    return error


def run(error, folder, **options):
    with translated("do it", "the registry", folder=folder, **options):
        raise error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_names_folder_free_and_needed(tmp_path, monkeypatch, number):
    monkeypatch.setattr(translate, "_free_bytes", lambda folder: 123)
    with pytest.raises(StorageFull, match=rf"disk under {tmp_path} is full \(123 bytes free, about 131082 needed"):
        run(OSError(number, "full"), tmp_path, needed=10)


def test_full_database_is_a_full_disk(tmp_path):
    with pytest.raises(StorageFull):
        run(DBAPIError("INSERT", None, sqlite_error("SQLITE_FULL")), tmp_path)


@pytest.mark.parametrize("name", ["SQLITE_IOERR_SHMSIZE", "SQLITE_CANTOPEN", "SQLITE_READONLY"])
def test_starved_sqlite_is_a_full_disk_only_when_nothing_is_free(tmp_path, monkeypatch, name):
    monkeypatch.setattr(translate, "_free_bytes", lambda folder: 0)
    with pytest.raises(StorageFull):
        run(sqlite_error(name), tmp_path)
    monkeypatch.setattr(translate, "_free_bytes", lambda folder: 10**9)
    with pytest.raises(RegistryError) as caught:
        run(sqlite_error(name), tmp_path)
    assert not isinstance(caught.value, StorageFull)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (sqlite_error("SQLITE_BUSY"), "another process has been writing"),
        (sqlite_error("SQLITE_CORRUPT_VTAB"), "restore it from a backup"),
        (sqlite_error("SQLITE_MISUSE"), "the database says: the database's own words"),
        (DBAPIError("INSERT", None, None), "the database says"),
        (ArgumentError("odd"), "odd"),
        (PermissionError(errno.EACCES, "Permission denied", "/there"), r"Permission denied \(/there\)"),
        (OSError("odd"), "odd"),
    ],
)
def test_every_other_error_says_what_to_do(tmp_path, error, message):
    with pytest.raises(RegistryError, match=f"cannot do it in the registry: .*{message}"):
        run(error, tmp_path)


def test_own_errors_pass(tmp_path):
    with pytest.raises(VersionNotFound, match=r"^mine$"):
        run(VersionNotFound("mine"), tmp_path)


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path):
    assert translate._free_bytes(tmp_path / "not" / "yet") > 0


class ServerError(Exception):
    """As psycopg's: an SQLSTATE, or None."""

    def __init__(self, sqlstate, text="the server's\n  own words"):
        super().__init__(text)
        self.sqlstate = sqlstate


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("55P03", "another process has been writing"),
        ("40P01", "another writer was in the way"),
        ("23505", "another writer was there first"),
        ("42501", "let the database's owner grant it"),
        ("25006", "use the primary one"),
        (None, "the database says: the server's own words$"),
        ("XX000", "the database says: the server's own words$"),
    ],
)
def test_a_server_s_errors_say_what_to_do(tmp_path, state, message):
    with pytest.raises(RegistryError, match=f"cannot do it in the registry: .*{message}"):
        run(DBAPIError("INSERT", None, ServerError(state)), tmp_path)


def test_a_full_server_is_a_full_disk_elsewhere(tmp_path):
    with pytest.raises(StorageFull, match="the database server's disk is full"):
        run(DBAPIError("INSERT", None, ServerError("53100")), tmp_path)
