"""Signed releases: what publishing costs, and what a device fetches, over real HTTP on this machine.

    python simulations/benchmarks/release.py [--quick] [--seed N]

First a repository with one channel of a few versions of 5 MB: publishing one (hash, copy, flush, sign, verify again;
keys already open), a device's first check and install, a check with nothing new, an update. Then a channel of 50,000
small files (two to a version) in hash bins: the metadata that a device fetches for the current version, and for one of
the older ones. That channel is signed in memory and served from there. 1,000,000 files are calculated from the bytes
per file and per bin that were measured; so are the 50,000, which shows what the calculation is worth.

Bytes are of bodies; ``gzip`` is what a server that compresses would send of the same. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.table import Table

from federated.manifest import AdapterSpec, ModuleSpec, VersionManifest, sha256_hex
from federated.release import Artefact, KeyRing, Plan, Publisher, ReleaseClient, shelf
from federated.release.edition import Edition

__all__ = ["main"]

BYTES = 5_000_000
FILES, BINS = 50_000, 1024
MILLION, MILLION_BINS = 1_000_000, (1024, 4096, 16_384)
STEPS = ("cold_check", "cold_install", "warm_check", "warm_install")
LAYERS = 24
"""Layers in a manifest's adapter spec, about those of a small language model with two adapted projections each."""


@dataclass
class Traffic:
    """What went over the wire: name, bytes, and bytes if metadata are compressed; what was not there has none."""

    bodies: list[tuple[str, int, int]] = field(default_factory=list)

    def total(self) -> tuple[int, int]:
        """Bytes, and bytes compressed."""
        return sum(size for _, size, _ in self.bodies), sum(packed for _, _, packed in self.bodies)


@contextmanager
def served(read: Callable[[str], bytes | None]) -> Iterator[tuple[str, Traffic]]:
    """A web server for files by name; yields its URL and what it sent."""
    traffic = Traffic()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm: ClassVar[bool] = True

        def do_GET(self) -> None:
            name = self.path.lstrip("/")
            data = read(name)
            body = data or b""
            packed = len(gzip.compress(body)) if body and name.startswith("metadata/") else len(body)
            traffic.bodies.append((name, len(body), packed))  # first: the client may look as soon as it has all
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", traffic
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def large_artefact(weights: bytes, number: int) -> Artefact:
    """A version with a manifest of ordinary size."""
    names = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(LAYERS) for name in ("q", "v")]
    spec = AdapterSpec("lora", 8, 16.0, False, tuple(ModuleSpec(name, 1024, 1024, 8, 16.0) for name in names))
    return _artefact(weights, number, spec)


def small_artefacts(count: int) -> Iterator[Artefact]:
    """Versions whose files are a few bytes: only their number counts."""
    spec = AdapterSpec("lora", 8, 16.0, False, ())
    return (_artefact(number.to_bytes(4, "big"), number, spec) for number in range(count))


def _artefact(weights: bytes, number: int, spec: AdapterSpec) -> Artefact:
    manifest = VersionManifest(
        weights_digest=sha256_hex(weights),
        base_digest="b" * 64,
        spec=spec,
        method="fedit",
        run_id="run",
        round_number=number,
        adapter_id="reviews",
        release_counter=number + 1,
    )
    return Artefact(manifest, weights)


def milliseconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1000


def ring_in(folder: Path) -> KeyRing:
    """Keys that open quickly: how long that takes is the choice of scrypt's cost, and is not measured here."""
    return KeyRing(folder, passphrase=lambda *_: b"benchmark", cost=2)


def large_files(folder: Path, repeats: int, rng: random.Random) -> dict[str, Any]:
    """Versions of 5 MB: publishing, and what a device does."""
    publisher = Publisher.create(folder / "releases", ring_in(folder / "keys"), Plan(channels=("stable",)))
    first, *artefacts, last = (large_artefact(rng.randbytes(BYTES), number) for number in range(repeats + 2))
    publisher.publish("stable", first)
    publishing = []
    for one in artefacts:
        began = time.perf_counter()
        publisher.publish("stable", one)
        publishing.append((time.perf_counter() - began) * 1000)
    result: dict[str, Any] = {"publish_5mb_ms": statistics.median(publishing)}
    root = publisher.trusted_root

    def read(name: str) -> bytes | None:
        path = publisher.folder / name
        return path.read_bytes() if path.is_file() else None

    with served(read) as (url, traffic):
        rounds = [_four_steps(root, url, folder / f"device{repeat}", traffic) for repeat in range(repeats)]
        publisher.publish("stable", last)
        client = ReleaseClient(root, url, folder / "device0")
        check, install = _measured(client, _check, traffic), _measured(client, _install, traffic)
    for place, name in enumerate(STEPS):
        steps = [one[place] for one in rounds]
        result[f"{name}_ms"] = statistics.median(step[0] for step in steps)
        result |= {f"{name}_bytes": steps[-1][1], f"{name}_requests": steps[-1][2]}
    return result | {"update_metadata_bytes": check[1], "update_requests": check[2] + install[2]}


def _four_steps(root: Path, url: str, state: Path, traffic: Traffic) -> list[tuple[float, int, int]]:
    """A new device, and the same again after a restart."""
    found = []
    for _ in range(2):
        client = ReleaseClient(root, url, state)
        found += [_measured(client, _check, traffic), _measured(client, _install, traffic)]
    return found


def _check(client: ReleaseClient) -> None:
    client.refresh()
    client.resolve("stable")


def _install(client: ReleaseClient) -> None:
    client.download(client.resolve("stable"))


def _measured(client: ReleaseClient, step: Callable[[ReleaseClient], None], traffic: Traffic) -> tuple[float, int, int]:
    traffic.bodies.clear()
    took = milliseconds(lambda: step(client))
    return took, traffic.total()[0], len(traffic.bodies)


@dataclass(frozen=True)
class Many:
    """A large channel.

    Args:
        seconds: to list and sign it.
        check, older: bytes of metadata of a first check, and of looking up an older version besides.
        check_packed, older_packed: the same, compressed.
        name, empty, file: bytes of a bin in the snapshot, of a bin without files, and of a file in its bin.
    """

    seconds: float
    check: int
    older: int
    check_packed: int
    older_packed: int
    name: float
    empty: float
    file: float

    def calculated(self, files: int, bins: int) -> tuple[int, int]:
        """`check` and `older` of another channel: two of the bins are fetched for the latter."""
        check = self.check + (bins - BINS) * self.name
        return round(check), round(check + 2 * (self.empty + files / bins * self.file))


def many_files(folder: Path) -> Many:
    """Sign a channel of so many files, and let a device look at it."""
    ring = ring_in(folder / "keys")
    plan = Plan(channels=("stable",), bins=BINS, bins_past=0)
    publisher = Publisher.create(folder / "releases", ring, plan)
    edition = Edition.open(publisher.folder, ring)
    artefacts = list(small_artefacts(FILES // 2))
    began = time.perf_counter()
    shelf.add(edition, "stable", artefacts)
    signed = edition.signed(ring, datetime.now(UTC))
    seconds = time.perf_counter() - began

    def read(name: str) -> bytes | None:
        path = publisher.folder / name
        return signed.get(name) or (path.read_bytes() if path.is_file() else None)

    with served(read) as (url, traffic):
        client = ReleaseClient(publisher.trusted_root, url, folder / "device")
        _check(client)
        check, check_packed = traffic.total()
        client.resolve("stable", artefacts[len(artefacts) // 2].version_id)
        older, older_packed = traffic.total()
    return Many(seconds, check, older, check_packed, older_packed, *_parts(signed))


def _parts(signed: Mapping[str, bytes]) -> tuple[float, float, float]:
    (snapshot,) = [data for name, data in signed.items() if name.endswith(".snapshot.json")]
    names = json.loads(snapshot)["signed"]["meta"].items()
    listed = [json.dumps({name: meta}, separators=(",", ":")) for name, meta in names if ".bin-" in name]
    bins = [data for name, data in signed.items() if ".bin-" in name]
    bare = json.loads(bins[0])
    bare["signed"]["targets"] = {}
    empty = len(json.dumps(bare, separators=(",", ":")))
    return sum(map(len, listed)) / BINS - 1, empty, (sum(map(len, bins)) - BINS * empty) / FILES


def show(large: Mapping[str, Any], many: Many) -> None:
    """All of it for people."""
    table = Table("5 MB version", "ms", "bytes", "requests")
    table.add_row("publish", f"{large['publish_5mb_ms']:.0f}", "", "")
    for name in STEPS:
        cells = (f"{large[f'{name}_ms']:.1f}", f"{large[f'{name}_bytes']:,}", str(large[f"{name}_requests"]))
        table.add_row(name.replace("_", ", "), *cells)
    table.add_row("update", "", f"{large['update_metadata_bytes']:,} of metadata", str(large["update_requests"]))
    console = Console(width=120)
    console.print(table)
    table = Table("files", "bins", "metadata of a check", "gzip", "with an older version", "gzip")
    sizes = (many.check, many.check_packed, many.older, many.older_packed)
    table.add_row(f"{FILES:,}", f"{BINS:,}", *(f"{size:,}" for size in sizes))
    for files, bins in ((FILES, BINS), *((MILLION, count) for count in MILLION_BINS)):
        check, older = many.calculated(files, bins)
        table.add_row(f"{files:,}", f"{bins:,} (calculated)", f"{check:,}", "", f"{older:,}", "")
    console.print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: three repeats in place of twenty")
    parser.add_argument("--seed", type=int, default=0, help="of the weights' bytes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        rng = random.Random(options.seed)  # noqa: S311 - no secrets
        large = large_files(Path(place, "large"), 3 if options.quick else 20, rng)
        many = many_files(Path(place, "many"))
    show(large, many)
    million = {str(count): many.calculated(MILLION, count) for count in MILLION_BINS}
    result = {name: round(value, 1) for name, value in large.items()}
    result |= {
        "sign_50k_seconds": round(many.seconds, 1),
        "metadata_bytes_50k": many.check,
        "metadata_gzip_bytes_50k": many.check_packed,
        "metadata_older_version_bytes_50k": many.older,
        "calculated_over_measured_50k": round(many.calculated(FILES, BINS)[1] / many.older, 3),
        "metadata_bytes_1m": {bins: check for bins, (check, _) in million.items()},
        "metadata_older_version_bytes_1m": {bins: older for bins, (_, older) in million.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
