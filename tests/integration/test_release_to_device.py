"""A registry's version, promoted, released, served by any web server, and answering on a device; and back again."""

import functools
import http.server
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from federated.device import AdapterRuntime
from federated.errors import BaseMismatch, BelowSecurityFloor
from federated.manifest import AdapterSpec, ModuleSpec, RawTensor, VersionManifest, sha256_hex
from federated.registry import AuditHead, Registry
from federated.release import Artefact, KeyRing, Plan, Publisher, Quorum, ReleaseClient
from federated.wire import encode_tensors

BASE = "b" * 64
SPEC = AdapterSpec("lora", 2, 4.0, False, (ModuleSpec("layer", 4, 4, 2, 4.0),))


class Sum:
    """A backend whose model is the sum of an adapter's numbers."""

    def __init__(self, base_digest: str = BASE) -> None:
        self.base_digest = base_digest

    def null(self) -> float:
        return 0.0

    def check(self, manifest: VersionManifest) -> None:
        pass

    def build(self, spec: AdapterSpec, tensors: Mapping[str, RawTensor]) -> float:
        return float(sum(tensor.array.sum() for tensor in tensors.values()))

    def nbytes(self, handle: float) -> int:
        return 100

    def predict(self, handle: float, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        return [handle for _ in rows]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Python's own file server."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """Versions v1 to v3, whose numbers sum up to 8, 16 and 24."""
    with Registry.open(tmp_path / "registry") as opened:
        parent = None
        for number in (1, 2, 3):
            tensor = RawTensor.from_array(np.full((2, 4), number, dtype=np.float32))
            weights = encode_tensors({"layer.factor_a": tensor})
            counted = {"adapter_id": "reviews", "release_counter": opened.next_counter("reviews")}
            manifest = VersionManifest(sha256_hex(weights), BASE, SPEC, "m", "run", number, parent=parent, **counted)
            parent = opened.publish(manifest, weights, channel="dev")
        yield opened


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    ring = KeyRing(tmp_path / "keys", passphrase=lambda *_: b"passphrase", cost=2)
    return Publisher.create(tmp_path / "releases", ring, Plan(quorums={"root": Quorum()}))


@pytest.fixture
def url(publisher: Publisher) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(publisher.folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def released(publisher: Publisher, registry: Registry, channel: str) -> None:
    artefact = Artefact.of(registry, channel)
    publisher.publish(channel, artefact, audit_head=str(registry.audit.head()))


def installed(client: ReleaseClient, runtime: AdapterRuntime) -> float:
    """Refresh, install and activate what ``stable`` points at; what the device answers then."""
    client.refresh()
    files = client.download(client.resolve("stable"))
    slot = runtime.install(
        files.manifest, files.weights.read_bytes(), version_id=files.version.record.version_id, label="stable"
    )
    runtime.activate(slot.digest)
    (answer,) = runtime.predict([{}]).predictions
    return float(answer)


def test_forward_back_and_revoked(registry: Registry, publisher: Publisher, url: str, tmp_path: Path) -> None:
    client, runtime = ReleaseClient(publisher.trusted_root, url, tmp_path / "device"), AdapterRuntime(Sum())
    stable = registry.channel("stable")
    for version, answer in (("v1", 8.0), ("v2", 16.0), ("v3", 24.0)):
        stable.promote(version)
        released(publisher, registry, "stable")
        assert installed(client, runtime) == answer
    stable.rollback()
    released(publisher, registry, "stable")
    assert installed(client, runtime) == 16.0
    found = client.resolve("stable").record
    assert (found.release_counter, found.adapter_id) == (2, "reviews")
    assert registry.audit.verify(AuditHead.parse(found.audit_head)) == []
    publisher.revoke_version(found.version_id)
    with pytest.raises(BelowSecurityFloor):
        installed(client, runtime)
    assert runtime.predict([{}]).predictions == [16.0]  # what runs goes on: whether it may, the device asks
    with pytest.raises(BelowSecurityFloor):
        client.require_allowed(found)
    stable.promote("v3")
    released(publisher, registry, "stable")
    assert installed(client, runtime) == 24.0


def test_a_device_with_another_base_installs_nothing(
    registry: Registry, publisher: Publisher, url: str, tmp_path: Path
) -> None:
    released(publisher, registry, "dev")
    client, runtime = ReleaseClient(publisher.trusted_root, url, tmp_path / "device"), AdapterRuntime(Sum("c" * 64))
    found = client.resolve("dev")
    assert found.record.base_digest != runtime.backend.base_digest  # known before anything is fetched
    files = client.download(found)
    with pytest.raises(BaseMismatch):
        runtime.install(files.manifest, files.weights.read_bytes(), version_id=found.record.version_id)
