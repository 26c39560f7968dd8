"""Replacing keys: planned or in need, each role's; thresholds; devices follow from the root that they have."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, CryptoSigner

import federated.release
from federated.errors import NotReleased, ReleaseError, SigningKeyError, WrongContent
from federated.release import KeyRing, Plan, Publisher, Quorum, ReleaseClient
from federated.release.ceremony import found
from federated.release.edition import Edition
from tests.unit.release.conftest import START, Clock, artefact_of, passphrase, ring_of

Device = Callable[..., ReleaseClient]


def keys_of(publisher: Publisher, role: str) -> list[str]:
    (found,) = [one for one in publisher.status().roles if one.name == role]
    return [label.partition(" ")[0] for label in found.keys]


@pytest.mark.parametrize(
    ("role", "names"),
    [
        ("root", ["root-4", "root-5", "root-6"]),
        ("targets", ["targets-2"]),
        ("snapshot", ["snapshot-2"]),
        ("timestamp", ["timestamp-2"]),
        ("stable", ["stable-2"]),
    ],
)
@pytest.mark.parametrize("way", ["rotate", "revoke"])
def test_keys_of_a_role_are_replaced(
    publisher: Publisher, device: Device, role: str, names: list[str], way: str
) -> None:
    first = publisher.trusted_root.read_bytes()
    publisher.publish("dev", artefact_of(b"1"))
    device(root=first).refresh()
    assert getattr(publisher, way)(role) == names
    assert keys_of(publisher, role) == names
    for name in ("device", "fresh"):
        assert device(name, root=first).resolve("dev").record.release_counter == 1
    publisher.publish("dev", artefact_of(b"2"))
    assert device(root=first).resolve("dev").record.release_counter == 2


def test_rotation_keeps_a_channel_and_revocation_empties_it(publisher: Publisher, device: Device) -> None:
    publisher.publish("stable", artefact_of(b"1"))
    publisher.rotate("stable")
    assert device().resolve("stable").record.release_counter == 1
    publisher.revoke("stable")
    with pytest.raises(NotReleased):
        device().resolve("stable")
    assert publisher.publish("stable", artefact_of(b"2"))[0].release_counter == 2


def test_one_key_of_several(publisher: Publisher, device: Device) -> None:
    first = publisher.trusted_root.read_bytes()
    assert publisher.rotate("root", key="root-2") == ["root-4"]
    assert sorted(keys_of(publisher, "root")) == ["root-1", "root-3", "root-4"]
    device(root=first).refresh()
    with pytest.raises(ReleaseError, match=r"role root has no key 'root-2'; it has root-1 \(\w+\), "):
        publisher.rotate("root", key="root-2")


def test_a_lost_root_key_is_replaced_by_the_others(
    publisher: Publisher, place: Path, clock: Clock, device: Device
) -> None:
    for name in ("root-2.pem", "root-2.key.json"):
        (place / "keys" / "root" / name).unlink()
    first = publisher.trusted_root.read_bytes()
    again = Publisher(place / "releases", ring_of(place / "keys"), clock=clock)
    assert again.rotate("root", key="root-2") == ["root-4"]
    device(root=first).refresh()


def test_a_replaced_key_never_comes_back(publisher: Publisher) -> None:
    assert [publisher.rotate("dev") for _ in range(3)] == [["dev-2"], ["dev-3"], ["dev-4"]]


def test_a_failed_ceremony_leaves_keys_for_the_next(publisher: Publisher, place: Path, clock: Clock) -> None:
    (place / "keys" / "targets").rename(place / "stick")
    with pytest.raises(SigningKeyError, match="targets needs 1 of the keys"):
        Publisher(place / "releases", ring_of(place / "keys"), clock=clock).rotate("dev")
    again = Publisher(place / "releases", ring_of(place / "keys", place / "stick"), clock=clock)
    assert again.rotate("dev") == ["dev-2"]


def test_keys_of_other_names(publisher: Publisher, ring: KeyRing) -> None:
    """Another program made the repository's keys."""
    edition = Edition.open(publisher.folder, ring)
    for key in edition.change("targets").delegations.keys.values():
        key.unrecognized_fields.clear()
    edition.commit(publisher.folder, ring, START)
    assert publisher.rotate("dev") == ["dev-2"]


def test_too_few_root_keys(publisher: Publisher, place: Path, clock: Clock) -> None:
    for name in ("root-2.key.json", "root-3.key.json"):
        (place / "keys" / "root" / name).unlink()
    before = sorted(path.name for path in publisher.folder.rglob("*.json"))
    again = Publisher(place / "releases", ring_of(place / "keys"), clock=clock)
    with pytest.raises(SigningKeyError, match=r"root needs 2 of the keys .*root-2 .*; found root-1 \(\w+\) in"):
        again.rotate("timestamp")
    assert sorted(path.name for path in publisher.folder.rglob("*.json")) == before


def test_a_channel_of_several_people(make: Callable[..., Publisher], tmp_path: Path, clock: Clock) -> None:
    quorums = {"root": Quorum(), "stable": Quorum(2, 3)}
    publisher = make(channels=("stable",), quorums=quorums, bins=2, bins_past=0)
    publisher.publish("stable", artefact_of(b"1"), artefact_of(b"2"))
    client = ReleaseClient(publisher.trusted_root, publisher.folder, tmp_path / "device", clock=clock)
    client.download(client.resolve("stable", artefact_of(b"1").version_id))  # from a bin of the same threshold
    signatures = json.loads((publisher.folder / "metadata" / "2.stable.json").read_bytes())["signatures"]
    assert len(signatures) == 3
    (tmp_path / "made-keys" / "channels" / "stable" / "stable-1.key.json").unlink()
    again = Publisher(publisher.folder, ring_of(tmp_path / "made-keys"), clock=clock)
    again.publish("stable", artefact_of(b"3"))
    client.refresh()
    assert client.resolve("stable").record.release_counter == 3


def test_the_root_that_devices_get_stays_good(publisher: Publisher, device: Device) -> None:
    assert json.loads(publisher.trusted_root.read_bytes())["signed"]["version"] == 1
    publisher.rotate("root")
    device("new").refresh()


def test_keys_that_are_there_already_are_used(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hardware key for the root, added before the repository is made."""
    hardware = {uri: CryptoSigner.generate_ecdsa() for uri in ("token:9", "token:10")}

    class Token(CryptoSigner):
        @classmethod
        def from_priv_key_uri(cls, uri: str, key: object, secrets_handler: object = None) -> CryptoSigner:
            return CryptoSigner(hardware[uri]._private_key, key)

    monkeypatch.setitem(SIGNER_FOR_URI_SCHEME, "token", Token)
    ring = KeyRing(tmp_path / "keys", passphrase=passphrase, cost=2)

    def add(name: str, uri: str) -> None:
        public = hardware[uri]._private_key.public_key()
        pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        ring.add(name, "root", uri=uri, public_pem=pem)

    add("root-2", "token:9")
    publisher = Publisher.create(tmp_path / "releases", ring, clock=clock)
    assert keys_of(publisher, "root") == ["root-1", "root-2", "root-3"]
    assert not (tmp_path / "keys" / "root" / "root-2.pem").exists()
    add("root-5", "token:10")  # ahead of the next rotation
    assert publisher.rotate("root") == ["root-4", "root-5", "root-6"]
    assert not (tmp_path / "keys" / "root" / "root-5.pem").exists()


def test_real_clock(tmp_path: Path) -> None:
    publisher = Publisher.create(tmp_path / "releases", ring_of(tmp_path / "keys"))
    publisher.publish("dev", artefact_of(b"1"))
    assert Publisher(publisher.folder, ring_of(tmp_path / "keys")).renew() == ["timestamp"]
    assert ReleaseClient(publisher.trusted_root, str(publisher.folder), tmp_path / "device").resolve("dev")


def test_a_role_is_signed_once_however_often_it_is_named(publisher: Publisher) -> None:
    publisher.renew("root", "root", "dev", "dev")
    versions = {role.name: role.version for role in publisher.status().roles}
    assert (versions["root"], versions["dev"]) == (2, 2)


def test_roles_that_there_are_not(publisher: Publisher, ring: KeyRing, tmp_path: Path) -> None:
    with pytest.raises(WrongContent, match=r"nobody delegates to dev\.bin-0 as it must be"):
        Edition.open(publisher.folder, ring).needs("dev.bin-0")
    with pytest.raises(ReleaseError, match=r"there is no role dev\.bin-0 yet"):
        found(ring_of(tmp_path / "new"), Plan()).role("dev.bin-0")


@pytest.mark.parametrize("value", ["many", -1, 2**63, True, None])
def test_numbers_that_somebody_with_a_channels_key_made_up(publisher: Publisher, ring: KeyRing, value: object) -> None:
    edition = Edition.open(publisher.folder, ring)
    edition.change("canary").unrecognized_fields["x-fedpeft-counter"] = value
    edition.commit(publisher.folder, ring, START)
    with pytest.raises(WrongContent, match=r"say x-fedpeft-counter = .*; expected a whole number"):
        publisher.publish("dev", artefact_of(b"1"))
    publisher.revoke("canary")
    assert publisher.publish("dev", artefact_of(b"1"))[0].release_counter == 1


def test_a_roles_thief_does_not_decide_how_long_its_signatures_last(publisher: Publisher, ring: KeyRing) -> None:
    edition = Edition.open(publisher.folder, ring)
    for signed in (edition.change("canary"), edition.snapshot, edition.timestamp):
        signed.unrecognized_fields["x-fedpeft-days"] = 10**6
    edition.commit(publisher.folder, ring, START)
    publisher.renew("canary")
    days = {role.name: (role.expires - START).days for role in publisher.status().roles}
    assert (days["canary"], days["snapshot"], days["timestamp"]) == (90, 14, 3)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ReleaseError, match=r"pip install 'federated-peft\[release\]'"):
        importlib.reload(federated.release)


def test_repository_of_another_program(publisher: Publisher, ring: KeyRing, device: Device) -> None:
    """Its top-level targets delegate to nobody."""
    edition = Edition.open(publisher.folder, ring)
    edition.change("targets").delegations = None
    edition.commit(publisher.folder, ring, START)
    with pytest.raises(ReleaseError, match="delegates to no channel: it was not made by this library"):
        publisher.status()
    with pytest.raises(NotReleased):
        device().resolve("dev")
