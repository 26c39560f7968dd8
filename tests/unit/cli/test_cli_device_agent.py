"""``fedpeft device`` as typed: an agent in a process of its own, and the commands that speak to it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from federated.adapters import attach, load_base
from federated.config import AdapterConfig, ModelConfig, TaskConfig
from federated.device.journal import read_book
from federated.manifest import VersionManifest, sha256_hex
from federated.registry import Registry
from federated.release import KeyRing, Plan, Publisher, Quorum
from federated.state import to_raw
from federated.wire import encode_tensors

Command = Callable[..., Any]

PARTS = {
    "model": asdict(ModelConfig(source="tiny:bert")),
    "adapter": asdict(AdapterConfig(rank=2, target_modules="all-linear")),
    "task": asdict(TaskConfig(labels=("bad", "good"))),
    "seed": 5,
}

WAIT = ("--wait", "300")
"""Machines that run tests may be busy."""


def manifest_and_weights(number: int, parent: str | None) -> tuple[VersionManifest, bytes]:
    base = load_base(ModelConfig(source="tiny:bert"))
    adapter = attach(
        base, AdapterConfig(rank=2, target_modules="all-linear"), TaskConfig(labels=("bad", "good")), seed=5
    )
    random = torch.Generator().manual_seed(number)
    state = adapter.read()
    tensors = {name: torch.randn(t.shape, generator=random).to(t.dtype) for name, t in state.tensors.items()}
    weights = encode_tensors(to_raw(tensors))
    manifest = VersionManifest(
        sha256_hex(weights), base.base_digest, state.spec, "fedit", "run", number, parent=parent,
        adapter_id="reviews", release_counter=number, task=json.loads(json.dumps(PARTS)),
    )  # fmt: skip
    return manifest, weights


@pytest.fixture
def versions(here: Path) -> list[str]:
    """Ids of v1 and v2 in a registry; ``stable`` is at v1; a repository; a device's file."""
    ids: list[str] = []
    with Registry.open(here / "registry") as registry:
        for number in (1, 2):
            manifest, weights = manifest_and_weights(number, ids[-1] if ids else None)
            ids.append(registry.publish(manifest, weights, channel="dev"))
        registry.channel("stable").promote(ids[0])
    ring = KeyRing(here / "keys", passphrase=lambda *_: b"correct", cost=2)
    Publisher.create(here / "releases", ring, Plan(quorums={"root": Quorum()}))
    (here / "inputs.jsonl").write_text('{"text": "late again"}\n\n{"text": "thank you all"}\n')
    (here / "device.yaml").write_text(
        "device_id: shop-17\nsource: releases\nroot: keys/trusted/root.json\nstate: state\npoll_seconds: 0.3\n"
        "retry_seconds: 0.2\nprobation: {seconds: 0.2}\n"
    )
    return ids


@pytest.fixture
def typed(fedpeft: Command, here: Path, versions: list[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("FEDPEFT_PASSPHRASE", "correct")
    monkeypatch.setenv("FEDPEFT_REGISTRY", str(here / "registry"))
    return fedpeft


@pytest.fixture
def running(here: Path, typed: Command) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts ``fedpeft device run``; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "federated.cli.main", "device", "run"]
        started.append(subprocess.Popen(command, cwd=here, stderr=subprocess.PIPE, text=True, env=dict(os.environ)))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(done: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 600
    while not done():
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


def state_of(here: Path, version: str) -> str | None:
    book = read_book(here / "state")
    return None if book is None else book.state(version)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_device_follows_obeys_and_reports(typed: Command, running: Command, here: Path, versions: list[str]) -> None:
    first, second = versions
    assert "never" in typed("device", "status").out
    typed("release", "publish", "stable", "--probes", "inputs.jsonl", "--probe-tolerance", "0.001")
    process = running()
    wait_for(lambda: state_of(here, first) == "committed", process)
    assert f"{first[:12]} answers (committed)" in typed("device", "status").out
    assert "agent: running" in typed("device", "status").out
    typed("channel", "promote", "v2", "--to", "stable")
    typed("release", "publish", "stable")
    wait_for(lambda: state_of(here, second) == "committed", process)
    assert typed("device", "rollback", *WAIT).out == f"{first[:12]} answers again\n"
    assert "was overridden by hand; followed again once it moves" in typed("device", "status").out
    assert typed("device", "activate", second[:8], *WAIT).out == f"{second[:12]} answers\n"
    assert "0 versions on this device begin with 'x'" in typed("device", "activate", "x", *WAIT, code=1).err
    assert typed("device", "pin", *WAIT).out.startswith(f"the device stays at {second[:12]}")
    assert f"pinned at {second[:12]}" in typed("device", "status").out
    assert "first: fedpeft device pin --off" in typed("device", "install", *WAIT, code=1).err
    assert typed("device", "pin", "--off", *WAIT).out == "the device follows its channel\n"
    assert typed("device", "install", *WAIT).out == f"{second[:12]} answers\n"
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors
    assert re.search(rf"\d activated {first[:12]} digest=\w{{64}}\n", errors)
    assert errors.endswith(" stopped\n")
    assert "rolled_back" in typed("device", "history").out
    assert len(typed("device", "history", "--newest", "1").out.splitlines()) == 5
    typed("device", "report", "report.json")
    assert typed("registry", "devices", "report.json").out == "shop-17: held 2 versions\n"
    told = typed("registry", "devices").out
    assert first in told
    assert second in told


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_once_and_without_an_agent(typed: Command, here: Path, versions: list[str]) -> None:
    first, _ = versions
    told = typed("device", "run", "--once", code=1).err
    assert "nothing new could be looked for: NotReleased" in told
    typed("release", "publish", "stable")
    typed("device", "run", "--once")
    assert state_of(here, first) == "committed"
    assert "no agent runs on" in typed("device", "rollback").err
    typed("device", "run", "--once")
    told = typed("device", "status").out
    assert "null answers (the base alone)" in told
    assert "agent: not running" in told
    typed("device", "pin", "--off")
    typed("device", "run", "--once")
    assert f"{first[:12]} answers (committed)" in typed("device", "status").out


def test_what_is_wrong_with_probes(typed: Command, here: Path) -> None:
    for text, said in (
        ("", "holds no inputs; expected one JSON object a line"),
        ("text\n", "inputs.jsonl, line 1: expected a JSON object"),
        ("[1]\n", "found '[1]'"),
    ):
        (here / "inputs.jsonl").write_text(text)
        assert said in typed("release", "publish", "stable", "--probes", "inputs.jsonl", code=1).err
    assert "cannot read the probes' inputs" in typed("release", "publish", "stable", "--probes", "no", code=1).err


def test_what_is_wrong_with_a_device(typed: Command, here: Path) -> None:
    assert "cannot read the device's configuration" in typed("device", "status", "--config", "none.yaml", code=2).err
    assert "choose one of them" in typed("device", "pin", "abc", "--off", code=1).err
    assert "cannot write none/report.json" in typed("device", "report", "none/report.json", code=1).err
    assert "cannot read none.json" in typed("registry", "devices", "none.json", code=1).err
    (here / "report.json").write_text("{}")
    assert "that is no device's report" in typed("registry", "devices", "report.json", code=1).err


def test_an_agent_that_does_not_answer(typed: Command, here: Path) -> None:
    from federated.device.agent_lock import StateLock

    lock = StateLock(here / "state")
    lock.take()
    told = typed("device", "pin", "--wait", "0.2", code=1).err
    lock.release()
    assert "did not answer within 0.2 s; the command stays" in told


def test_a_stale_device_says_so(typed: Command, here: Path) -> None:
    from datetime import UTC, datetime

    from federated.device.journal import Journal

    journal = Journal(here / "state", lambda: datetime.now(UTC))
    journal.change(fresh_until="2026-01-01T00:00:00+00:00", trouble="Unreachable: no network")
    told = typed("device", "status").out
    assert "stale: the release's metadata have ended" in told
    assert "trouble: Unreachable: no network" in told


def test_a_report_with_versions_that_the_registry_lacks(typed: Command, here: Path) -> None:
    held = {"from": "2026-11-20T12:00:00+00:00", "to": "2026-11-20T12:00:00+00:00"}
    versions = [
        {"version_id": "f" * 64, "state": "committed", "reason": "", "held": held},
        {"version_id": "e" * 64, "state": "failed", "reason": "no effect"},
    ]
    (here / "report.json").write_text(json.dumps({"format": 1, "device_id": "shop-17", "versions": versions}))
    assert typed("registry", "devices", "report.json").out == (
        f"shop-17: held 1 versions, 1 unknown here\nshop-17: {'e' * 12} failed: no effect\n"
    )
