"""Bundles: one folder from which a device installs without a network, for as long as it says."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from federated.errors import FreezeAttack, MissingFile, NotReleased, ReleaseError, RollbackAttack, SigningKeyError
from federated.release import Publisher, ReleaseClient
from tests.unit.release.conftest import START, Clock, artefact_of, ring_of

Device = Callable[..., ReleaseClient]


@pytest.fixture
def stick(tmp_path: Path) -> Path:
    return tmp_path / "stick"


@pytest.fixture
def published(publisher: Publisher) -> Publisher:
    publisher.publish("stable", artefact_of(b"old"), artefact_of(b"new", {"int8.bin": b"8"}))
    publisher.publish("dev", artefact_of(b"other"))
    return publisher


def install(client: ReleaseClient) -> bytes:
    return client.download(client.resolve("stable")).weights.read_bytes()


def test_a_bundle_holds_one_version_of_one_channel(published: Publisher, stick: Path, device: Device) -> None:
    bundle = published.bundle("stable", stick)
    files = [path for path in stick.rglob("*") if path.is_file()]
    assert bundle.nbytes == sum(path.stat().st_size for path in files)
    assert (bundle.folder, bundle.record.release_counter, bundle.valid_until) == (stick, 2, START + timedelta(days=3))
    names = {path.name.partition(".")[2] for path in files}
    assert names == {
        "json", "root.json", "snapshot.json", "targets.json", "stable.json", "manifest.json", "weights.safetensors",
        "int8.bin",
    }  # fmt: skip
    client = device(source=stick)
    assert install(client) == b"new"
    assert client.fetch(client.resolve("stable"), "int8.bin").read_bytes() == b"8"


def test_a_bundle_needs_no_keys_unless_it_is_to_last(
    published: Publisher, place: Path, stick: Path, clock: Clock
) -> None:
    (place / "keys" / "online").rename(place / "online")
    again = Publisher(place / "releases", ring_of(place / "keys"), clock=clock)
    again.bundle("stable", stick)
    with pytest.raises(SigningKeyError, match="timestamp needs 1 of the keys"):
        again.bundle("stable", place / "second", days=1)


@pytest.mark.parametrize("days", [1, 10, 60])
def test_a_bundle_lasts_as_long_as_it_was_asked_to(
    published: Publisher, stick: Path, device: Device, clock: Clock, days: int
) -> None:
    clock.forward(days=2, hours=12)  # the timestamp lasts half a day more, the snapshot eleven days
    bundle = published.bundle("stable", stick, days=days)
    assert bundle.valid_until >= clock.now + timedelta(days=max(days, 3))
    clock.now = bundle.valid_until - timedelta(minutes=1)
    assert install(device(source=stick)) == b"new"
    clock.forward(minutes=2)
    with pytest.raises(FreezeAttack):
        device("late", source=stick).refresh()


def test_after_a_bundle_the_network_goes_on(published: Publisher, stick: Path, device: Device) -> None:
    published.bundle("stable", stick, days=60)
    assert install(device(source=stick)) == b"new"
    device().refresh()  # the same device, the repository: newer than the bundle
    published.publish("stable", artefact_of(b"newer"))
    assert install(device()) == b"newer"
    with pytest.raises(RollbackAttack, match=r"timestamp from .*stick is older than what was verified before"):
        device(source=stick).refresh()


def test_a_bundle_does_not_hold_other_versions(published: Publisher, stick: Path, device: Device) -> None:
    published.bundle("stable", stick)
    client = device(source=stick)
    with pytest.raises(MissingFile, match=r"has no metadata/2\.dev\.json"):
        client.resolve("dev")
    with pytest.raises(MissingFile, match=r"has no targets/.*manifest\.json"):
        client.download(client.resolve("stable", artefact_of(b"old").version_id))


def test_a_bundle_brings_the_roots_along(published: Publisher, stick: Path, device: Device) -> None:
    first = published.trusted_root.read_bytes()
    published.rotate("root")
    published.rotate("timestamp")
    published.bundle("stable", stick)
    assert install(device(root=first, source=stick)) == b"new"


def test_what_cannot_be_bundled(published: Publisher, stick: Path) -> None:
    with pytest.raises(NotReleased, match="channel canary is empty: publish a version there first"):
        published.bundle("canary", stick)
    stick.mkdir()
    (stick / "photo.jpg").write_bytes(b"")
    with pytest.raises(ReleaseError, match="stick is not empty; choose a new folder"):
        published.bundle("stable", stick)
    with pytest.raises(ReleaseError, match=r"cannot (write|look at) the bundle.*: Not a directory"):
        published.bundle("stable", stick / "photo.jpg" / "x")
