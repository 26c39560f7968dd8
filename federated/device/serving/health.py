"""How each slot does, told to whoever decides whether a version stays. Without a word of any input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from federated.device.records import Slot
from federated.errors import FederatedError

__all__ = ["Health", "Unheard", "judged"]


class Health(Protocol):
    """Told how each slot does, by the digest of the slot; never of inputs. `federated.device.HealthReport` is one."""

    def success(self, digest: str) -> None:
        """A request that the slot answered."""
        ...

    def failure(self, digest: str, reason: str) -> None:
        """A request that the slot should have answered and did not."""
        ...


class Unheard:
    """Listens to no health."""

    def success(self, digest: str) -> None:
        """Nothing."""

    def failure(self, digest: str, reason: str) -> None:
        """Nothing."""


@contextmanager
def judged(health: Health, slot: Slot) -> Iterator[None]:
    """Report what goes wrong in a slot's work; what this library refuses on purpose is the request's fault."""
    try:
        yield
    except (FederatedError, TimeoutError):
        raise
    except Exception as error:
        health.failure(slot.digest, f"the model raised {type(error).__name__}")
        raise
