"""Publishing: what lands in the folder, counters, rollback, the floor, renewal, bundles, and what is refused."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tuf.api.metadata import TargetFile, Targets

from federated.errors import (
    BelowSecurityFloor,
    NotReleased,
    ReleaseError,
    RollbackAttack,
    SigningKeyError,
    WrongClock,
    WrongContent,
    WrongSignature,
)
from federated.manifest import canonical_json, sha256_hex
from federated.registry import Registry
from federated.release import Artefact, KeyRing, Publisher, ReleaseClient, shelf
from federated.release.edition import Edition
from federated.release.records import ReleaseRecord, floors_of, to_floors
from tests.unit.release.conftest import BASE, SPEC, START, Clock, artefact_of, ring_of

Device = Callable[..., ReleaseClient]
HEAD = f"17:{'a' * 64}"


def _weights(client: ReleaseClient, channel: str) -> bytes:
    return client.download(client.resolve(channel)).weights.read_bytes()


def signed(folder: Path, name: str) -> dict:
    return json.loads((folder / "metadata" / name).read_bytes())["signed"]


def test_layout_of_the_folder(publisher: Publisher) -> None:
    one = artefact_of(b"one", {"probes.json": b"{}"})
    publisher.publish("dev", one)
    files = {path.relative_to(publisher.folder).as_posix() for path in publisher.folder.rglob("*") if path.is_file()}
    version, weights = one.version_id, one.manifest.weights_digest
    record = ReleaseRecord(version, 1, BASE, weights, files=("probes.json",))
    assert {name for name in files if name.startswith("targets/dev")} == {
        f"targets/dev/{version}/{version}.manifest.json",
        f"targets/dev/{version}/{weights}.weights.safetensors",
        f"targets/dev/{version}/{sha256_hex(b'{}')}.probes.json",
        f"targets/dev/{sha256_hex(record.to_bytes())}.current.json",
    }
    for role in ("root", "targets", "dev", "canary", "stable", "snapshot"):
        assert f"metadata/1.{role}.json" in files
    assert {"metadata/2.dev.json", "metadata/2.snapshot.json", "metadata/timestamp.json"} < files
    assert (publisher.folder / f"targets/dev/{version}/{version}.manifest.json").read_bytes() == canonical_json(
        one.manifest.to_dict()
    )


def test_what_is_signed_of_a_version(publisher: Publisher) -> None:
    one = artefact_of(b"one")
    (record,) = publisher.publish("dev", one, audit_head=HEAD)
    assert record == ReleaseRecord(one.version_id, 1, BASE, one.manifest.weights_digest, audit_head=HEAD)
    targets = signed(publisher.folder, "2.dev.json")["targets"]
    assert targets.keys() == {
        "dev/current.json",
        f"dev/{one.version_id}/manifest.json",
        f"dev/{one.version_id}/weights.safetensors",
    }
    assert targets["dev/current.json"]["custom"] == record.to_custom()
    assert targets[f"dev/{one.version_id}/manifest.json"]["custom"] == record.to_custom()
    assert targets[f"dev/{one.version_id}/weights.safetensors"]["hashes"]["sha256"] == one.manifest.weights_digest


def test_who_signs_and_for_how_long(publisher: Publisher) -> None:
    roles = {role.name: role for role in publisher.status().roles}
    days = {name: (role.expires - START).days for name, role in roles.items()}
    expected = {"root": 365, "targets": 180, "snapshot": 14, "timestamp": 3}
    assert days == expected | dict.fromkeys(("dev", "canary", "stable"), 90)
    assert (roles["root"].threshold, len(roles["root"].keys)) == (2, 3)
    assert (roles["stable"].threshold, len(roles["stable"].keys)) == (1, 1)
    ids = [key["keyid"] for key in json.loads((publisher.folder / "metadata/1.root.json").read_bytes())["signatures"]]
    assert len(ids) == 3


def test_counters_grow_over_all_channels(publisher: Publisher) -> None:
    first, second, third = (artefact_of(data) for data in (b"1", b"2", b"3"))
    counters = [
        publisher.publish(*one)[0].release_counter for one in (("dev", first), ("canary", second), ("dev", third))
    ]
    assert counters == [1, 2, 3]


def test_a_version_keeps_its_counter_on_every_channel(publisher: Publisher) -> None:
    one, two = artefact_of(b"1"), artefact_of(b"2")
    publisher.publish("dev", one, two)
    assert publisher.publish("stable", one)[0].release_counter == 1
    assert publisher.publish("canary", two)[0].release_counter == 2


def test_a_manifest_brings_its_counter(publisher: Publisher) -> None:
    counted = artefact_of(b"1", release_counter=41)
    records = publisher.publish("dev", counted, artefact_of(b"2"))
    assert [record.release_counter for record in records] == [41, 42]
    assert publisher.publish("stable", counted)[0].release_counter == 41


def test_a_manifest_cannot_bring_another_counter(publisher: Publisher, ring: KeyRing) -> None:
    """Somebody with a channel's key signed another one."""
    counted = artefact_of(b"1", release_counter=41)
    publisher.publish("dev", counted)
    edition = Edition.open(publisher.folder, ring)
    edition.change("dev").targets[f"dev/{counted.version_id}/manifest.json"].custom["release_counter"] = 7
    edition.commit(publisher.folder, ring, START)
    with pytest.raises(ReleaseError, match="was released with counter 7, and its manifest says 41"):
        publisher.publish("stable", counted)


def test_counters_end(publisher: Publisher) -> None:
    with pytest.raises(ReleaseError, match="somebody with a channel's key drove it up; revoke that key"):
        publisher.publish("dev", artefact_of(b"1", release_counter=2**53))


def test_each_adapter_has_a_floor_of_its_own(publisher: Publisher, device: Device) -> None:
    mine, other = (artefact_of(name.encode(), adapter_id=name, release_counter=1) for name in ("mine", "other"))
    publisher.publish("dev", mine)
    publisher.publish("stable", other)
    assert publisher.revoke_version(mine.version_id) == 2
    assert device().resolve("stable").record.adapter_id == "other"
    with pytest.raises(BelowSecurityFloor, match="the signed security floor of adapter 'mine' is 2"):
        device().resolve("dev")
    assert publisher.revoke_version(other.version_id) == 2
    assert publisher.status().floors == {"mine": 2, "other": 2}
    publisher.set_floor(1, adapter_id="mine")
    assert device().resolve("dev").record.adapter_id == "mine"


def test_version_of_a_registry(publisher: Publisher, tmp_path: Path) -> None:
    one = artefact_of(b"one")
    with Registry.open(tmp_path / "registry") as registry:
        registry.publish(one.manifest, one.weights, channel="dev")
        taken = Artefact.of(registry, "dev", {"probes.json": b"[]"})
    assert (taken.manifest, taken.weights, taken.files) == (one.manifest, one.weights, {"probes.json": b"[]"})
    assert publisher.publish("stable", taken)[0].version_id == one.version_id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights_digest": "0" * 64}, "the weights' SHA-256 is .* the manifest says 0000"),
        ({"servable": False}, "cannot be served .* so it is not released"),
        ({"files": {"../x": b""}}, "cannot name a file"),
        ({"files": {"manifest.json": b""}}, "manifest.json is there already"),
    ],
)
def test_what_is_not_released(change: dict, message: str) -> None:
    with pytest.raises(ReleaseError, match=message):
        artefact_of(b"one", **change)


def test_nothing_to_publish(publisher: Publisher) -> None:
    with pytest.raises(ReleaseError, match="nothing to publish"):
        publisher.publish("dev")


def test_channel_that_there_is_not(publisher: Publisher) -> None:
    with pytest.raises(ReleaseError, match="no channel 'beta' in this repository; there are dev, canary, stable"):
        publisher.publish("beta", artefact_of(b"1"))
    with pytest.raises(ReleaseError, match="no channel 'beta'"):
        publisher.renew("beta")
    with pytest.raises(ReleaseError, match="no channel 'beta'"):
        publisher.rotate("beta")


def test_rollback_is_new_metadata_at_an_old_target(publisher: Publisher, device: Device) -> None:
    one, two = artefact_of(b"1"), artefact_of(b"2")
    publisher.publish("stable", one, two)
    before = device().resolve("stable")
    assert publisher.rollback("stable", one.version_id).release_counter == 1
    after = device().resolve("stable")
    assert (before.record.version_id, after.record.version_id) == (two.version_id, one.version_id)
    assert _weights(device(), "stable") == b"1"
    assert device().resolve("stable", two.version_id).record.release_counter == 2


def test_publishing_again_is_a_rollback_too(publisher: Publisher, device: Device) -> None:
    one, two = artefact_of(b"1"), artefact_of(b"2")
    for artefact in (one, two, one):
        publisher.publish("stable", artefact)
    assert device().resolve("stable").record.version_id == one.version_id


def test_rollback_to_what_was_never_there(publisher: Publisher) -> None:
    publisher.publish("dev", artefact_of(b"1"))
    with pytest.raises(NotReleased, match="channel stable has no version"):
        publisher.rollback("stable", artefact_of(b"1").version_id)


def test_rollback_to_a_version_whose_files_are_not_all_signed(publisher: Publisher, ring: KeyRing, place: Path) -> None:
    """A channel's role that another program changed."""
    one, two = artefact_of(b"1"), artefact_of(b"2")
    publisher.publish("dev", one, two)
    edition = Edition.open(publisher.folder, ring)
    del edition.change("dev").targets[f"dev/{one.version_id}/weights.safetensors"]
    edition.commit(publisher.folder, ring, START)
    assert shelf.current(edition, "dev").version_id == two.version_id
    with pytest.raises(NotReleased, match=r"without its weights\.safetensors: publish it again"):
        publisher.rollback("dev", one.version_id)


def test_a_revoked_version_is_out_of_reach(publisher: Publisher, device: Device) -> None:
    one, two, three = (artefact_of(data) for data in (b"1", b"2", b"3"))
    publisher.publish("stable", one, two)
    held = device().resolve("stable")
    assert publisher.revoke_version(one.version_id) == 2
    assert publisher.revoke_version(two.version_id) == 3
    assert publisher.revoke_version(one.version_id) == 3  # never down
    for attempt in (
        lambda: publisher.rollback("stable", one.version_id),
        lambda: publisher.publish("dev", one),
        lambda: publisher.bundle("stable", publisher.folder.parent / "stick"),
        lambda: device().resolve("stable"),
    ):
        with pytest.raises(BelowSecurityFloor):
            attempt()
    client = device()
    client.refresh()
    with pytest.raises(
        BelowSecurityFloor, match="its release counter is 2, the signed security floor of adapter '' is 3"
    ):
        client.require_allowed(held.record)
    with pytest.raises(BelowSecurityFloor):
        client.download(held)
    assert publisher.status().channels[2].revoked
    assert publisher.publish("stable", three)[0].release_counter == 3
    assert device().resolve("stable").record.version_id == three.version_id


def test_the_floor_can_be_lowered_on_purpose(publisher: Publisher) -> None:
    publisher.publish("stable", artefact_of(b"1"))
    publisher.set_floor(2**53 - 1)
    publisher.set_floor(0)
    assert publisher.status().floors == {"": 0}
    with pytest.raises(ReleaseError, match="a security floor of -1; expected a release counter"):
        publisher.set_floor(-1)


def test_counters_start_above_the_floor(publisher: Publisher) -> None:
    publisher.set_floor(100)
    assert publisher.publish("dev", artefact_of(b"1"))[0].release_counter == 100


def test_version_that_nobody_released(publisher: Publisher) -> None:
    with pytest.raises(ReleaseError, match="no channel has version"):
        publisher.revoke_version("0" * 64)


def test_renewing_by_the_online_keys(publisher: Publisher, clock: Clock) -> None:
    assert publisher.renew() == ["timestamp"]
    clock.forward(days=8)
    assert publisher.renew() == ["timestamp", "snapshot"]
    versions = {role.name: role.version for role in publisher.status().roles}
    assert versions == {"root": 1, "targets": 1, "snapshot": 2, "timestamp": 3, "dev": 1, "canary": 1, "stable": 1}


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp", "stable"])
def test_renewing_a_role(publisher: Publisher, clock: Clock, device: Device, role: str) -> None:
    device().refresh()
    clock.forward(days=2)
    publisher.renew(role)
    found = {one.name: one for one in publisher.status().roles}[role]
    assert (found.version, found.expired) == (2, False)
    device().refresh()


def test_an_abandoned_repository_can_be_taken_up_again(publisher: Publisher, clock: Clock, device: Device) -> None:
    clock.forward(days=1000)
    assert all(role.expired for role in publisher.status().roles)
    publisher.renew("root", "targets", "dev", "canary", "stable", "snapshot")
    assert not any(role.expired for role in publisher.status().roles)
    device().refresh()


def test_status_of_a_new_repository(publisher: Publisher, place: Path, clock: Clock) -> None:
    status = publisher.status()
    assert (status.floors, {one.current for one in status.channels}) == ({}, {None})
    assert [one.held for one in status.roles] == [one.keys for one in status.roles]
    away = Publisher(place / "releases", ring_of(place / "away"), clock=clock)
    (place / "away" / "trusted").mkdir(parents=True)
    (place / "away" / "trusted" / "root.json").write_bytes(publisher.trusted_root.read_bytes())
    assert {one.held for one in away.status().roles} == {()}


def test_missing_keys_are_named_and_nothing_is_written(publisher: Publisher, place: Path, clock: Clock) -> None:
    (place / "keys" / "online").rename(place / "online")
    before = {path: path.read_bytes() for path in publisher.folder.rglob("*.json")}
    again = Publisher(place / "releases", ring_of(place / "keys"), clock=clock)
    with pytest.raises(
        SigningKeyError, match=r"snapshot needs 1 of the keys snapshot-1 \(\w+\); found none in .*--keys"
    ):
        again.publish("dev", artefact_of(b"1"))
    assert {path: path.read_bytes() for path in publisher.folder.rglob("*.json")} == before
    both = Publisher(place / "releases", ring_of(place / "keys", place / "online"), clock=clock)
    both.publish("dev", artefact_of(b"1"))


def test_a_key_that_fails_to_sign(publisher: Publisher, ring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the token was pulled out")

    monkeypatch.setattr("securesystemslib.signer.CryptoSigner.sign", fail)
    with pytest.raises(SigningKeyError, match=r"dev-1 \(\w+\) cannot sign dev: the token was pulled out"):
        publisher.publish("dev", artefact_of(b"1"))


def test_no_second_repository(publisher: Publisher, place: Path, clock: Clock) -> None:
    with pytest.raises(ReleaseError, match=r"there is a repository already: .*metadata"):
        Publisher.create(place / "releases", ring_of(place / "new keys"), clock=clock)
    with pytest.raises(ReleaseError, match=r"there is a repository already: .*root\.json"):
        Publisher.create(place / "another", ring_of(place / "keys"), clock=clock)


def test_publisher_without_a_trusted_root(publisher: Publisher, place: Path) -> None:
    with pytest.raises(ReleaseError, match=r"make a repository with `fedpeft release keys init`, or put the root.json"):
        Publisher(place / "releases", ring_of(place / "elsewhere")).publish("dev", artefact_of(b"1"))


def test_folder_that_cannot_be_written(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ReleaseError, match=r"cannot hold the folder: .*check that the folder exists"):
        Publisher.create(tmp_path / "file" / "releases", ring_of(tmp_path / "keys"), clock=clock)


def test_full_disk_publishes_nothing(publisher: Publisher, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device", "disk")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(ReleaseError, match=r"cannot write .*: No space left on device"):
            publisher.publish("dev", artefact_of(b"1"))
    with pytest.raises(NotReleased):
        device().resolve("dev")
    publisher.publish("dev", artefact_of(b"1"))
    assert device().resolve("dev").record.release_counter == 1


@pytest.mark.parametrize(("number", "seen"), [(0, 1), (3, 1), (6, 1), (7, 2)])
def test_a_kill_leaves_one_edition_or_the_other(
    publisher: Publisher, device: Device, monkeypatch: pytest.MonkeyPatch, number: int, seen: int
) -> None:
    """Stopped before one of its writes (the seventh is the timestamp's), and taken up again."""
    publisher.publish("dev", artefact_of(b"1"))
    real, left = Path.replace, [number]

    def stop(self: Path, target: Path) -> Path:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            publisher.publish("dev", artefact_of(b"2"))
    assert device().resolve("dev").record.release_counter == seen
    publisher.publish("dev", artefact_of(b"2"))
    assert device().resolve("dev").record.release_counter == 2


def test_a_damaged_file_is_repaired_by_publishing_again(publisher: Publisher, device: Device) -> None:
    one = artefact_of(b"one")
    publisher.publish("dev", one)
    (path,) = publisher.folder.rglob("*.weights.safetensors")
    path.write_bytes(b"ONE")
    with pytest.raises(WrongContent):
        _weights(device("a"), "dev")
    publisher.publish("dev", one)
    assert _weights(device("a"), "dev") == b"one"


def test_publishers_wait_for_each_other(publisher: Publisher, place: Path, clock: Clock) -> None:
    """Two with keys of their own, at once: nothing is lost."""
    others = [Publisher(place / "releases", ring_of(place / "keys"), clock=clock) for _ in range(3)]
    threads = [
        threading.Thread(target=one.publish, args=("dev", artefact_of(bytes([number]))))
        for number, one in enumerate(others)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    targets = signed(publisher.folder, "4.dev.json")["targets"]
    assert sorted(one["custom"]["release_counter"] for path, one in targets.items() if "manifest" in path) == [1, 2, 3]


def test_clock_that_is_a_year_behind(publisher: Publisher, place: Path, ring: KeyRing, clock: Clock) -> None:
    clock.forward(days=-365)
    with pytest.raises(WrongClock, match=r"says 2025-11-20 12:00 UTC, and the last signature is of 2026-11-20 12:00"):
        publisher.publish("dev", artefact_of(b"1"))
    Publisher(place / "releases", ring, clock=clock, trust_clock=True).publish("dev", artefact_of(b"1"))


def test_signing_with_a_clock_that_was_ahead(
    publisher: Publisher, place: Path, ring: KeyRing, clock: Clock, device: Device
) -> None:
    """Devices with the right time refuse it; the publisher can go on once the clock is right."""
    clock.forward(days=365)
    publisher.publish("dev", artefact_of(b"1"))
    clock.forward(days=-365)
    with pytest.raises(WrongClock, match="set the clock; if it is right, the publisher's was wrong"):
        device().refresh()
    again = Publisher(place / "releases", ring, clock=clock, trust_clock=True)
    again.renew("timestamp", "snapshot", "dev")
    assert device().resolve("dev").record.release_counter == 1


def test_an_older_copy_of_the_folder_is_not_signed_on(publisher: Publisher, place: Path) -> None:
    old = {path: path.read_bytes() for path in publisher.folder.rglob("*.json")}
    publisher.publish("dev", artefact_of(b"1"))
    for path, data in old.items():
        path.write_bytes(data)
    with pytest.raises(RollbackAttack, match=r"timestamp from .*releases is older than what was verified before"):
        publisher.publish("dev", artefact_of(b"2"))


def test_what_others_put_into_the_folder_is_not_signed(publisher: Publisher) -> None:
    path = publisher.folder / "metadata" / "1.targets.json"
    document = json.loads(path.read_bytes())
    document["signed"]["targets"] = {}
    path.write_bytes(canonical_json(document))
    (publisher.trusted_root.parent / "metadata" / "targets.json").unlink()
    with pytest.raises(WrongSignature, match=r"targets from .*releases is not signed as it must be"):
        publisher.revoke_version("0" * 64)


@pytest.mark.parametrize(
    "custom",
    [None, 5, {}, {"adapter_id": 3}, {"version_id": "x"}, {"release_counter": 0}, {"release_counter": "1"},
     {"release_counter": 2**53},
     {"audit_head": "a\nb"}, {"audit_head": "a" * 201}, {"base_digest": 5}, {"base_digest": ["x"]}, {"files": ["../x"]},
     {"weights_digest": "A" * 64}, {"version_id": 5}],
)  # fmt: skip
def test_record_that_is_none(custom: object) -> None:
    good = ReleaseRecord("0" * 64, 1, BASE, "1" * 64, "reviews", HEAD, ("a.bin",))
    value = good.to_custom() | custom if isinstance(custom, dict) and custom else custom
    with pytest.raises(WrongContent, match="what is signed for dev/x is no record of a release"):
        ReleaseRecord.from_custom(value, "dev/x")
    assert ReleaseRecord.from_custom(good.to_custom() | {"field of tomorrow": 1}, "dev/x") == good


@pytest.mark.parametrize("floors", [None, 5, {"a": -1}, {"a": True}, {"a": 2**53}, {5: 1}, ["a"]])
def test_floors_that_are_none(floors: object) -> None:
    def signed(custom: object) -> Targets:
        file = TargetFile(0, {"sha256": ""}, "security-floors.json", {"custom": custom})
        return Targets(targets={file.path: file})

    with pytest.raises(WrongContent, match="the signed security floors are"):
        floors_of(signed({"least_release_counters": floors}))
    for targets in (signed(floors), Targets()):
        with pytest.raises(WrongContent, match="the signed security floors are None"):
            floors_of(targets)
    assert floors_of(signed(to_floors({"a": 3}))) == {"a": 3}


def test_spec_is_what_the_tests_say() -> None:
    assert artefact_of(b"x").manifest.spec == SPEC
