"""A deployment's authority, made once, and a clock that tests set."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from federated.deployment.certificates import Authority, make_ca, make_server_certificate


def real_now() -> datetime:
    """The machine's clock: TLS libraries look at no other."""
    return datetime.now(UTC)


@dataclass
class Clock:
    """A clock that stands still until it is moved."""

    now: datetime

    def __call__(self) -> datetime:
        return self.now

    def move(self, **by: float) -> None:
        self.now += timedelta(**by)


@pytest.fixture
def clock() -> Clock:
    """It starts now."""
    return Clock(real_now())


@dataclass(frozen=True)
class Tls:
    """Where an authority's files are."""

    folder: Path
    ca: Authority


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    """An authority with a certificate for this machine; not to be written to."""
    folder = tmp_path_factory.mktemp("tls")
    ca = make_ca(folder, name="federation of the tests", clock=real_now)
    make_server_certificate(folder, ca, hosts=["localhost", "127.0.0.1"], clock=real_now)
    return Tls(folder, ca)
