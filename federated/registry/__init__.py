"""Versions, lineage, channels and content-addressed blobs: what was published stays, and can be undone.

One door: `Registry`. It stores bytes and records; it does not know what is in an adapter (no torch), signs nothing
and talks to no network. The strategy publishes here, `fedpeft registry` reads here, a release is made from here.
"""

from federated.registry.records import Fault, VersionRecord
from federated.registry.store import Registry

__all__ = ["Registry", "VersionRecord", "Fault"]
