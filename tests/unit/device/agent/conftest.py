"""A publisher, a backend without a model, and devices whose clock and time stand still until a test moves them."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from federated.device import AdapterRuntime, Agent, DeviceConfig
from federated.device.agent_commands import Mailbox
from federated.device.agent_events import read_events
from federated.device.journal import Book, read_book
from federated.errors import ModelError
from federated.manifest import AdapterSpec, ModuleSpec, RawTensor, VersionManifest, sha256_hex
from federated.release import Artefact, KeyRing, Plan, Publisher, Quorum
from federated.wire import encode_tensors

BASE = "b" * 64
START = datetime(2026, 11, 20, 12, tzinfo=UTC)
SPEC = AdapterSpec("lora", 2, 4.0, False, (ModuleSpec("layer", 4, 4, 2, 4.0),))


class Time:
    """The clock, and the seconds that never go back."""

    def __init__(self) -> None:
        self.now = START
        self.seconds = 0.0

    def __call__(self) -> datetime:
        return self.now

    def monotonic(self) -> float:
        return self.seconds

    def forward(self, **kwargs: float) -> None:
        self.now += timedelta(**kwargs)
        self.seconds += timedelta(**kwargs).total_seconds()


@dataclass
class Backend:
    """Its model is the adapter's first number; null is 0.

    Args:
        fails: by that number, what happens when such a version is loaded.
        answers: by that number, what it answers in its place.
    """

    base_digest: str = BASE
    fails: dict[float, Exception] = field(default_factory=dict)
    answers: dict[float, Any] = field(default_factory=dict)
    built: list[float] = field(default_factory=list)

    def null(self) -> float:
        return 0.0

    def check(self, manifest: VersionManifest) -> None:
        pass

    def build(self, spec: AdapterSpec, tensors: Mapping[str, RawTensor]) -> float:
        value = float(tensors["layer.factor_a"].array.flat[0])
        self.built.append(value)
        if value in self.fails:
            raise self.fails[value]
        return value

    def nbytes(self, handle: float) -> int:
        return 0

    def predict(self, handle: float, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        return [self.answers.get(handle, handle) for _ in rows]


def artefact(value: float, size: int = 4, files: dict[str, bytes] | None = None, **fields: Any) -> Artefact:
    """A version whose answer is ``value``; its release counter too."""
    weights = encode_tensors({"layer.factor_a": RawTensor.from_array(np.full((2, size), value, np.float32))})
    known = {"adapter_id": "reviews", "release_counter": int(value), **fields}
    base = known.pop("base_digest", BASE)
    return Artefact(
        VersionManifest(sha256_hex(weights), base, SPEC, "m", "run", int(value), **known), weights, files or {}
    )


class Gone:
    """The journal of a process that is no more."""

    def change(self, **_: Any) -> None:
        pass


class Yard:
    """A publisher and devices of its releases."""

    def __init__(self, folder: Path, time: Time) -> None:
        self.folder = folder
        self.time = time
        self.publisher = Publisher(folder / "releases", ring_of(folder), clock=time)
        self.backend = Backend()
        self.runtime = AdapterRuntime(self.backend)
        self.state = folder / "state"
        self.opened = 0
        self.no_base = False

    def publish(self, value: float, **options: Any) -> str:
        made = artefact(value, **options)
        self.publisher.publish("stable", made)
        return made.version_id

    def config(self, **changes: Any) -> DeviceConfig:
        known = {"device_id": "shop-17", "source": str(self.folder / "releases"), "state": self.state}
        return DeviceConfig(**{**known, "root": self.publisher.trusted_root, **changes})

    def agent(self, source: Any = None, **changes: Any) -> Agent:
        return Agent(
            self.config(**changes), self.runtime_of, source=source, clock=self.time, monotonic=self.time.monotonic
        )

    def runtime_of(self, manifest: VersionManifest) -> AdapterRuntime:
        self.opened += 1
        if self.no_base:
            raise ModelError("the base is on a disk that is not there")
        return self.runtime

    @contextmanager
    def started(self, source: Any = None, **changes: Any) -> Iterator[Agent]:
        """An agent after a start of the device: nothing is in memory."""
        self.reboot()
        with self.agent(source, **changes) as agent:
            yield agent

    def reboot(self) -> None:
        self.runtime = AdapterRuntime(self.backend)

    def crash(self, agent: Agent) -> None:
        """What a kill leaves: the lock is let go, and nothing is written."""
        agent._lock.release()
        agent._journal = Gone()
        agent._steps.tell = lambda *_, **__: None
        self.reboot()

    def settled(self, agent: Agent, value: float, **options: Any) -> str:
        """A version that was released, taken and committed."""
        version_id = self.publish(value, **options)
        assert agent.poll()
        self.time.forward(seconds=61)
        agent.tick()
        assert self.state_of(version_id) == "committed"
        return version_id

    def command(self, agent: Agent, verb: Any, version: str = "") -> tuple[bool, str]:
        """What an agent answers to a command."""
        name = Mailbox(self.state / "commands").send(verb, version)
        agent.tick()
        reply = next(one for one in self.book.replies if one.name == name)
        return reply.done, reply.message

    @property
    def answer(self) -> float:
        return float(self.runtime.predict([{}]).predictions[0])

    @property
    def book(self) -> Book:
        book = read_book(self.state)
        assert book is not None
        return book

    def state_of(self, version_id: str) -> str | None:
        return self.book.state(version_id)

    @property
    def events(self) -> list[str]:
        return [one["event"] for one in read_events(self.state)]


def ring_of(folder: Path) -> KeyRing:
    return KeyRing(folder / "keys", passphrase=lambda *_: b"passphrase", cost=2)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("yard")
    Publisher.create(folder / "releases", ring_of(folder), Plan(quorums={"root": Quorum()}), clock=Time())
    return folder


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def yard(template: Path, tmp_path: Path, time: Time) -> Yard:
    shutil.copytree(template, tmp_path / "yard")
    return Yard(tmp_path / "yard", time)


@pytest.fixture
def make() -> Callable[..., Artefact]:
    return artefact
