"""Signed releases: what devices can trust, whoever serves it, and how a publisher keeps it so.

Two sides that share little: `Publisher` with a `KeyRing` makes a folder of static files (TUF), `ReleaseClient` checks
and fetches from any copy of it. Neither knows torch or a database; nothing else in the library knows TUF.
"""

import importlib.util

from federated.errors import ReleaseError

if None in map(importlib.util.find_spec, ("tuf", "securesystemslib", "zstandard")):
    raise ReleaseError("signed releases need the release extra; run: pip install 'federated-peft[release]'")

from federated.release.artefact import Artefact
from federated.release.bundle import Bundle
from federated.release.client import Download, ReleaseClient, ReleasedVersion
from federated.release.keys import KeyRing, Passphrase
from federated.release.publisher import Publisher
from federated.release.records import ReleaseRecord, Variant
from federated.release.roles import Plan, Quorum
from federated.release.source import FolderSource, HttpSource, Source
from federated.release.status import ChannelStatus, RoleStatus, Status
from federated.release.variants import TOLERANCE, Tried, with_variants
from federated.release.workflow import Limits

__all__ = [
    "Artefact",
    "Bundle",
    "ChannelStatus",
    "Download",
    "FolderSource",
    "HttpSource",
    "KeyRing",
    "Limits",
    "Passphrase",
    "Plan",
    "Publisher",
    "Quorum",
    "ReleaseClient",
    "ReleaseRecord",
    "ReleasedVersion",
    "RoleStatus",
    "Source",
    "Status",
    "TOLERANCE",
    "Tried",
    "Variant",
    "with_variants",
]
