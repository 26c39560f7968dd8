"""A server over a backend without any model, on a free port of this machine, for as long as a test runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from federated.device import AdapterRuntime, Embedding, Prompt, Sampling, Stream, Token
from federated.device.serving import (
    Control,
    Directory,
    Limits,
    Listener,
    Offer,
    Service,
    Tokens,
    admin_listener,
    public_listener,
    serve,
)
from federated.errors import DataError, DeviceError, VersionNotFound
from federated.manifest import AdapterSpec, ModuleSpec, RawTensor, VersionManifest, sha256_hex
from federated.wire import encode_tensors

SPEC = AdapterSpec("lora", 2, 4.0, False, (ModuleSpec("layer", 3, 3, 2, 4.0),))


@dataclass(frozen=True)
class Guess:
    """What a task predicts."""

    label: str
    probability: float
    scores: Mapping[str, float]


@dataclass
class EchoBackend:
    """Its model is one number; every answer says which. A prompt of "slow" waits for `step` before each token."""

    base_digest: str = "b" * 64
    step: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    going: threading.Event = field(default_factory=threading.Event)
    hold: threading.Event = field(default_factory=threading.Event)
    batches: list[list[tuple[float, str]]] = field(default_factory=list)
    ended: int = 0

    def null(self) -> float:
        return 0.0

    def check(self, manifest: VersionManifest) -> None:
        if manifest.method == "refused":
            raise DeviceError("another task")

    def build(self, spec: AdapterSpec, tensors: Mapping[str, RawTensor]) -> float:
        return float(tensors["layer.factor_a"].array.flat[0])

    def nbytes(self, handle: float) -> int:
        return 100 if handle else 0

    def predict(self, handle: float, rows: Sequence[Mapping[str, Any]]) -> Sequence[Any]:
        return self.predict_mixed([(handle, row) for row in rows])

    def predict_mixed(self, pairs: Sequence[tuple[float, Mapping[str, Any]]]) -> Sequence[Any]:
        self.batches.append([(handle, row.get("text", "series")) for handle, row in pairs])
        if any(row.get("text") == "hold" for _, row in pairs):
            self.going.set()
            self.hold.wait(20)
        for _, row in pairs:
            if row.get("text") == "bad":
                raise DataError("row 0 is not of this task's shape")
            if row.get("text") == "crash":
                raise RuntimeError("secret text of somebody else")
        return [Guess(f"label {handle:g}", 0.75, {f"label {handle:g}": 0.75, "other": 0.25}) for handle, _ in pairs]

    def embed(self, handle: float, texts: Sequence[str]) -> Sequence[Embedding]:
        return [Embedding((handle, float(len(text))), len(text)) for text in texts]

    def generate(self, handle: float, prompt: Prompt, sampling: Sampling) -> Stream:
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        if text == "too long":
            raise DeviceError("a prompt of 99 tokens is too long; shorten it")
        if text == "crash":
            raise RuntimeError("secret text of somebody else")
        return Stream(len(text.split()), self._tokens(handle, text, sampling))

    def _tokens(self, handle: float, text: str, sampling: Sampling) -> Iterator[Token]:
        try:
            for number in range(1, sampling.max_tokens + 1):
                if text == "slow":
                    self.going.set()
                    self.step.acquire(timeout=20)
                if text == "break" and number == 2:
                    raise RuntimeError("secret text of somebody else")
                yield Token(number, f"{handle:g} ", -0.5, "length" if number == sampling.max_tokens else None)
        finally:
            self.ended += 1


@dataclass(frozen=True)
class Version:
    manifest: VersionManifest
    weights: bytes

    @property
    def version_id(self) -> str:
        return self.manifest.version_id

    @property
    def digest(self) -> str:
        return self.manifest.weights_digest


def make_version(value: float, **changes: Any) -> Version:
    tensors = {
        "layer.factor_a": RawTensor.from_array(np.full((2, 3), value, np.float32)),
        "layer.factor_b": RawTensor.from_array(np.zeros((3, 2), np.float32)),
    }
    weights = encode_tensors(tensors)
    told = {"method": "fedit", **changes}
    return Version(VersionManifest(sha256_hex(weights), "b" * 64, SPEC, told["method"], "run", int(value)), weights)


@dataclass
class Shelf:
    """A store of versions by name."""

    names: dict[str, Version] = field(default_factory=dict)
    broken: bool = False

    def find(self, version: str) -> Offer:
        if self.broken:
            raise OSError("secret path of somebody else")
        found = self.names.get(version) or next((v for v in self.names.values() if v.version_id == version), None)
        if found is None:
            raise VersionNotFound(f"no version {version!r}")
        return Offer(found.version_id, f"v{found.manifest.round_number}", found.manifest, lambda: found.weights)


@dataclass
class Site:
    """A server that runs, and clients for both of its listeners."""

    service: Service
    backend: EchoBackend
    shelf: Shelf
    public: httpx.Client
    admin: httpx.Client

    @property
    def control(self) -> Control:
        return self.service.control

    def ask(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        told = {"prompt": "hello you"} if path == "/v1/completions" else {}
        return self.public.post(path, json={**told, **body})

    def wait_for(self, what: Callable[[], bool], seconds: float = 15) -> None:
        until = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < until, "nothing happened"
            time.sleep(0.005)

    def wait_no_pins(self) -> None:
        self.wait_for(lambda: not self.service.runtime.pins)


ADMIN = "admin-word-for-tests-0001"


@contextmanager
def running(service: Service, listeners: Sequence[Listener]) -> Iterator[None]:
    stop, started = threading.Event(), threading.Event()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            serve(service, listeners, started=started.set, stop=stop)
        except BaseException as error:
            failed.append(error)
            started.set()

    thread = threading.Thread(target=work)
    thread.start()
    started.wait(30)
    try:
        yield
    finally:
        stop.set()
        thread.join(40)
        assert not thread.is_alive()
        assert failed == []


@contextmanager
def open_site(
    *, tokens: Sequence[str] = (), limits: Limits | None = None, speaks: Any = "text", capacity: int = 8, **changes: Any
) -> Iterator[Site]:
    backend, shelf = EchoBackend(), Shelf({f"v{n}": make_version(n) for n in (1, 2, 3, 4)})
    shelf.names["stable"] = shelf.names["v1"]
    runtime = AdapterRuntime(backend, capacity=capacity)
    control = Control(runtime, Directory(runtime, "tiny:echo"), shelf, channel="stable")
    control.follow()
    service = Service(control.runtime, control, speaks=speaks, limits=limits, **{"poll_seconds": 0.05, **changes})
    public = public_listener(service, port=0, tokens=Tokens(tokens))
    admin = admin_listener(service, tokens=Tokens([ADMIN]))
    told = {"authorization": f"Bearer {tokens[0]}"} if tokens else {}
    with (
        running(service, [public, admin]),
        httpx.Client(base_url=public.place, headers=told, timeout=30) as asking,
        httpx.Client(base_url=admin.place, headers={"authorization": f"Bearer {ADMIN}"}, timeout=30) as ruling,
    ):
        yield Site(service, backend, shelf, asking, ruling)


@pytest.fixture
def site() -> Iterator[Site]:
    with open_site() as made:
        yield made


@pytest.fixture
def labels() -> Iterator[Site]:
    """A server whose task classifies."""
    with open_site(speaks="labels") as made:
        yield made


@pytest.fixture
def sites() -> Callable[..., Any]:
    return open_site


@pytest.fixture
def run_server() -> Callable[..., Any]:
    return running


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "admin.sock"


@dataclass
class Process:
    running: subprocess.Popen[str]
    said: list[str]

    def wait_for(self, pattern: str) -> str:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            found = re.search(pattern, "".join(self.said))
            if found:
                return found[1]
            assert self.running.poll() is None, "".join(self.said)
            time.sleep(0.05)
        raise AssertionError("".join(self.said))


@contextmanager
def started_process(options: Sequence[str], **variables: str) -> Iterator[Process]:
    command = [sys.executable, "-m", "federated.cli.main", "serve", "--port", "0", *options]
    environment = {**os.environ, **variables}
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    said: list[str] = []
    assert running.stderr is not None
    reader = threading.Thread(target=said.extend, args=(running.stderr,))
    reader.start()
    try:
        yield Process(running, said)
    finally:
        running.kill()
        running.wait()
        reader.join()
        running.stderr.close()


@pytest.fixture
def process() -> Callable[..., Any]:
    """``fedpeft serve`` as a process of its own."""
    return started_process
