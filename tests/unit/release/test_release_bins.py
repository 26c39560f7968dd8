"""Channels of many versions: hash bins keep what a device fetches small, and change nothing else."""

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from federated.errors import MixAndMatch, NotReleased, WrongContent, WrongSignature
from federated.release import Artefact, Publisher, ReleaseClient
from federated.release.edition import Edition
from federated.testing.releases import Mirror, Thief
from tests.unit.release.conftest import Clock, artefact_of, ring_of

Device = Callable[..., ReleaseClient]


def artefacts(number: int, start: int = 0) -> Iterator[Artefact]:
    return (artefact_of(str(one).encode()) for one in range(start, start + number))


def roles_of(mirror: Mirror) -> list[str]:
    """What was asked for, without versions."""
    names = [name.removeprefix("metadata/").removesuffix(".json") for name in mirror.requests if "metadata/" in name]
    return [name.partition(".")[2] if name[0].isdigit() else name for name in names]


@pytest.fixture
def client(tmp_path: Path, clock: Clock) -> Callable[[Publisher], tuple[ReleaseClient, Mirror]]:
    """A fresh device, and the mirror that it asks."""
    number = count()

    def run(publisher: Publisher) -> tuple[ReleaseClient, Mirror]:
        mirror = Mirror.of(publisher.folder)
        return ReleaseClient(publisher.trusted_root, mirror, tmp_path / f"device{next(number)}", clock=clock), mirror

    return run


def test_a_channel_is_split_when_it_is_large(make: Callable[..., Publisher], client: Callable) -> None:
    publisher = make(channels=("dev",), bins=4, bins_past=5)
    publisher.publish("dev", *artefacts(2))  # four files
    assert len(list(publisher.folder.glob("metadata/*.dev.bin-*.json"))) == 0
    publisher.publish("dev", *artefacts(1, start=2))
    assert len(list(publisher.folder.glob("metadata/1.dev.bin-*.json"))) == 4
    device, mirror = client(publisher)
    for number, artefact in enumerate(artefacts(3)):
        found = device.resolve("dev", artefact.version_id)
        assert found.record.release_counter == number + 1
        assert device.download(found).weights.read_bytes() == artefact.weights
    assert set(roles_of(mirror)) > {"dev", "targets", "timestamp", "snapshot"}


def test_the_current_version_needs_no_bin(make: Callable[..., Publisher], client: Callable) -> None:
    publisher = make(channels=("dev",), bins=4, bins_past=0)
    publisher.publish("dev", *artefacts(9))
    device, mirror = client(publisher)
    found = device.resolve("dev")
    assert device.download(found).weights.read_bytes() == b"8"
    assert roles_of(mirror) == ["root", "timestamp", "snapshot", "targets", "dev"]


def test_an_update_signs_few_bins(make: Callable[..., Publisher]) -> None:
    publisher = make(channels=("dev",), bins=64, bins_past=0)
    publisher.publish("dev", *artefacts(1))
    before = set(publisher.folder.glob("metadata/*.json"))
    publisher.publish("dev", *artefacts(1, start=1))
    signed = {path.name.partition(".")[2] for path in set(publisher.folder.glob("metadata/*.json")) - before}
    assert len([name for name in signed if ".bin-" in name]) <= 2
    assert {name for name in signed if ".bin-" not in name} == {"dev.json", "snapshot.json"}


def test_thousands_of_versions(make: Callable[..., Publisher], client: Callable) -> None:
    publisher = make(channels=("dev", "stable"), bins=64, bins_past=1000)
    everything = list(artefacts(1500))
    records = publisher.publish("dev", *everything)
    assert [record.release_counter for record in records] == list(range(1, 1501))
    device, mirror = client(publisher)
    device.resolve("dev")
    current = mirror.sent
    device.resolve("dev", everything[700].version_id)
    assert mirror.sent - current < 2 * 40_000  # two bins of 3000 files in 64
    assert current < 15_000
    with pytest.raises(NotReleased):
        device.resolve("dev", "0" * 64)
    assert publisher.publish("stable", everything[3])[0].release_counter == 4  # found in a bin
    assert publisher.rollback("dev", everything[0].version_id).release_counter == 1
    device, _ = client(publisher)
    assert device.resolve("dev").record.release_counter == 1
    assert device.download(device.resolve("dev")).weights.read_bytes() == b"0"


def test_bins_follow_their_channels_keys(make: Callable[..., Publisher], client: Callable) -> None:
    publisher = make(channels=("dev",), bins=4, bins_past=0)
    publisher.publish("dev", *artefacts(3))
    publisher.rotate("dev")
    device, mirror = client(publisher)
    for artefact in artefacts(3):
        device.download(device.resolve("dev", artefact.version_id))
    keys = json.loads(mirror.files["metadata/3.dev.json"])["signed"]["delegations"]["keys"]
    assert [key["x-fedpeft-name"] for key in keys.values()] == ["dev-2"]


def test_revoking_empties_the_bins(make: Callable[..., Publisher], client: Callable) -> None:
    publisher = make(channels=("dev",), bins=4, bins_past=0)
    publisher.publish("dev", *artefacts(3))
    publisher.revoke("dev")
    device, _ = client(publisher)
    for artefact in artefacts(3):
        with pytest.raises(NotReleased):
            device.resolve("dev", artefact.version_id)
    publisher.publish("dev", *artefacts(4, start=6))  # in bins again, whose versions go on
    device, _ = client(publisher)
    assert device.resolve("dev", next(artefacts(1, start=6)).version_id)
    assert device.download(device.resolve("dev")).weights.read_bytes() == b"9"


@pytest.mark.parametrize("broken", ["keys", "count"])
def test_a_channels_thief_breaks_its_bins(
    make: Callable[..., Publisher], tmp_path: Path, clock: Clock, broken: str
) -> None:
    publisher, ring = make(channels=("dev",), bins=4, bins_past=0), ring_of(tmp_path / "made-keys")
    publisher.publish("dev", *artefacts(2))
    edition = Edition.open(publisher.folder, ring)
    delegations = edition.change("dev").delegations
    if broken == "keys":
        delegations.keys.clear()
    else:
        delegations.succinct_roles.bit_length = 32
    edition.commit(publisher.folder, ring, clock.now)
    with pytest.raises(WrongSignature if broken == "keys" else WrongContent):
        publisher.publish("dev", *artefacts(1, start=5))
    publisher.revoke("dev")
    publisher.publish("dev", *artefacts(2))


def test_bins_are_renewed_with_their_channel(make: Callable[..., Publisher], client: Callable, clock: Clock) -> None:
    publisher = make(channels=("dev",), bins=2, bins_past=0, days={"root": 999, "targets": 999})
    publisher.publish("dev", *artefacts(3))
    clock.forward(days=80)
    publisher.renew("dev", "snapshot")
    clock.forward(days=2)
    device, _ = client(publisher)
    for artefact in artefacts(3):
        device.download(device.resolve("dev", artefact.version_id))


def test_an_older_bin_is_a_mix(make: Callable[..., Publisher], client: Callable) -> None:
    """Bins have no hash in the snapshot, for the sake of its size: their signed version must do."""
    publisher = make(channels=("dev",), bins=2, bins_past=0)
    publisher.publish("dev", *artefacts(5))
    publisher.publish("dev", *artefacts(5, start=5))
    device, mirror = client(publisher)
    for name in ("dev.bin-0", "dev.bin-1"):
        mirror.files[f"metadata/2.{name}.json"] = mirror.files[f"metadata/1.{name}.json"]
    with pytest.raises(MixAndMatch, match="is another version than the snapshot names"):
        device.resolve("dev", next(artefacts(1)).version_id)


def test_a_snapshot_without_a_bin(make: Callable[..., Publisher], client: Callable, tmp_path: Path) -> None:
    publisher = make(channels=("dev",), bins=2, bins_past=0)
    publisher.publish("dev", *artefacts(5))
    device, mirror = client(publisher)
    thief = Thief(mirror, ring_of(tmp_path / "made-keys"))

    def drop(signed: dict) -> None:
        for name in [name for name in signed["meta"] if ".bin-" in name]:
            del signed["meta"][name]

    thief.forge("snapshot", drop, keys=["snapshot-1"])
    thief.relink(keys=["snapshot-1", "timestamp-1"])
    with pytest.raises(MixAndMatch, match=r"dev names a role dev\.bin-.*, and the snapshot from mirror does not"):
        device.resolve("dev", next(artefacts(1)).version_id)
