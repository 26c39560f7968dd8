"""Where a server gets versions from: a store on this device, asked by a version's name. Never a path or URL.

`RegistrySource` asks an open registry that is handed in, so that neither SQLAlchemy nor a database is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from federated.device.serving.faults import ApiError
from federated.manifest import VersionManifest

if TYPE_CHECKING:
    from federated.registry import Registry

__all__ = ["Offer", "RegistrySource", "Source", "check_version_name"]

_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]{0,199}")


@dataclass(frozen=True)
class Offer:
    """A version that can be installed.

    Args:
        version_id: digest of its manifest.
        label: short name for people (``"v3"``).
        manifest: its record.
        weights: gets its canonical bytes.
    """

    version_id: str
    label: str
    manifest: VersionManifest
    weights: Callable[[], bytes]


class Source(Protocol):
    """A store of versions on this device; asked from any thread."""

    def find(self, version: str) -> Offer:
        """The version of a name, as it is now.

        Raises:
            FederatedError: if there is none, or the store cannot be read.
        """
        ...


class RegistrySource:
    """Versions of an open registry.

    Args:
        registry: stays the caller's to close.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def find(self, version: str) -> Offer:
        """The version of a name as in `Registry.get`.

        Raises:
            RegistryError: if there is none, or the registry cannot be read.
        """
        record = self._registry.get(version)
        return Offer(
            record.version_id,
            f"v{record.number}",
            record.manifest,
            lambda: self._registry.weights(record.version_id),
        )


def check_version_name(name: str) -> str:
    """A name that a store may be asked for.

    Raises:
        ApiError: for a path, a URL or anything else.
    """
    if not _VERSION.fullmatch(name) or ".." in name:
        raise ApiError(
            f"{name[:160]!r} is no version's name; expected latest, v3, RUN:v3, a channel, a tag or the beginning of a "
            "version id of this server's own store. Paths and URLs are refused: a request that could name one could "
            "make this server read whatever it can reach. Publish the adapter into the store first",
            code="not_a_version_name",
            param="lora_path",
        )
    return name
