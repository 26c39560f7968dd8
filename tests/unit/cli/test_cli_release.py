"""``fedpeft release``, as typed: from keys to a device, and what goes wrong on the way."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from securesystemslib.signer import CryptoSigner

from federated.cli.passphrases import Passphrases
from federated.errors import SigningKeyError
from federated.manifest import AdapterSpec, VersionManifest, sha256_hex
from federated.registry import Registry
from federated.release import ReleaseClient, pem

Command = Callable[..., Any]
SPEC = AdapterSpec("lora", 2, 4.0, False, ())
LOOK = ("--source", "releases", "--root", "keys/trusted/root.json")


def manifest_of(weights: bytes, number: int, parent: str | None) -> VersionManifest:
    fields = {"round_number": number, "parent": parent, "adapter_id": "reviews", "release_counter": number + 1}
    return VersionManifest(sha256_hex(weights), "b" * 64, SPEC, "fedit", "run-a", **fields)


@pytest.fixture
def versions(here: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of v0, v1 and v2 in a registry; ``dev`` is at v2, ``stable`` at v0."""
    ids: list[str] = []
    with Registry.open(here / "registry") as registry:
        for number in range(3):
            weights = f"weights {number}".encode()
            parent = ids[-1] if ids else None
            ids.append(registry.publish(manifest_of(weights, number, parent), weights, channel="dev"))
        registry.channel("stable").promote("v0")
    return ids


@pytest.fixture
def release(fedpeft: Command, here: Path, versions: list[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs ``fedpeft release`` beside that registry and a new repository."""
    monkeypatch.setattr(pem, "COST", 2)
    monkeypatch.setenv("FEDPEFT_PASSPHRASE", "correct")
    monkeypatch.setenv("FEDPEFT_REGISTRY", str(here / "registry"))
    fedpeft("release", "keys", "init", "--signatures", "root=1/2", "--days", "timestamp=1")

    def run(*arguments: object, code: int = 0) -> str:
        done = fedpeft("release", *arguments, code=code)
        return done.out if code == 0 else done.err.splitlines()[-1].removeprefix("error: ")

    return run


def actions(here: Path) -> list[tuple[str, str]]:
    with Registry.open(here / "registry", create=False) as registry:
        assert registry.verify() == []
        return [(one.action, one.subject) for one in registry.audit.entries()]


def test_from_keys_to_a_device(release: Command, here: Path, versions: list[str]) -> None:
    assert {path.name for path in (here / "keys").iterdir()} == {"root", "targets", "online", "channels", "trusted"}
    assert release("publish", "stable") == f"published on stable: version {versions[0]} (release counter 1)\n"
    options = ("stable", *LOOK)
    told = release("verify", *options)
    assert told.startswith(f"a device takes version {versions[0]} (release counter 1), until ")
    assert "weights.safetensors (9 bytes)" in told
    client = ReleaseClient(here / "keys/trusted/root.json", here / "releases", here / "device")
    found = client.resolve("stable")
    assert client.download(found).weights.read_bytes() == b"weights 0"
    with Registry.open(here / "registry", create=False) as registry:
        head, noted = registry.audit.entries()[-2:]
    assert found.record.audit_head == f"{head.number}:{head.digest}"
    assert (noted.action, noted.subject) == ("release", versions[0])


def test_status_shows_who_signs_and_where_channels_point(release: Command, versions: list[str]) -> None:
    release("publish", "stable")
    told = release("status")
    assert re.search(
        r"│ root +│ 1 +│ 20\d\d-\d\d-\d\d \d\d:\d\d +│ 1 of 2 +│ root-1 \(\w{8}\)\*, root-2 \(\w{8}\)\* +│", told
    )
    assert re.search(rf"│ stable +│ {versions[0]} +│ reviews +│ 1 +│ \d+:\w+ +│", told)
    assert re.search(r"│ canary +│ nothing yet +│", told)
    assert told.endswith("security floors: none\n")


def test_a_rollback_follows_the_registry(release: Command, fedpeft: Command, versions: list[str]) -> None:
    release("publish", "stable")
    fedpeft("channel", "promote", "v1", "--to", "stable")
    assert "counter 2" in release("publish", "stable")
    fedpeft("channel", "rollback", "stable")
    assert "counter 1" in release("publish", "stable")


def test_a_rollback_without_the_registry(
    release: Command, fedpeft: Command, here: Path, versions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    release("publish", "stable")
    fedpeft("channel", "promote", "v1", "--to", "stable")
    release("publish", "stable")
    monkeypatch.delenv("FEDPEFT_REGISTRY")
    done = fedpeft("release", "rollback", "stable", "--to", versions[0])
    assert done.out == f"stable points at version {versions[0]} (release counter 1) again\n"
    assert done.err.startswith("in no audit log: name a registry with --registry")
    assert "counter 1" in release("verify", "stable", *LOOK)


def test_files_beside_the_weights(release: Command, here: Path) -> None:
    (here / "small.bin").write_bytes(b"small")
    release("publish", "stable", "--file", "int8.bin=small.bin")
    assert "int8.bin (5 bytes)" in release("verify", "stable", *LOOK)
    assert "expected NAME=PATH" in release("publish", "stable", "--file", "small.bin", code=2)
    assert "cannot read none.bin: No such file" in release("publish", "stable", "--file", "a=none.bin", code=1)


def test_keys_are_replaced_and_noted(release: Command, here: Path) -> None:
    release("publish", "stable")
    assert release("rotate", "stable") == "stable is signed by stable-2 now\n"
    assert release("revoke", "timestamp").startswith("timestamp is signed by timestamp-2 now;")
    assert release("rotate", "root", "--key", "root-2") == "root is signed by root-3 now\n"
    noted = [one for one in actions(here) if one[0] in ("keys", "rotate", "revoke")]
    assert noted == [("keys", "releases"), ("rotate", "stable"), ("revoke", "timestamp"), ("rotate", "root")]


def test_versions_are_revoked_by_their_names(release: Command, here: Path, versions: list[str]) -> None:
    release("publish", "stable")
    release("publish", "dev")
    told = release("revoke", "--version", "v0")
    assert told.startswith(
        "release counters below 2 are refused from now on; devices refuse what is on stable: publish"
    )
    assert re.search(r"│ stable .* │ 1 REVOKED │", release("status"))
    told = release("verify", "stable", *LOOK, code=1)
    assert told.startswith(f"refused, BelowSecurityFloor: version {versions[0][:12]} was revoked")
    assert ("revoke", versions[0]) in actions(here)
    assert release("revoke", "--version", versions[2]).startswith("release counters below 4 are refused")
    assert "below 1 are refused" in release("revoke", "--floor", "1", "--adapter", "reviews")
    assert release("status").endswith("security floors: reviews 1\n")


@pytest.mark.parametrize("arguments", [(), ("dev", "--floor", "3"), ("--version", "v1", "--floor", "3")])
def test_one_thing_is_revoked_at_a_time(release: Command, arguments: tuple[str, ...]) -> None:
    assert release("revoke", *arguments, code=2).startswith("name one thing to revoke")


def test_renewing(release: Command) -> None:
    assert re.fullmatch(r"timestamp until \S+ \S+ UTC\n", release("renew"))
    assert re.fullmatch(r"stable until .* UTC, root until .* UTC\n", release("renew", "stable", "root"))


def test_a_bundle(release: Command, here: Path, versions: list[str]) -> None:
    release("publish", "stable")
    told = release("bundle", "stable", "stick", "--days", "30")
    assert re.fullmatch(rf"stick: version {versions[0]} \(release counter 1\), \d+ bytes, good until .* UTC\n", told)
    assert "a device takes" in release("verify", "stable", "--source", "stick", "--root", "keys/trusted/root.json")


def test_a_device_that_remembers(release: Command, fedpeft: Command, here: Path) -> None:
    release("publish", "stable")
    release("bundle", "stable", "old")
    release("renew", "snapshot")
    options = ("stable", "--root", "keys/trusted/root.json", "--state", "state", "--source")
    release("verify", *options, "releases")
    assert release("verify", *options, "old", code=1).startswith("refused, RollbackAttack: timestamp from old is older")
    assert release("verify", *options, "nowhere", code=1).startswith("refused, Unreachable: nowhere is no folder of")


def test_channel_that_points_nowhere(release: Command) -> None:
    assert "points nowhere; promote a version first: fedpeft channel promote" in release("publish", "canary", code=1)


def test_keys_from_hardware(fedpeft: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = CryptoSigner.generate_ecdsa()._private_key.public_key()
    (here / "root.pub").write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    told = fedpeft("release", "keys", "add", "root-1", "--uri", "hsm:2?label=token", "--public", "root.pub").out
    assert re.fullmatch(r"root-1 \(\w{8}\) is at hsm:2\?label=token\n", told)
    assert (here / "keys" / "root" / "root-1.key.json").exists()
    for arguments, line in [
        (("root", "--uri", "hsm:2", "--public", "root.pub"), "'root' names no key; expected ROLE-NUMBER"),
        (("root-2", "--uri", "hsm:2", "--public", "none"), "cannot read none: No such file"),
    ]:
        assert line in fedpeft("release", "keys", "add", *arguments, code=2 if "expected" in line else 1).err


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--signatures", "root"), "--signatures 'root'; expected ROLE=VALUE"),
        (("--signatures", "root=two"), "--signatures root is 'two'; expected a whole number (signatures: M/N"),
        (("--days", "=3"), "--days '=3'; expected ROLE=VALUE"),
    ],
)
def test_plans_that_are_mistyped(fedpeft: Command, here: Path, options: tuple[str, ...], line: str) -> None:
    assert line in fedpeft("release", "keys", "init", *options, code=2).err
    assert not (here / "keys").exists()


def test_wrong_passphrase(release: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPEFT_PASSPHRASE", "wrong")
    told = release("publish", "stable", code=1)
    assert told.startswith("key stable-1 does not open: the passphrase is wrong")
    assert len(told.splitlines()) == 1
    monkeypatch.setenv("FEDPEFT_PASSPHRASE_STABLE_1", "correct")
    assert release("publish", "stable", code=1).startswith("key snapshot-1 does not open")


def test_passphrase_from_a_file(release: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "secret").write_text("correct\r\nand a remark\n")
    monkeypatch.setenv("FEDPEFT_PASSPHRASE", "wrong")
    release("publish", "stable", "--passphrase-file", "secret")
    (here / "secret").write_text("\n")
    assert "the first line of secret is empty" in release("renew", "--passphrase-file", "secret", code=1)
    assert "cannot read the passphrase from none: No such" in release("renew", "--passphrase-file", "none", code=1)


def test_nobody_to_ask(release: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDPEFT_PASSPHRASE")
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert "needs a passphrase and there is no terminal to ask at; set FEDPEFT_PASSPHRASE" in release("renew", code=1)


def test_passphrases_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """New ones twice; an empty answer repeats the last."""
    monkeypatch.delenv("FEDPEFT_PASSPHRASE", raising=False)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked, answers = [], ["a", "a", "", "b", "c", "d"]
    monkeypatch.setattr("federated.cli.passphrases.getpass", lambda text: asked.append(text) or answers.pop(0))
    passphrases = Passphrases()
    assert [passphrases("root-1", True), passphrases("root-2", True), passphrases("root-3", False)] == [
        b"a",
        b"a",
        b"b",
    ]
    with pytest.raises(SigningKeyError, match="key root-4: the two passphrases differ"):
        passphrases("root-4", True)
    assert asked == [
        "New passphrase of root-1: ",
        "Once more: ",
        "New passphrase of root-2 (Enter: the same as before): ",
        "Passphrase of root-3 (Enter: the same as before): ",
        "New passphrase of root-4 (Enter: the same as before): ",
        "Once more: ",
    ]


def test_folder_that_cannot_be_written(fedpeft: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPEFT_PASSPHRASE", "correct")
    (here / "file").write_bytes(b"")
    told = fedpeft("release", "keys", "init", "--releases", "file/x", code=1).err
    assert told.startswith("error: cannot hold the folder: ")
    assert len(told.splitlines()) == 1


def test_keys_folder_by_environment(release: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "keys").rename(here / "elsewhere")
    assert "there is no keys/trusted/root.json" in release("status", code=1)
    monkeypatch.setenv("FEDPEFT_KEYS", "elsewhere")
    assert "root-1" in release("status")
