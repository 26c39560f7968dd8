"""Repositories in temporary folders, keys that open quickly, a clock that tests set, and artefacts of any bytes."""

import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from federated.manifest import AdapterSpec, ModuleSpec, VersionManifest, sha256_hex
from federated.release import Artefact, KeyRing, Plan, Publisher, ReleaseClient

BASE = "b" * 64
START = datetime(2026, 11, 20, 12, tzinfo=UTC)
SPEC = AdapterSpec("lora", 2, 4.0, False, (ModuleSpec("layer", 4, 4, 2, 4.0),))


class Clock:
    """Stands still until somebody moves it."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now

    def forward(self, **kwargs: float) -> None:
        self.now += timedelta(**kwargs)


def passphrase(name: str, new: bool) -> bytes:
    return f"passphrase of {name}".encode()


def ring_of(*folders: Path) -> KeyRing:
    return KeyRing(*folders, passphrase=passphrase, cost=2)


def artefact_of(weights: bytes, files: dict[str, bytes] | None = None, **fields: Any) -> Artefact:
    values = {
        "weights_digest": sha256_hex(weights),
        "base_digest": BASE,
        "spec": SPEC,
        "method": "fedit+sgd",
        "run_id": "run-a",
        "round_number": 0,
    }
    return Artefact(VersionManifest(**(values | fields)), weights, files or {})


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with its keys and nothing published: copied, which is quicker than made."""
    folder = tmp_path_factory.mktemp("template")
    Publisher.create(folder / "releases", ring_of(folder / "keys"), clock=Clock())
    return folder


@pytest.fixture
def place(template: Path, tmp_path: Path) -> Path:
    """A folder with ``releases`` and ``keys``."""
    return Path(shutil.copytree(template, tmp_path / "place"))


@pytest.fixture
def ring(place: Path) -> KeyRing:
    return ring_of(place / "keys")


@pytest.fixture
def publisher(place: Path, ring: KeyRing, clock: Clock) -> Publisher:
    return Publisher(place / "releases", ring, clock=clock)


@pytest.fixture
def make(tmp_path: Path, clock: Clock) -> Callable[..., Publisher]:
    """A repository of another plan."""

    def run(**plan: Any) -> Publisher:
        return Publisher.create(tmp_path / "made", ring_of(tmp_path / "made-keys"), Plan(**plan), clock=clock)

    return run


@pytest.fixture
def device(publisher: Publisher, tmp_path: Path, clock: Clock) -> Callable[..., ReleaseClient]:
    """A device by name; the same name is the same device."""

    def run(name: str = "device", source: Any = None, **options: Any) -> ReleaseClient:
        root = options.pop("root", publisher.trusted_root)
        return ReleaseClient(root, source or publisher.folder, tmp_path / name, **{"clock": clock, **options})

    return run
