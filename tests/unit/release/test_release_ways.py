"""The device's choice between ways to a version's weights, and what it does when one fails; over real HTTP too."""

import dataclasses
import functools
import http.server
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from federated.errors import BelowSecurityFloor, ReleaseError, Unreachable
from federated.manifest import sha256_hex
from federated.release import Artefact, Limits, Publisher, ReleaseClient, Variant, with_variants
from federated.release.codecs import decode, encode
from federated.release.ways import accepted, ways_to
from federated.testing.releases import Mirror
from tests.unit.release.conftest import artefact_of
from tests.unit.release.weights import versions

Device = Callable[..., ReleaseClient]
FIRST, SECOND = versions(2)
LINE = encode(FIRST, "int8").weights


def two_versions(publisher: Publisher) -> tuple[Artefact, Artefact]:
    """The first with ``lossless`` and ``int8``; the second with ways from both of what devices hold then."""
    first, _ = with_variants(artefact_of(FIRST, round_number=1), ["lossless", "int8"])
    publisher.publish("stable", first)
    codecs = ["lossless", "int4", "diff", "diff-int2", "recode-int8"]
    second, _ = with_variants(artefact_of(SECOND, round_number=2), codecs, held=publisher.held("stable"))
    publisher.publish("stable", second)
    return first, second


@pytest.fixture
def second(publisher: Publisher) -> Artefact:
    return two_versions(publisher)[1]


@pytest.fixture
def mirror(publisher: Publisher, second: Artefact) -> Mirror:
    return Mirror.of(publisher.folder)


@pytest.fixture
def held(tmp_path: Path) -> dict[str, Path]:
    """Weights files of the first version on the device: exact, and as ``int8`` gives them."""
    paths = {"exact": tmp_path / "exact.safetensors", "line": tmp_path / "line.safetensors"}
    paths["exact"].write_bytes(FIRST)
    paths["line"].write_bytes(LINE)
    return paths


def variant(artefact: Artefact, codec: str, source: bytes | None = None) -> Variant:
    digest = "" if source is None else sha256_hex(source)
    return next(one for one in artefact.variants if (one.codec, one.source) == (codec, digest))


@pytest.mark.parametrize(
    ("prefer", "holding", "way"),
    [
        ("exact", [], "lossless"),
        ("exact", ["exact"], "diff"),
        ("exact", ["line"], "diff"),
        ("smallest", [], "int4"),
        ("smallest", ["exact"], "recode-int8"),
        ("smallest", ["line"], "diff-int2"),
        ("int4", [], "int4"),
        ("int4", ["line"], "int4"),
        ("int8", ["line"], "diff-int2"),
        ("int8", [], "int8"),
        ("bf16", [], "lossless"),
    ],
)
def test_the_smallest_signed_way(
    mirror: Mirror, second: Artefact, device: Device, held: dict[str, Path], prefer: str, holding: list[str], way: str
) -> None:
    client = device(source=mirror)
    found = client.resolve("stable")
    files = client.download(found, prefer=prefer, holding=[held[name] for name in holding])
    sources = ["", *(_digest(held[name]) for name in holding)]
    chosen = [len(second.files[one.file]) for one in second.variants if one.codec == way and one.source in sources]
    data = files.weights.read_bytes()
    assert (files.way, files.setbacks) == (way, ())
    assert sha256_hex(data) == files.weights_digest
    assert files.weights_digest in found.record.digests
    assert (files.weights_digest == files.manifest.weights_digest) == (way in ("lossless", "diff"))
    assert files.nbytes == min(chosen) < len(data)


def _digest(path: Path) -> str:
    return sha256_hex(path.read_bytes())


def test_without_variants_the_full_file_comes(publisher: Publisher, device: Device) -> None:
    publisher.publish("stable", artefact_of(b"one"))
    client = device()
    files = client.download(client.resolve("stable"), prefer="smallest")
    assert (files.way, files.nbytes, files.weights.read_bytes()) == ("weights", 3, b"one")


def test_what_is_here_is_not_fetched(mirror: Mirror, second: Artefact, device: Device, tmp_path: Path) -> None:
    client = device(source=mirror)
    found = client.resolve("stable")
    first = client.download(found, prefer="smallest")
    again = client.download(found, prefer="smallest")
    assert (again.way, again.nbytes, again.weights) == ("held", 0, first.weights)
    exact = client.download(found)
    assert exact.way == "lossless"
    assert client.download(found).weights == exact.weights != first.weights
    copied = tmp_path / "copied"
    copied.write_bytes(SECOND)
    assert device("other", source=mirror).download(found, holding=[copied]).weights == copied


def test_only_weights_and_the_manifest_stay(
    mirror: Mirror, device: Device, held: dict[str, Path], tmp_path: Path
) -> None:
    client = device(source=mirror)
    client.download(client.resolve("stable"), holding=list(held.values()))
    kept = sorted(path.name for path in (tmp_path / "device" / "files").rglob("*") if path.is_file())
    assert kept == ["manifest.json", "weights.safetensors"]


def test_a_poisoned_diff_is_followed_by_the_full_file_of_the_same_bits(
    mirror: Mirror, second: Artefact, device: Device, held: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    diff = variant(second, "diff-int2", LINE)
    name = mirror.named(diff.file)
    honest = mirror.files[name]
    mirror.files[name] = bytes(len(honest))
    client = device(source=mirror)
    with caplog.at_level(logging.WARNING):
        files = client.download(client.resolve("stable"), prefer="smallest", holding=[held["line"]])
    assert (files.way, files.weights_digest) == ("int8", diff.weights_digest)
    full = next(one for one in second.variants if one.codec == "int8")
    assert files.nbytes == len(honest) + len(second.files[full.file])
    (setback,) = files.setbacks
    assert setback.startswith("diff-int2: stable/") and "damaged or tampered with" in setback
    assert f"{diff.file} does not give the weights, so a larger file is fetched" in caplog.text


def test_the_full_weights_are_the_last_way(
    mirror: Mirror, second: Artefact, device: Device, held: dict[str, Path]
) -> None:
    for one in second.variants:
        name = mirror.named(one.file)
        mirror.files[name] = bytes(len(mirror.files[name]))
    client = device(source=mirror)
    files = client.download(client.resolve("stable"), prefer="smallest", holding=[held["line"]])
    assert (files.way, files.weights.read_bytes()) == ("weights", SECOND)
    assert [one.partition(":")[0] for one in files.setbacks] == ["diff-int2", "int8"]


def test_variants_that_are_missing(mirror: Mirror, second: Artefact, device: Device) -> None:
    for one in second.variants:
        del mirror.files[mirror.named(one.file)]
    client = device(source=mirror)
    files = client.download(client.resolve("stable"))
    assert (files.way, [one.partition(":")[0] for one in files.setbacks]) == ("weights", ["lossless"])


def test_a_source_that_goes_away_is_no_reason_for_a_larger_file(mirror: Mirror, device: Device) -> None:
    client = device(source=mirror)
    found = client.resolve("stable")
    client.fetch(found, "manifest.json")
    mirror.down = True
    mirror.requests.clear()
    with pytest.raises(Unreachable):
        client.download(found)
    assert len(mirror.requests) == 1


def test_a_variant_that_its_own_publisher_got_wrong(publisher: Publisher, device: Device) -> None:
    """Signed and genuine, and it gives other weights than are signed for it: refused, and the full file is taken."""
    good = artefact_of(SECOND, {"x.fprc": encode(SECOND, "int4").data})
    wrong = Variant("x.fprc", "int4", sha256_hex(LINE))
    publisher.publish("stable", Artefact(good.manifest, good.weights, good.files, (wrong,)))
    client = device()
    files = client.download(client.resolve("stable"), prefer="smallest")
    assert files.way == "weights"
    assert "x.fprc gives weights with SHA-256" in files.setbacks[0] and "tell the publisher" in files.setbacks[0]


def test_a_codec_of_a_newer_library_is_passed_over(publisher: Publisher, device: Device) -> None:
    good = artefact_of(SECOND, {"x.fprc": b"?"})
    publisher.publish(
        "stable", Artefact(good.manifest, good.weights, good.files, (Variant("x.fprc", "av7", sha256_hex(LINE)),))
    )
    client = device()
    assert client.download(client.resolve("stable"), prefer="smallest").way == "weights"


def test_held_files_that_are_none(
    mirror: Mirror, device: Device, held: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(len(SECOND) + 1))
    client = device(source=mirror)
    with caplog.at_level(logging.WARNING):
        files = client.download(client.resolve("stable"), holding=[tmp_path / "none", large, held["exact"]])
    assert files.way == "diff"
    assert "none (No such file or directory)" in caplog.text
    assert f"too large: {large}" in caplog.text


def test_a_held_file_that_changes_meanwhile(
    mirror: Mirror, device: Device, held: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashed, then replaced: the diff refuses to start from it."""
    client = device(source=mirror)
    found = client.resolve("stable")
    client.fetch(found, "manifest.json")
    read = mirror.read

    def replace(name: str) -> Iterator[bytes]:
        held["exact"].write_bytes(SECOND)
        return read(name)

    monkeypatch.setattr(mirror, "read", replace)
    files = client.download(found, holding=[held["exact"]])
    assert (files.way, files.weights.read_bytes()) == ("lossless", SECOND)
    assert files.setbacks[0].startswith("diff: diff starts from weights")


def test_a_device_takes_no_more_than_it_said(mirror: Mirror, device: Device) -> None:
    """A small file that would become large is refused like a large one."""
    client = device(source=mirror, limits=Limits(file=len(SECOND) // 2))
    with pytest.raises(ReleaseError, match="and this device takes at most"):
        client.download(client.resolve("stable"))


def test_what_was_revoked_is_not_given_though_it_is_here(
    publisher: Publisher, second: Artefact, device: Device
) -> None:
    client = device()
    found = client.resolve("stable")
    client.download(found)
    publisher.revoke_version(second.version_id)
    client.refresh()
    with pytest.raises(BelowSecurityFloor):
        client.download(found)


def test_preferences_that_are_none(publisher: Publisher, second: Artefact, device: Device) -> None:
    client = device()
    with pytest.raises(ReleaseError, match="prefer='diff'; expected one of exact, smallest, lossless, fp16"):
        client.download(client.resolve("stable"), prefer="diff")


def test_ways_in_their_order(publisher: Publisher, second: Artefact, device: Device) -> None:
    found = device().resolve("stable")
    record, sizes = found.record, found.sizes
    held = {sha256_hex(LINE), sha256_hex(FIRST)}
    assert [one.name for one in ways_to(record, sizes, record.digests, held)] == ["diff-int2", "int8", "weights"]
    exact = accepted(record, "exact")
    assert [one.name for one in ways_to(record, sizes, exact, held)] == ["diff", "lossless", "weights"]
    plain = dataclasses.replace(record, variants=())
    assert [one.name for one in ways_to(plain, sizes, accepted(plain, "int4"), held)] == ["weights"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Python's own file server; counts the bytes of bodies."""

    sent: list[tuple[str, int]]

    def log_message(self, *_: object) -> None:
        pass

    def copyfile(self, source: object, outputfile: object) -> None:
        data = source.read()
        type(self).sent.append((self.path, len(data)))
        outputfile.write(data)


@pytest.fixture
def web(publisher: Publisher) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    sent: list[tuple[str, int]] = []
    handler = functools.partial(type("Counting", (Quiet,), {"sent": sent}), directory=str(publisher.folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", sent
    server.shutdown()
    server.server_close()
    thread.join()


def test_updates_over_http_by_diffs(
    publisher: Publisher, device: Device, web: tuple[str, list[tuple[str, int]]], tmp_path: Path
) -> None:
    """Six versions: a device that follows has the signed bits of each, and what it says it fetched is what was sent."""
    url, sent = web
    client = device(source=url)
    kept: list[Path] = []
    for number, weights in enumerate(versions(6)):
        codecs = ["int8", "diff-int2"] if kept else ["int8"]
        made, _ = with_variants(artefact_of(weights, round_number=number), codecs, held=publisher.held("stable"))
        publisher.publish("stable", made)
        client.refresh()
        sent.clear()
        files = client.download(client.resolve("stable"), prefer="smallest", holding=kept[-1:])
        bodies = [size for name, size in sent if name.startswith("/targets/") and not name.endswith("manifest.json")]
        assert files.way == ("diff-int2" if kept else "int8")
        assert bodies == [files.nbytes]
        assert sha256_hex(files.weights.read_bytes()) == files.weights_digest
        kept.append(files.weights)
    # a device that starts now may get the very same bits by their full file, and go on from there like the others
    client = device("fresh", source=url)
    found = client.resolve("stable")
    (full,) = [one for one in made.variants if not one.source and one.weights_digest == files.weights_digest]
    path = client.fetch(found, full.file)
    assert decode(path.read_bytes()) == kept[-1].read_bytes()


def test_a_poisoned_diff_over_http(
    publisher: Publisher,
    second: Artefact,
    device: Device,
    held: dict[str, Path],
    web: tuple[str, list[tuple[str, int]]],
) -> None:
    url, sent = web
    (path,) = publisher.folder.glob(f"targets/stable/*/*.{variant(second, 'diff', FIRST).file}")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    client = device(source=url)
    files = client.download(client.resolve("stable"), holding=[held["exact"]])
    assert (files.way, files.weights.read_bytes()) == ("lossless", SECOND)
    assert files.nbytes == sum(size for name, size in sent if ".fprc" in name)


def test_a_diff_without_its_signature_is_worth_nothing(
    publisher: Publisher, device: Device, held: dict[str, Path]
) -> None:
    """What is on the server and not signed is not looked at."""
    publisher.publish("stable", artefact_of(SECOND, {"diff.fprc": encode(SECOND, "diff", FIRST).data}))
    client = device()
    assert client.download(client.resolve("stable"), holding=[held["exact"]]).way == "weights"
