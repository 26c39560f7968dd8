"""Versions, lineage, channels, audit log and content-addressed blobs: what was published stays, and can be undone.

One door: `Registry`. It stores bytes and records; it does not know what is in an adapter (no torch), signs nothing
and talks to no network but the database's and the blobs' own. The strategy publishes here, `fedpeft registry` reads
here, a release is made from here.
"""

from federated.registry.audit import AuditFault, AuditHead, AuditLog
from federated.registry.audit_log import AuditEntry
from federated.registry.channel import Channel, ChannelState
from federated.registry.channels import ANYWHERE, Move
from federated.registry.collect import Collection
from federated.registry.devices import Devices, Holding
from federated.registry.difference import Difference, TensorChange
from federated.registry.evaluations import EvaluationRecord
from federated.registry.records import Fault, VersionRecord
from federated.registry.store import Registry

__all__ = [
    "ANYWHERE",
    "AuditEntry",
    "AuditFault",
    "AuditHead",
    "AuditLog",
    "Channel",
    "ChannelState",
    "Collection",
    "Devices",
    "Difference",
    "EvaluationRecord",
    "Fault",
    "Holding",
    "Move",
    "Registry",
    "TensorChange",
    "VersionRecord",
]
