"""Bytes through the door, by the key that a node authenticates itself with; kept over restarts of the door."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

from federated.files import write_whole

__all__ = ["STRANGERS", "Flow", "Traffic", "key_name"]

_LOG = logging.getLogger(__name__)
_MOST_KEYS = 10_000

STRANGERS = "strangers"
"""The counter of requests that the SuperLink did not grant: anybody can invent keys."""


@dataclass
class Flow:
    """What went through for one key, in bytes of bodies.

    Args:
        up: from the device.
        down: to the device.
        requests: how many.
        last: seconds since the epoch.
    """

    up: int = 0
    down: int = 0
    requests: int = 0
    last: float = 0.0


@dataclass
class Traffic:
    """Bytes by key, since the deployment was made; written down every few seconds.

    Args:
        path: where it is kept.
    """

    path: Path
    flows: dict[str, Flow] = field(default_factory=dict)
    refused: int = 0

    @classmethod
    def of(cls, path: Path) -> Traffic:
        """Go on from what was written; a damaged file begins anew, and is said."""
        try:
            found = json.loads(path.read_text())
            return cls(path, {key: Flow(**one) for key, one in found["flows"].items()}, int(found["refused"]))
        except FileNotFoundError:
            return cls(path)
        except (ValueError, KeyError, TypeError, OSError, AttributeError) as error:
            _LOG.warning("%s cannot be read (%r): the count of bytes begins anew", path, error)
            return cls(path)

    def flow(self, key: str, *, let_in: bool = True) -> Flow:
        """The counters of a key.

        Args:
            key: that a node says it has.
            let_in: whether the SuperLink took it; strangers share a counter, and so do keys beyond more than anybody
                has devices.
        """
        if key not in self.flows and not (let_in and len(self.flows) < _MOST_KEYS):
            key = STRANGERS
        return self.flows.setdefault(key, Flow())

    def note(self) -> None:
        """Write it down."""
        plain = {"flows": {key: asdict(flow) for key, flow in self.flows.items()}, "refused": self.refused}
        write_whole(self.path, json.dumps(plain).encode())


def key_name(header: str) -> str:
    """A short name of the key that a node authenticates itself with: the SHA-256 of its bytes; empty for none."""
    try:
        return hashlib.sha256(base64.b64decode(header, validate=True)).hexdigest() if header else ""
    except (binascii.Error, ValueError):
        return ""
