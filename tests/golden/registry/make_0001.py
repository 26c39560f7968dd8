"""How ``form-0001.sql`` was made: ``python make_0001.py > form-0001.sql``.

It runs against the library as it was before the second form, and no other; the dump is what is kept.
"""

import sqlite3
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from federated.manifest import AdapterSpec, ModuleSpec, VersionManifest, sha256_hex
from federated.registry import Registry

SPEC = AdapterSpec("lora", 2, 4.0, False, (ModuleSpec("layer", 4, 4, 2, 4.0),))


def clock() -> datetime:
    return datetime(2026, 1, 1, tzinfo=UTC)


with tempfile.TemporaryDirectory() as name:
    with Registry.open(name, clock=clock) as registry:
        parent = None
        for number in range(3):
            weights = f"weights {number}".encode()
            manifest = VersionManifest(
                sha256_hex(weights), "b" * 64, SPEC, "fedit + sgd", "old-run", number, parent=parent,
                participants=number, metrics={"train_loss": 1.5 - number}, code_version="0.1.0",
            )  # fmt: skip
            channel = "dev" if number else None
            parent = registry.publish(manifest, weights, training_state=f"state {number}".encode(), channel=channel)
        registry.move_channel("stable", "v1", expected=None)
    dumped = sqlite3.connect(Path(name) / "registry.db")
    sys.stdout.write("".join(f"{line}\n" for line in dumped.iterdump()))
    dumped.close()
