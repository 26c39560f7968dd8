"""The device's side: what it fetches, keeps and refuses when nobody attacks; attacks are in tests/hostile."""

import dataclasses
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from federated.errors import (
    EndlessData,
    ExpiredMetadata,
    FreezeAttack,
    MissingFile,
    NotReleased,
    ReleaseError,
    Unreachable,
    WrongClock,
    WrongContent,
    WrongSignature,
)
from federated.manifest import VersionManifest, canonical_json
from federated.release import Limits, Publisher, ReleaseClient
from federated.testing.releases import Mirror, Thief
from tests.unit.release.conftest import START, Clock, artefact_of

Device = Callable[..., ReleaseClient]


@pytest.fixture
def mirror(publisher: Publisher) -> Mirror:
    publisher.publish("stable", artefact_of(b"one", {"int8.bin": b"small"}))
    return Mirror.of(publisher.folder)


def test_a_version_comes_as_it_was_published(mirror: Mirror, device: Device) -> None:
    one = artefact_of(b"one", {"int8.bin": b"small"})
    client = device(source=mirror)
    found = client.resolve("stable")
    assert (found.channel, found.record.version_id, found.record.release_counter) == ("stable", one.version_id, 1)
    assert found.valid_until == START + timedelta(days=3)
    assert found.sizes == {
        "manifest.json": len(canonical_json(one.manifest.to_dict())),
        "weights.safetensors": 3,
        "int8.bin": 5,
    }
    files = client.download(found)
    assert (files.manifest, files.weights.read_bytes(), files.version) == (one.manifest, b"one", found)
    assert client.fetch(found, "int8.bin").read_bytes() == b"small"


def test_what_a_cold_and_a_warm_device_ask_for(mirror: Mirror, device: Device) -> None:
    metadata = [f"metadata/{name}.json" for name in ("2.root", "timestamp", "2.snapshot", "1.targets", "2.stable")]
    _download(device(source=mirror))
    assert mirror.requests == [*metadata, mirror.named("manifest.json"), mirror.named("weights.safetensors")]
    mirror.requests.clear()
    _download(device(source=mirror))
    assert mirror.requests == metadata[:2]


def test_the_newest_root_is_found_from_an_old_one(publisher: Publisher, device: Device) -> None:
    first = publisher.trusted_root.read_bytes()
    for _ in range(3):
        publisher.rotate("root")
    device(root=first).refresh()
    mirror = Mirror.of(publisher.folder)
    device(root=first, source=mirror).refresh()  # the roots in between are kept
    assert mirror.requests == ["metadata/5.root.json", "metadata/timestamp.json"]


def test_roots_without_end(publisher: Publisher, device: Device) -> None:
    for _ in range(3):
        publisher.renew("root")
    device(limits=Limits(roots=4)).refresh()
    with pytest.raises(EndlessData, match="more than 3 roots after version 1; install a newer trusted root"):
        device("other", limits=Limits(roots=3)).refresh()


def test_a_version_by_its_id(publisher: Publisher, device: Device) -> None:
    one, two = artefact_of(b"1"), artefact_of(b"2")
    publisher.publish("stable", one, two)
    assert device().resolve("stable", one.version_id).record.release_counter == 1


@pytest.mark.parametrize(
    ("channel", "version", "message"),
    [
        ("dev", None, "nobody who may sign for channel 'dev' signed dev/current.json"),
        ("beta", None, "nobody who may sign for channel 'beta' signed beta/current.json"),
        ("stable", "0" * 64, "nobody who may sign for channel 'stable' signed stable/0000"),
        ("stable", "9f2ab1", "is no version's id; expected all 64 hexadecimal"),
    ],
)
def test_what_was_not_released(mirror: Mirror, device: Device, channel: str, version: str | None, message: str) -> None:
    with pytest.raises(NotReleased, match=message):
        device(source=mirror).resolve(channel, version)


def test_file_that_a_version_does_not_have(mirror: Mirror, device: Device) -> None:
    client = device(source=mirror)
    with pytest.raises(NotReleased, match=r"has no int4\.bin; it has \['int8\.bin', 'manifest\.json'"):
        client.fetch(client.resolve("stable"), "int4.bin")


def test_version_that_was_taken_away_before_its_download(publisher: Publisher, device: Device) -> None:
    publisher.publish("stable", artefact_of(b"1"))
    client = device()
    found = client.resolve("stable")
    publisher.revoke("stable")
    client.refresh()
    with pytest.raises(NotReleased, match="nobody who may sign for channel 'stable' signed"):
        client.download(found)


def test_a_restarted_device_can_go_on(mirror: Mirror, device: Device) -> None:
    found = device(source=mirror).resolve("stable")
    assert device(source=mirror).download(found).weights.read_bytes() == b"one"


def test_files_that_are_here_are_hashed_again(mirror: Mirror, device: Device) -> None:
    client = device(source=mirror)
    path = client.download(client.resolve("stable")).weights
    mirror.requests.clear()
    client.download(client.resolve("stable"))
    assert mirror.requests == []
    path.write_bytes(b"ONE")
    assert client.download(client.resolve("stable")).weights.read_bytes() == b"one"
    path.write_bytes(b"longer")
    assert client.download(client.resolve("stable")).weights.read_bytes() == b"one"
    assert [request for request in mirror.requests if "weights" in request] == mirror.requests


def test_no_half_files_stay(mirror: Mirror, device: Device, tmp_path: Path) -> None:
    client = device(source=mirror)
    found = client.resolve("stable")
    mirror.files[mirror.named("weights.safetensors")] = b"on"
    with pytest.raises(WrongContent, match=r"has 2 bytes with SHA-256 .* signed are 3"):
        client.download(found)
    assert [path.name for path in (tmp_path / "device" / "files").rglob("*") if path.is_file()] == ["manifest.json"]


def test_a_device_has_its_own_limit(mirror: Mirror, device: Device) -> None:
    client = device(source=mirror, limits=Limits(file=600))
    client.download(client.resolve("stable"))
    client = device("small", source=mirror, limits=Limits(file=2))
    with pytest.raises(EndlessData, match="bytes, and this device takes at most 2 at once"):
        client.download(client.resolve("stable"))


def test_out_of_reach(mirror: Mirror, device: Device) -> None:
    client = device(source=mirror)
    found = client.resolve("stable")
    mirror.down = True
    with pytest.raises(Unreachable, match="the mirror does not answer"):
        client.refresh()
    with pytest.raises(Unreachable):
        client.download(found)
    assert client.resolve("stable") == found  # as it was verified, while that lasts
    with pytest.raises(Unreachable):
        device("fresh", source=mirror).resolve("stable")
    mirror.down = False
    client.download(found)


def test_what_was_verified_goes_out_of_date(mirror: Mirror, device: Device, clock: Clock) -> None:
    client = device(source=mirror)
    client.refresh()
    clock.forward(days=4)
    with pytest.raises(
        FreezeAttack, match="timestamp was valid until 2026-11-23 12:00 UTC, the clock here says 2026-11-24"
    ):
        client.resolve("stable")


def test_incomplete_mirror(mirror: Mirror, device: Device) -> None:
    del mirror.files[mirror.named("2.stable.json")]
    with pytest.raises(MissingFile, match=r"mirror has no metadata/2\.stable\.json"):
        device(source=mirror).resolve("stable")


def test_clock_a_year_ahead(mirror: Mirror, device: Device, clock: Clock) -> None:
    clock.forward(days=365)
    with pytest.raises(ExpiredMetadata, match=r"root was valid until .* or the clock is wrong"):
        device(source=mirror).refresh()


def test_clock_a_month_ahead(mirror: Mirror, device: Device, clock: Clock) -> None:
    clock.forward(days=30)
    with pytest.raises(
        FreezeAttack, match="the publisher stopped renewing, or the clock is wrong; what is installed stays"
    ):
        device(source=mirror).refresh()


def test_clock_a_year_behind(mirror: Mirror, device: Device, clock: Clock, tmp_path: Path) -> None:
    clock.forward(days=-365)
    with pytest.raises(
        WrongClock, match="the clock here says 2025-11-20 12:00 UTC, and timestamp from mirror was signed"
    ):
        device(source=mirror).refresh()
    clock.forward(days=364, hours=1)  # within a day
    device(source=mirror).refresh()


def test_metadata_of_another_program_may_not_say_when(publisher: Publisher, device: Device, ring: object) -> None:
    """Without the time of signing there is no clock to compare with; expiry is checked all the same."""
    mirror = Mirror.of(publisher.folder)
    for value in (None, 5, "yesterday"):
        Thief(mirror, ring).forge(
            "timestamp", lambda signed, value=value: signed.update({"x-fedpeft-signed": value}), keys=["timestamp-1"]
        )
        device(source=mirror).refresh()


def test_trusted_root_from_a_file_or_bytes(publisher: Publisher, device: Device) -> None:
    device("a", root=publisher.trusted_root.read_bytes()).refresh()
    device("b", root=publisher.trusted_root).refresh()
    with pytest.raises(ReleaseError, match="cannot read the trusted root: No such file"):
        device("c", root=Path("nothing"))


@pytest.mark.parametrize("data", [b"", b"{}", b'{"signed": {"_type": "root"}, "signatures": []}', b"\xff"])
def test_trusted_root_that_is_none(device: Device, data: bytes) -> None:
    with pytest.raises(WrongContent, match=r"root from this machine \(the trusted root\) is damaged"):
        device(root=data).refresh()


def test_trusted_root_of_somebody_else(publisher: Publisher, device: Device, make: Callable[..., Publisher]) -> None:
    other = make(channels=("stable",))
    with pytest.raises(WrongSignature, match=r"timestamp from .* is not signed as it must be"):
        device(root=other.trusted_root).refresh()


def test_floor_is_known_without_a_network(publisher: Publisher, device: Device, tmp_path: Path) -> None:
    assert device().security_floors == {}
    publisher.set_floor(3)
    device().refresh()
    nowhere = device(source=tmp_path / "nowhere")
    assert nowhere.security_floors == {"": 3}
    for damaged in (b"{", publisher.trusted_root.read_bytes()):
        (tmp_path / "device" / "metadata" / "targets.json").write_bytes(damaged)
        with pytest.raises(WrongContent, match=r"the state in .* is damaged .* refresh to mend it"):
            _ = nowhere.security_floors
    device().refresh()
    assert nowhere.security_floors == {"": 3}


def test_state_that_cannot_be_written(publisher: Publisher, clock: Clock, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    client = ReleaseClient(publisher.trusted_root, publisher.folder, tmp_path / "file" / "state", clock=clock)
    with pytest.raises(ReleaseError, match="cannot hold the folder: Not a directory"):
        client.refresh()


def test_state_on_a_full_disk(publisher: Publisher, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device", "disk")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(ReleaseError, match="cannot write what was verified: No space left on device"):
            device().refresh()
    device().refresh()


@pytest.mark.parametrize("name", ["timestamp", "snapshot", "targets", "stable", "roots/2"])
@pytest.mark.parametrize("data", [b"", b"{}", b"\xff"])
def test_damaged_state_counts_as_not_there(
    publisher: Publisher, device: Device, tmp_path: Path, name: str, data: bytes
) -> None:
    publisher.publish("stable", artefact_of(b"1"))
    first = publisher.trusted_root.read_bytes()
    publisher.renew("root")
    found = device(root=first).resolve("stable")
    path = tmp_path / "device" / "metadata" / f"{name}.json"
    assert path.exists()
    path.write_bytes(data)
    assert device(root=first).resolve("stable") == found


def test_manifest_of_a_newer_library(publisher: Publisher, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = VersionManifest.to_dict
    with monkeypatch.context() as patch:
        patch.setattr(VersionManifest, "to_dict", lambda self: plain(self) | {"field_of_tomorrow": 1})
        publisher.publish("stable", artefact_of(b"1"))
    with pytest.raises(ReleaseError, match=r"has a manifest that this library cannot read .*upgrade federated-peft"):
        _download(device())


def _download(client: ReleaseClient) -> None:
    client.download(client.resolve("stable"))


def test_record_and_manifest_that_contradict_each_other(mirror: Mirror, device: Device) -> None:
    client = device(source=mirror)
    found = client.resolve("stable")
    other = dataclasses.replace(found, record=dataclasses.replace(found.record, base_digest="c" * 64))
    with pytest.raises(WrongContent, match="contradict each other; tell the publisher"):
        client.download(other)


@pytest.mark.parametrize("change", [{"release_counter": 6}, {"adapter_id": "other"}, {"weights_digest": "0" * 64}])
def test_record_that_is_not_its_manifests(publisher: Publisher, device: Device, ring: object, change: dict) -> None:
    """Somebody with the channel's key signed it, to get below a floor for instance."""
    one = artefact_of(b"1", adapter_id="reviews", release_counter=5)
    publisher.publish("stable", one)
    mirror = Mirror.of(publisher.folder)
    thief = Thief(mirror, ring)
    thief.forge(
        "stable", lambda signed: signed["targets"]["stable/current.json"]["custom"].update(change), keys=["stable-1"]
    )
    thief.relink("stable", keys=["snapshot-1", "timestamp-1"])
    with pytest.raises(WrongContent, match=r"contradict each other|its record says"):
        _download(device(source=mirror))


def test_threads_share_a_device(publisher: Publisher, device: Device) -> None:
    publisher.publish("stable", artefact_of(b"1"))
    client, found = device(), []

    def run() -> None:
        client.refresh()
        found.append(client.download(client.resolve("stable")).weights.read_bytes())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"1"] * 4


def test_state_is_plain_files(mirror: Mirror, device: Device, tmp_path: Path) -> None:
    client = device(source=mirror)
    client.download(client.resolve("stable"))
    names = sorted(path.relative_to(tmp_path / "device").as_posix() for path in (tmp_path / "device").rglob("*.json"))
    version = artefact_of(b"one").version_id
    assert names == [
        f"files/{version}/manifest.json",
        *(f"metadata/{role}.json" for role in ("snapshot", "stable", "targets", "timestamp")),
    ]
