"""Somebody stands between publisher and device, with or without stolen keys: each attack is refused by its name.

The table below is the one in docs/release.md. Each row sets the adversary up and gives back what the device then does.
The device has installed ``stable`` before; afterwards, with an honest mirror, it goes on as if nothing had been.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from federated.errors import (
    BelowSecurityFloor,
    EndlessData,
    ExpiredMetadata,
    FederatedError,
    FreezeAttack,
    MixAndMatch,
    NotReleased,
    RollbackAttack,
    Unreachable,
    UntrustedRelease,
    WrongClock,
    WrongContent,
    WrongSignature,
)
from federated.manifest import canonical_json, sha256_hex
from federated.release import KeyRing, Plan, Publisher, Quorum, ReleaseClient
from federated.testing.releases import Mirror, Signed, Thief
from tests.unit.release.conftest import Clock, artefact_of, ring_of

ROOT = Path(__file__).resolve().parents[2]
ONLINE = ["snapshot-1", "timestamp-1"]
OLD, NEW, EVIL = artefact_of(b"old"), artefact_of(b"new"), artefact_of(b"evil")


@dataclass
class Scene:
    """A repository with two versions on ``stable``, a mirror of it, and a device that knows the first state."""

    folder: Path
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.ring: KeyRing = ring_of(self.folder / "keys")
        self.publisher = Publisher(self.folder / "releases", self.ring, clock=self.clock)
        self.before = Mirror.of(self.folder / "before")
        self.mirror = Mirror.of(self.folder / "releases")
        self.thief = Thief(self.mirror, self.ring)

    def device(self, name: str = "device", source: Mirror | None = None) -> ReleaseClient:
        root = self.publisher.trusted_root.read_bytes()
        return ReleaseClient(root, source or self.mirror, self.folder / name, clock=self.clock)

    def install(self, name: str = "device", channel: str = "stable") -> bytes:
        client = self.device(name)
        return client.download(client.resolve(channel)).weights.read_bytes()

    def updated(self) -> None:
        """The device has seen the newest state."""
        self.device().refresh()

    def lists(self, role: str, channel: str, *, keys: list[str]) -> None:
        """A role's keyholder releases the evil version, whose files are on the mirror, on a channel."""
        version, weights = EVIL.version_id, EVIL.manifest.weights_digest
        record = canonical_json(EVIL.manifest.to_dict())
        custom = {
            "version_id": version,
            "release_counter": 99,
            "base_digest": EVIL.manifest.base_digest,
            "weights_digest": weights,
            "adapter_id": "",
            "audit_head": "",
            "files": [],
        }
        files = {
            f"{channel}/{version}/weights.safetensors": _target(EVIL.weights),
            f"{channel}/{version}/manifest.json": _target(record, custom),
            f"{channel}/current.json": _target(b"{}", custom),
        }
        self.mirror.files[f"targets/{channel}/{version}/{weights}.weights.safetensors"] = EVIL.weights
        self.mirror.files[f"targets/{channel}/{version}/{version}.manifest.json"] = record
        self.thief.forge(role, lambda signed: signed["targets"].update(files), keys=keys)


def _target(data: bytes, custom: Signed | None = None) -> Signed:
    target: Signed = {"length": len(data), "hashes": {"sha256": sha256_hex(data)}}
    return target if custom is None else {**target, "custom": custom}


Step = Callable[[], object]
Setup = Callable[[Scene], Step]
ATTACKS: dict[str, tuple[Setup, type[FederatedError]]] = {}


def attack(
    title: str, refused_as: type[FederatedError]
) -> Callable[[Callable[[Scene], Step]], Callable[[Scene], Step]]:
    def register(setup: Callable[[Scene], Step]) -> Callable[[Scene], Step]:
        assert title not in ATTACKS
        ATTACKS[title] = (setup, refused_as)
        return setup

    return register


@attack("arbitrary installation: other weights under the name", WrongContent)
def _(scene: Scene) -> Step:
    name = next(name for name in scene.mirror.files if NEW.manifest.weights_digest in name)
    scene.mirror.files[name] = b"eve"
    return scene.install


@attack("arbitrary installation: channel metadata without a key", WrongSignature)
def _(scene: Scene) -> Step:
    name = scene.mirror.named("3.stable.json")
    document = json.loads(scene.mirror.files[name])
    document["signed"]["targets"] = {}
    scene.mirror.files[name] = canonical_json(document)
    return scene.install


@attack("arbitrary installation: bytes that are no metadata", WrongContent)
def _(scene: Scene) -> Step:
    scene.mirror.files[scene.mirror.named("3.stable.json")] = b"\xffnonsense"
    return scene.install


@attack("rollback: the whole mirror as it was before", RollbackAttack)
def _(scene: Scene) -> Step:
    scene.updated()
    return scene.device(source=scene.before).refresh


@attack("freeze: the mirror stays as it was, for four days", FreezeAttack)
def _(scene: Scene) -> Step:
    scene.clock.forward(days=4)
    return scene.device(source=scene.before).refresh


@attack("mix-and-match: older channel metadata under the newer name", MixAndMatch)
def _(scene: Scene) -> Step:
    files = scene.mirror.files
    files["metadata/3.stable.json"] = files["metadata/2.stable.json"]
    return scene.install


@attack("mix-and-match: an older snapshot under the newer name", MixAndMatch)
def _(scene: Scene) -> Step:
    files = scene.mirror.files
    files["metadata/3.snapshot.json"] = files["metadata/2.snapshot.json"]
    return scene.install


@attack("endless data: a timestamp that never ends", EndlessData)
def _(scene: Scene) -> Step:
    scene.mirror.endless.add("metadata/timestamp.json")
    return scene.install


@attack("endless data: weights that never end", EndlessData)
def _(scene: Scene) -> Step:
    scene.mirror.endless |= {name for name in scene.mirror.files if "weights" in name}
    return scene.install


@attack("wrong channel key: canary's and the online keys sign `stable`", WrongSignature)
def _(scene: Scene) -> Step:
    scene.lists("stable", "stable", keys=["canary-1"])
    scene.thief.relink("stable", keys=ONLINE)
    return scene.install


@attack("stolen online keys: they sign `stable`", WrongSignature)
def _(scene: Scene) -> Step:
    scene.lists("stable", "stable", keys=ONLINE)
    scene.thief.relink("stable", keys=ONLINE)
    return scene.install


@attack("stolen online keys: a new snapshot of older channel metadata", RollbackAttack)
def _(scene: Scene) -> Step:
    scene.updated()
    del scene.mirror.files["metadata/3.stable.json"]
    scene.thief.relink("stable", keys=ONLINE)
    return scene.install


@attack("stolen online keys: a new timestamp of an older snapshot", RollbackAttack)
def _(scene: Scene) -> Step:
    scene.updated()
    older = json.loads(scene.before.files["metadata/timestamp.json"])["signed"]["meta"]
    scene.thief.forge("timestamp", lambda signed: signed.update(meta=older), keys=ONLINE)
    return scene.install


@attack("stolen online keys: a timestamp of another snapshot than it names", MixAndMatch)
def _(scene: Scene) -> Step:
    other = {"snapshot.json": {"version": 7}}
    scene.mirror.files["metadata/7.snapshot.json"] = scene.mirror.files["metadata/3.snapshot.json"]
    scene.thief.forge("timestamp", lambda signed: signed.update(meta=other), keys=ONLINE)
    return scene.install


@attack("stolen online keys: a snapshot that drops a channel", MixAndMatch)
def _(scene: Scene) -> Step:
    scene.updated()
    scene.thief.forge("snapshot", lambda signed: signed["meta"].pop("stable.json"), keys=ONLINE)
    scene.thief.relink(keys=ONLINE)
    return scene.install


@attack("stolen canary key: a version under `stable` in canary's metadata", NotReleased)
def _(scene: Scene) -> Step:
    scene.lists("canary", "stable", keys=["canary-1"])
    scene.thief.relink("canary", keys=ONLINE)
    client = scene.device()
    return lambda: client.resolve("stable", EVIL.version_id)


@attack("stolen channel key: a record of one version at the weights of another", WrongContent)
def _(scene: Scene) -> Step:
    path = f"stable/{NEW.version_id}/weights.safetensors"
    evil = _target(EVIL.weights)
    scene.thief.forge("stable", lambda signed: signed["targets"].update({path: evil}), keys=["stable-1"])
    scene.thief.relink("stable", keys=ONLINE)
    return scene.install


@attack("threshold missed: a root with one signature of two", WrongSignature)
def _(scene: Scene) -> Step:
    scene.thief.forge("root", lambda signed: None, keys=["root-1"])
    return scene.install


@attack("expired: a channel's keyholder stopped", ExpiredMetadata)
def _(scene: Scene) -> Step:
    scene.clock.forward(days=91)
    scene.publisher.renew()
    scene.mirror.files |= Mirror.of(scene.publisher.folder).files
    return scene.install


@attack("expired: root's keyholders stopped", ExpiredMetadata)
def _(scene: Scene) -> Step:
    scene.clock.forward(days=366)
    scene.publisher.renew("targets", "stable")
    scene.mirror.files |= Mirror.of(scene.publisher.folder).files
    return scene.install


@attack("fast-forward: stolen online keys push versions far ahead, then an honest mirror", RollbackAttack)
def _(scene: Scene) -> Step:
    honest = Mirror.of(scene.publisher.folder)
    scene.thief.relink(keys=ONLINE, version=2**31)
    scene.updated()
    return scene.device(source=honest).refresh


@attack("revoked: a version below the security floor", BelowSecurityFloor)
def _(scene: Scene) -> Step:
    scene.publisher.revoke_version(NEW.version_id)
    scene.mirror.files |= Mirror.of(scene.publisher.folder).files
    return scene.install


@attack("no answer", Unreachable)
def _(scene: Scene) -> Step:
    scene.mirror.down = True
    return scene.install


@attack("a clock that was set back a year", WrongClock)
def _(scene: Scene) -> Step:
    scene.clock.forward(days=-365)
    return scene.install


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two states of one repository."""
    folder = tmp_path_factory.mktemp("stage")
    publisher = Publisher.create(folder / "releases", ring_of(folder / "keys"), clock=Clock())
    publisher.publish("stable", OLD)
    shutil.copytree(folder / "releases", folder / "before")
    publisher.publish("stable", NEW)
    return folder


@pytest.fixture
def scene(stage: Path, tmp_path: Path) -> Scene:
    made = Scene(Path(shutil.copytree(stage, tmp_path / "scene")))
    client = made.device(source=made.before)
    client.download(client.resolve("stable"))
    return made


@pytest.mark.parametrize("title", ATTACKS)
def test_attack_is_refused_by_name(scene: Scene, title: str) -> None:
    setup, expected = ATTACKS[title]
    with pytest.raises(FederatedError) as caught:
        setup(scene)()
    assert type(caught.value) is expected, caught.value
    assert len(str(caught.value)) > 40


@pytest.mark.parametrize("title", [one for one in ATTACKS if not re.match("fast-forward|revoked|expired|a clock", one)])
def test_nothing_is_lost_by_an_attack(scene: Scene, title: str) -> None:
    """What was installed is still there, and with an honest mirror (and new online keys, if need be) it goes on."""
    with pytest.raises(FederatedError):
        ATTACKS[title][0](scene)()
    files = scene.folder / "device" / "files"
    assert (files / OLD.version_id / "weights.safetensors").read_bytes() == b"old"
    assert not (files / EVIL.version_id).exists()
    scene.publisher.renew()
    for role in ("timestamp", "snapshot") if "key" in title else ():
        scene.publisher.revoke(role)
    scene.mirror = Mirror.of(scene.publisher.folder)
    assert scene.install() == b"new"


def test_fast_forward_is_recovered_from_by_new_keys(scene: Scene) -> None:
    """TUF 5.3.11: what only stolen keys signed is forgotten with them."""
    scene.thief.relink(keys=ONLINE, version=2**31)
    scene.updated()
    for role in ("timestamp", "snapshot"):
        scene.publisher.revoke(role)
    scene.mirror.files = Mirror.of(scene.publisher.folder).files
    assert scene.install() == b"new"
    scene.thief.relink(keys=ONLINE, version=2**31 + 1)
    with pytest.raises(WrongSignature):
        scene.install()


def test_a_channels_versions_are_pushed_ahead_and_recovered(scene: Scene) -> None:
    """Its own key and the online ones: the snapshot's key must be replaced too, it names the versions."""
    scene.thief.forge("stable", lambda signed: None, keys=["stable-1"], version=2**31)
    scene.thief.relink("stable", keys=ONLINE)
    scene.updated()
    scene.publisher.revoke("stable")
    for role in ("snapshot", "timestamp"):
        scene.publisher.revoke(role)
    scene.publisher.publish("stable", NEW)
    scene.mirror.files = Mirror.of(scene.publisher.folder).files
    assert scene.install() == b"new"


def test_a_stolen_canary_key_harms_canary_until_it_is_revoked(scene: Scene) -> None:
    """What it can do, said plainly: anything on canary, nothing elsewhere."""
    scene.lists("canary", "canary", keys=["canary-1"])
    scene.thief.relink("canary", keys=ONLINE)
    assert scene.install("guinea pig", "canary") == b"evil"
    assert scene.install() == b"new"
    scene.publisher.revoke("canary")
    scene.mirror.files |= Mirror.of(scene.publisher.folder).files
    with pytest.raises(NotReleased):
        scene.install("other", "canary")
    scene.lists("canary", "canary", keys=["canary-1"])
    scene.thief.relink("canary", keys=ONLINE)
    with pytest.raises(WrongSignature):
        scene.install("third", "canary")


@pytest.mark.parametrize("name", ["timestamp.json", "weights.safetensors"])
def test_endless_data_costs_the_device_little(scene: Scene, name: str) -> None:
    scene.mirror.endless = {one for one in scene.mirror.files if one.endswith(name)}
    with pytest.raises(EndlessData):
        scene.install()
    assert scene.mirror.sent < 200_000


def test_a_length_that_a_stolen_key_signed_is_no_licence(scene: Scene) -> None:
    """The online key says that the snapshot has a terabyte; the device's own limit holds."""
    scene.thief.relink(keys=ONLINE)

    def grow(signed: Signed) -> None:
        signed["meta"]["snapshot.json"] = {"version": 4, "length": 10**12}

    scene.thief.forge("timestamp", grow, keys=ONLINE)
    scene.mirror.endless.add("metadata/4.snapshot.json")
    with pytest.raises(EndlessData, match="more than the 4000000 bytes"):
        scene.install()


@pytest.mark.parametrize(
    "change",
    [
        lambda signed: signed["targets"]["stable/current.json"].pop("custom"),
        lambda signed: signed["targets"]["stable/current.json"]["custom"].update(version_id="../../etc"),
        lambda signed: signed["targets"]["stable/current.json"]["custom"].update(files=["../../etc/passwd"]),
        lambda signed: signed["targets"]["stable/current.json"]["custom"].update(release_counter=-1),
    ],
)
def test_records_that_a_channels_thief_makes_up(scene: Scene, change: Callable[[Signed], object]) -> None:
    scene.thief.forge("stable", change, keys=["stable-1"])
    scene.thief.relink("stable", keys=ONLINE)
    with pytest.raises(WrongContent):
        scene.install()


def test_a_version_under_the_id_of_another(scene: Scene) -> None:
    def swap(signed: Signed) -> None:
        targets = signed["targets"]
        targets[f"stable/{OLD.version_id}/manifest.json"] = targets[f"stable/{NEW.version_id}/manifest.json"]

    scene.thief.forge("stable", swap, keys=["stable-1"])
    scene.thief.relink("stable", keys=ONLINE)
    with pytest.raises(WrongContent, match="is signed as version"):
        scene.device().resolve("stable", OLD.version_id)


def test_files_that_a_record_names_and_nobody_signed(scene: Scene) -> None:
    scene.thief.forge(
        "stable",
        lambda signed: signed["targets"].pop(f"stable/{NEW.version_id}/weights.safetensors"),
        keys=["stable-1"],
    )
    scene.thief.relink("stable", keys=ONLINE)
    with pytest.raises(NotReleased, match=r"signed stable/\w+/weights\.safetensors"):
        scene.install()


def test_only_a_weak_hash_is_signed(scene: Scene) -> None:
    def weaken(signed: Signed) -> None:
        signed["targets"][f"stable/{NEW.version_id}/weights.safetensors"]["hashes"] = {"md5": "0" * 32}

    scene.thief.forge("stable", weaken, keys=["stable-1"])
    scene.thief.relink("stable", keys=ONLINE)
    with pytest.raises(WrongContent, match=r"no SHA-256 is signed for .*, found \['md5'\]"):
        scene.install()


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "stable"])
def test_metadata_of_another_role(scene: Scene, role: str) -> None:
    """A document with good signatures of its own in another's place."""
    name = (
        "metadata/timestamp.json"
        if role == "timestamp"
        else scene.mirror.named(f"{3 if role != 'targets' else 1}.{role}.json")
    )
    scene.mirror.files[name] = scene.mirror.files["metadata/1.root.json"]
    with pytest.raises(UntrustedRelease):
        scene.install("fresh")


def test_a_channel_that_delegates_to_itself_ends(scene: Scene) -> None:
    def loop(signed: Signed) -> None:
        above = scene.thief.signed("targets")["delegations"]
        (own,) = [role for role in above["roles"] if role["name"] == "stable"]
        signed["delegations"] = {"keys": above["keys"], "roles": [{**own, "terminating": False}]}

    scene.thief.forge("stable", loop, keys=["stable-1"])
    scene.thief.relink("stable", keys=ONLINE)
    with pytest.raises(NotReleased):
        scene.device().resolve("stable", "0" * 64)
    assert scene.install() == b"new"


@pytest.mark.parametrize("nested", [False, True])
def test_who_comes_later_does_not_speak_for_a_channel(scene: Scene, nested: bool) -> None:
    """A terminating delegation ends the search, its own or one below it: who has the same paths is not asked."""

    def overlap(signed: Signed) -> None:
        roles = {role["name"]: role for role in signed["delegations"]["roles"]}
        roles["canary"]["paths"] += roles["stable"]["paths"]
        roles["stable"]["terminating"] = not nested
        signed["delegations"]["roles"] = [roles["stable"], roles["canary"]]

    above = scene.thief.signed("targets")["delegations"]
    below = {"keys": above["keys"], "roles": [role for role in above["roles"] if role["name"] == "stable"]}
    scene.thief.forge("targets", overlap, keys=["targets-1"])
    if nested:
        scene.thief.forge("stable", lambda signed: signed.update(delegations=below), keys=["stable-1"])
        scene.thief.relink("stable", keys=ONLINE)
    scene.lists("canary", "stable", keys=["canary-1"])
    scene.thief.relink("targets", "canary", keys=ONLINE)
    client = scene.device()
    with pytest.raises(NotReleased):
        client.resolve("stable", EVIL.version_id)


def test_a_channel_of_two_people_needs_both(tmp_path: Path) -> None:
    clock, ring = Clock(), ring_of(tmp_path / "keys")
    plan = Plan(channels=("stable",), quorums={"root": Quorum(), "stable": Quorum(2, 2)})
    publisher = Publisher.create(tmp_path / "releases", ring, plan, clock=clock)
    publisher.publish("stable", OLD)
    mirror = Mirror.of(publisher.folder)
    thief = Thief(mirror, ring)
    thief.forge("stable", lambda signed: None, keys=["stable-1"])
    thief.relink("stable", keys=ONLINE)
    with pytest.raises(WrongSignature, match="stable was signed by 1/2 keys"):
        ReleaseClient(publisher.trusted_root, mirror, tmp_path / "device", clock=clock).resolve("stable")


def test_a_floor_that_is_gone(scene: Scene) -> None:
    """The targets' key was stolen, and the floor taken out."""
    scene.thief.forge("targets", lambda signed: signed["targets"].clear(), keys=["targets-1"])
    scene.thief.relink("targets", keys=ONLINE)
    with pytest.raises(WrongContent, match="the signed security floors are None"):
        scene.install()


def test_an_unknown_root_key_type_is_refused(scene: Scene) -> None:
    root = json.loads(scene.publisher.trusted_root.read_bytes())
    for key in root["signed"]["keys"].values():
        key["keytype"] = "none"
    with pytest.raises(WrongContent, match="Unsupported public key"):
        ReleaseClient(canonical_json(root), scene.mirror, scene.folder / "new", clock=scene.clock).refresh()


def test_the_docs_have_the_same_table() -> None:
    text = (ROOT / "docs" / "release.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (.+?) \| `(\w+)` \|$", text.split("| attack | refused as |")[1].split("\n\n")[0], re.MULTILINE
    )
    assert rows == [(title, kind.__name__) for title, (_, kind) in ATTACKS.items()]
