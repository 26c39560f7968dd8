"""The registry on PostgreSQL: a cluster of its own in a temporary folder, run by a user who is not root."""

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from federated.errors import ChannelConflict, NotApproved, RegistryError
from federated.manifest import AdapterSpec, VersionManifest, sha256_hex
from federated.registry import Registry

SPEC = AdapterSpec("lora", 2, 4.0, False, ())


def _programs() -> Path | None:
    """The folder of ``initdb`` and ``pg_ctl``: Debian keeps them off the path."""
    found = shutil.which("pg_ctl")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((folder for folder in reversed(folders) if (folder / "initdb").exists()), None)


PROGRAMS = _programs()
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(PROGRAMS is None, reason="PostgreSQL is not installed (Debian: apt-get install postgresql)"),
]


def _user() -> str | None:
    """Who runs the server: PostgreSQL refuses root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    return None


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a fresh cluster's maintenance database."""
    assert PROGRAMS is not None
    user = _user()
    with tempfile.TemporaryDirectory(prefix="fedpeft-pg-") as name, socket.socket() as free:
        if user is not None:
            shutil.chown(name, user)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()

        def run(*command: object) -> None:
            done = subprocess.run(list(map(str, command)), user=user, cwd="/", capture_output=True, check=False)
            assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()

        data = Path(name) / "data"
        run(PROGRAMS / "initdb", "-D", data, "-U", "fedpeft", "-A", "trust", "--no-sync", "-E", "UTF8")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -k {name} -c fsync=off -c shared_buffers=16MB"
        run(PROGRAMS / "pg_ctl", "-D", data, "-w", "-o", options, "-l", Path(name) / "log", "start")
        try:
            yield f"postgresql://fedpeft@127.0.0.1:{port}"
        finally:
            run(PROGRAMS / "pg_ctl", "-D", data, "-m", "immediate", "stop")


@pytest.fixture
def place(server: str, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """URL of an empty database, and a folder for bytes."""
    import psycopg

    name = f"test_{os.urandom(6).hex()}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield f"{server}/{name}", tmp_path / "blobs"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def registry(place: tuple[str, Path]) -> Iterator[Registry]:
    with Registry.open(place[0], blobs=place[1], actor="Ann") as opened:
        yield opened


@pytest.fixture
def publish(registry: Registry) -> Callable[..., str]:
    def run(number: int, *, run_id: str = "run-a", channel: str | None = None, **fields: object) -> str:
        weights = f"{run_id} {number}".encode()
        manifest = VersionManifest(sha256_hex(weights), "b" * 64, SPEC, "fedit", run_id, number, **fields)
        return registry.publish(manifest, weights, training_state=b"state", channel=channel)

    return run


def execute(place: tuple[str, Path], statement: str) -> None:
    import psycopg

    with psycopg.connect(place[0], autocommit=True) as connection:
        connection.execute(statement)


def test_versions_names_and_lineage(registry: Registry, publish: Callable[..., str]) -> None:
    first = publish(0, channel="dev")
    second = publish(1, parent=first, channel="dev")
    assert [record.version_id for record in registry.lineage("dev")] == [second, first]
    assert registry.get(second[:6].upper()).number == 1
    assert registry.get("run-a:v0").version_id == first
    assert registry.weights("latest") == b"run-a 1"
    assert registry.training_state("v1") == b"state"
    assert registry.verify() == []


def test_channels_tags_devices_and_log(registry: Registry, publish: Callable[..., str]) -> None:
    ids = [publish(number) for number in range(3)]
    stable = registry.channel("stable")
    for version_id in ids:
        stable.promote(version_id)
    assert stable.rollback().version_id == ids[1]
    with pytest.raises(ChannelConflict):
        stable.promote("v0", expected=ids[2])
    stable.require(2)
    stable.approve("v0", name="Ann")
    with pytest.raises(NotApproved, match="Ann"):
        stable.promote("v0")
    registry.tag("v2", "keep")
    registry.devices.report("pump", "v0", at=datetime(2026, 1, 1, tzinfo=UTC))
    assert registry.get("keep").version_id == ids[2]
    assert registry.devices.holdings()[0].last_at == datetime(2026, 1, 1, tzinfo=UTC)
    assert [entry.number for entry in registry.audit.entries()] == list(range(1, 13))
    assert (registry.audit.verify(), registry.verify()) == ([], [])


def test_gc(registry: Registry, publish: Callable[..., str], place: tuple[str, Path]) -> None:
    old = [publish(0, run_id="old")]
    old.append(publish(1, run_id="old", parent=old[0]))
    kept = publish(0, channel="dev")
    found = registry.gc(older_than=timedelta(0), dry_run=True)
    assert registry.gc(older_than=timedelta(0)) == found
    assert list(found.removed) == old
    assert [record.version_id for record in registry.versions()] == [kept]
    assert registry.verify() == []


def test_times_are_utc_whatever_the_server_s_zone(place: tuple[str, Path]) -> None:
    execute(place, f"ALTER DATABASE {place[0].rpartition('/')[2]} SET timezone TO 'Asia/Tokyo'")
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    with Registry.open(place[0], blobs=place[1], clock=lambda: noon) as registry:
        registry.publish(VersionManifest(sha256_hex(b"x"), "b" * 64, SPEC, "fedit", "run", 0), b"x")
        assert registry.get("v0").created_at == noon


@pytest.mark.parametrize("what", ["UPDATE registry_audit SET actor = 'eve'", "DELETE FROM registry_audit"])
def test_the_database_refuses_to_change_the_log(registry: Registry, place: tuple[str, Path], what: str) -> None:
    import psycopg

    with pytest.raises(psycopg.errors.RaiseException, match="append-only"):
        execute(place, what)


def test_a_row_that_was_edited_is_named(
    registry: Registry, publish: Callable[..., str], place: tuple[str, Path]
) -> None:
    publish(0, channel="dev")
    execute(place, "ALTER TABLE registry_audit DISABLE TRIGGER ALL")
    execute(place, "UPDATE registry_audit SET subject = 'other' WHERE number = 2")
    assert [fault.number for fault in registry.audit.verify()] == [2]


def test_opening_again_and_newer_schema(registry: Registry, place: tuple[str, Path]) -> None:
    Registry.open(place[0], blobs=place[1], create=False).close()
    execute(place, "UPDATE registry_schema SET version_num = '9999'")
    with pytest.raises(RegistryError, match="schema 9999, newer than this library's"):
        Registry.open(place[0], blobs=place[1])


def test_empty_database_is_not_made_into_one_by_reading(place: tuple[str, Path]) -> None:
    with pytest.raises(RegistryError, match="holds no registry"):
        Registry.open(place[0], blobs=place[1], create=False)


@pytest.mark.parametrize(
    ("url", "message"),
    [("postgresql://me:secret@127.0.0.1:1/none", "refused"), ("{server}/absent", "does not exist")],
)
def test_server_or_database_that_is_not_there(server: str, place: tuple[str, Path], url: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message) as caught:
        Registry.open(url.format(server=server), blobs=place[1])
    assert "secret" not in str(caught.value)


def test_a_writer_that_waits_too_long_says_so(place: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import psycopg

    from federated.registry import database

    monkeypatch.setattr(database, "BUSY_SECONDS", 0.2)
    with Registry.open(place[0], blobs=place[1]) as registry, psycopg.connect(place[0]) as other:
        other.execute("SELECT * FROM registry_audit_head FOR UPDATE")
        with pytest.raises(RegistryError, match="another process has been writing"):
            registry.channel("stable").require(1)


WORK = """
import sys
from federated.errors import ChannelConflict
from federated.manifest import AdapterSpec, VersionManifest, sha256_hex
from federated.registry import Registry

url, blobs, run_id, count = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
with Registry.open(url, blobs=blobs, actor=run_id) as registry:
    parent = None
    for number in range(int(count)):
        weights = f"{run_id} {number}".encode()
        spec = AdapterSpec("lora", 2, 4.0, False, ())
        manifest = VersionManifest(sha256_hex(weights), "b" * 64, spec, "fedit", run_id, number, parent=parent)
        parent = registry.publish(manifest, weights, channel="dev")
        while True:
            try:
                seen = registry.channels().get("stable")
                registry.channel("stable").promote(parent, expected=seen)
                break
            except ChannelConflict:
                print("conflict")
"""


def test_two_processes_make_one_registry_publish_and_promote_and_lose_nothing(place: tuple[str, Path]) -> None:
    command = [sys.executable, "-c", WORK, place[0], str(place[1])]
    workers = [
        subprocess.Popen([*command, name, "10"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("run-a", "run-b")
    ]
    for worker in workers:
        worker.stdout.readline()
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    results = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], results
    with Registry.open(place[0], blobs=place[1], create=False) as registry:
        assert len(registry.versions()) == 20
        assert {move.action for move in registry.channel("stable").history()} == {"promote"}
        assert len(registry.channel("stable").history()) == 20
        assert registry.verify() == []
