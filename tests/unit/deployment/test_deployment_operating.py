"""The operator's process serves the status page while it works, and works without it where its port is taken."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from federated.deployment import operating
from federated.deployment.loopback import free_ports
from federated.deployment.operating import keep
from federated.deployment.runs import Runs, Submission
from federated.deployment.server_config import ServerConfig, write_server_config


@contextmanager
def working(folder: Path, port: int) -> Iterator[threading.Thread]:
    write_server_config(folder, ServerConfig(name="clinics", insecure=True, status_port=port))
    stop = threading.Event()
    thread = threading.Thread(target=keep, args=(folder, stop))
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()


def status(port: int) -> dict[str, object]:
    for _ in range(600):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request("GET", "/api/status")
            found: dict[str, object] = json.loads(connection.getresponse().read())
            return found
        except ConnectionRefusedError:
            threading.Event().wait(0.05)
        finally:
            connection.close()
    raise TimeoutError("no status page in 30 s")


def test_the_page_is_there_while_the_operator_works(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with working(tmp_path, port):
        assert status(port)["federation"] == "clinics"
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_port_that_is_taken_costs_the_page_and_not_the_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with caplog.at_level(logging.WARNING), working(tmp_path, taken.getsockname()[1]) as thread:
            thread.join(0.5)
            assert thread.is_alive()
    assert "choose another status_port" in caplog.text


def test_a_full_disk_ends_nothing_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    said: dict[str, str] = {}
    for _ in range(3):
        operating._tried("the runs", said, full)
    assert caplog.text.count("No space left on device") == 1


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"name": 7}', "\x00"])
def test_a_record_that_cannot_be_read_keeps_no_other_run_from_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, record: str
) -> None:
    monkeypatch.setattr(operating, "_LOOK", 0.02)
    kept, before = [], Runs.keep_going
    (tmp_path / "runs").mkdir()
    for name, text in (("a", record), ("b", json.dumps(asdict(Submission("b", (), "app", "ab"))))):
        (tmp_path / "runs" / f"{name}.json").write_text(text)

    def keep_going(runs: Runs, name: str, *, ask: bool) -> Submission | None:
        if name == "b":
            kept.append(name)
            return None
        return before(runs, name, ask=ask)

    monkeypatch.setattr(Runs, "keep_going", keep_going)
    with caplog.at_level(logging.WARNING), working(tmp_path, free_ports(1)[0]):
        end = time.monotonic() + 30
        while len(kept) < 3:
            assert time.monotonic() < end
            time.sleep(0.02)
    assert caplog.text.count("cannot look after run a") == 1
