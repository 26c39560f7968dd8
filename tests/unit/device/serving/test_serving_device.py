"""``fedpeft serve --device``: the agent and the server in one process."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from federated.device.journal import read_book
from federated.device.personal_store import PersonalStore, PersonalVersion, Standing
from federated.device.records import NULL
from federated.release import Artefact, KeyRing, Plan, Publisher, Quorum
from federated.wire import decode_tensors

Make = Callable[..., Any]

pytestmark = pytest.mark.slow


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    ring = KeyRing(tmp_path / "keys", passphrase=lambda *_: b"passphrase", cost=2)
    made = Publisher.create(tmp_path / "releases", ring, Plan(quorums={"root": Quorum()}))
    (tmp_path / "root.json").write_bytes(made.trusted_root.read_bytes())
    (tmp_path / "device.yaml").write_text(
        "device_id: shop-17\nsource: releases\nroot: root.json\nstate: state\npoll_seconds: 0.3\nretry_seconds: 0.2\n"
        "probation: {requests: 3, seconds: 1000}\n"
    )
    return made


def kept(folder: Path, version: Any) -> None:
    """What a training client of this device leaves, in a process that knows nothing of the server."""
    store, manifest = PersonalStore(folder), version.manifest
    about = ("ann", 1, 0, manifest.weights_digest, manifest.base_digest, NULL, version.version_id, manifest.spec, {})
    store.put(PersonalVersion(*about, recipe=manifest.task), decode_tensors(version.weights))
    store.stand("ann", Standing(1, NULL))


def test_an_agents_versions_are_served_and_committed_by_what_the_server_reports(
    publisher: Publisher, recipe: Make, real_version: Make, process: Make, tmp_path: Path
) -> None:
    one, two = (real_version(recipe(), n, adapter_id="reviews", release_counter=n) for n in (1, 2))
    publisher.publish("stable", Artefact(one.manifest, one.weights))
    state, file = tmp_path / "state", str(tmp_path / "device.yaml")

    def until(what: Callable[[], bool]) -> None:
        end = time.monotonic() + 200
        while not what():
            assert time.monotonic() < end, "".join(server.said)
            time.sleep(0.1)

    def committed(version: Any) -> bool:
        book = read_book(state)
        return book is not None and book.state(version.version_id) == "committed"

    with process(["--device", file, "--admin-socket", str(tmp_path / "admin.sock")]) as server:
        place = server.wait_for(r"answers at (\S+)")

        def version() -> str:
            done = httpx.post(f"{place}/classify", json={"input": "late again"}, timeout=60)
            return str(done.headers["x-fedpeft-version"])

        until(lambda: version() == one.version_id)
        assert not committed(one)  # three requests are its probation
        until(lambda: version() == one.version_id and committed(one))
        kept(tmp_path / "state" / "personal", two)

        def slot(user: str) -> str:
            done = httpx.post(f"{place}/classify", json={"input": "late again", "user": user}, timeout=60)
            return str(done.headers["x-fedpeft-slot"])

        until(lambda: slot("ann") == two.digest)
        assert slot("bob") == one.digest
        undo = [sys.executable, "-m", "federated.cli.main", "device", "personal", "rollback", "ann", "--config", file]
        assert subprocess.run(undo, check=False, capture_output=True).returncode == 0
        until(lambda: slot("ann") == one.digest)
        publisher.publish("stable", Artefact(two.manifest, two.weights))
        until(lambda: version() == two.version_id)
        until(lambda: version() == two.version_id and committed(two))
        assert httpx.get(f"{place}/healthz").json()["status"] == "ok"
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(tmp_path / "admin.sock"))) as admin:
            refused = admin.post("http://admin/admin/rollback")
            assert (refused.status_code, "fedpeft device" in refused.json()["error"]["message"]) == (409, True)
        command = [sys.executable, "-m", "federated.cli.main", "device", "rollback", "--config", file]
        assert subprocess.run(command, check=False, capture_output=True).returncode == 0
        until(lambda: version() == one.version_id)
        (tmp_path / "releases").rename(tmp_path / "gone")
        until(lambda: httpx.get(f"{place}/healthz").json()["stale"])
        assert version() == one.version_id
        server.running.send_signal(signal.SIGTERM)
        assert server.running.wait(200) == 0
    book = read_book(state)
    assert book is not None
    assert book.boots == 0  # an orderly end


def test_a_device_without_a_version_waits_and_ends_when_it_is_told(
    publisher: Publisher, process: Make, tmp_path: Path
) -> None:
    with process(["--device", str(tmp_path / "device.yaml")]) as server:
        server.wait_for(r"(trouble|stale|NotReleased|started)")
        server.running.send_signal(signal.SIGTERM)
        assert server.running.wait(200) == 130
    assert "Traceback" not in "".join(server.said)


def test_an_agent_that_cannot_start_ends_the_server_with_its_error(
    publisher: Publisher, process: Make, tmp_path: Path
) -> None:
    (tmp_path / "state").write_text("not a folder")
    with process(["--device", str(tmp_path / "device.yaml")]) as server:
        assert server.running.wait(200) == 1
    assert "error:" in "".join(server.said)
    assert "Traceback" not in "".join(server.said)
