"""A sealed folder holds what was sealed, by whom it should be; whatever else is in it is refused by its file's name."""

import base64
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from securesystemslib.signer import CryptoSigner

from federated.errors import FederatedError, ReleaseError, SigningKeyError, WrongContent, WrongSignature
from federated.manifest import VersionManifest
from federated.release import KeyRing
from federated.release.dsse import PublicKey, SealKey
from federated.release.exportable import export
from federated.release.seal import PROVENANCE, SIGNATURE, check_seal, seal

from .conftest import artefact_of, passphrase, ring_of

PRIVACY = {
    "accounts": [
        {"unit": "client", "epsilon": 3.5, "target_delta": 1e-5, "accountant": "rdp", "private": True,
         "not_protected": []},
    ]
}  # fmt: skip


def manifest(**fields: Any) -> VersionManifest:
    values = {
        "adapter_id": "support", "round_number": 5, "participants": 3, "parent": "d" * 64, "code_version": "0.1.0",
        "base": {"config": "1" * 64, "weights": "2" * 64, "tokenizer": None}, "release_counter": 7,
    }  # fmt: skip
    return artefact_of(b"weights", **(values | fields)).manifest


@pytest.fixture(scope="module")
def key() -> SealKey:
    return SealKey(CryptoSigner(ec.generate_private_key(ec.SECP256R1())))


@pytest.fixture
def folder(tmp_path: Path, key: SealKey) -> Path:
    """Sealed."""
    made = tmp_path / "support-adapter"
    (made / "deep").mkdir(parents=True)
    (made / "adapter_config.json").write_text("{}")
    (made / "deep" / "weights.bin").write_bytes(b"weights")
    seal(made, manifest(privacy=PRIVACY), key)
    return made


def bundle_of(folder: Path) -> Any:
    return json.loads((folder / SIGNATURE).read_bytes())


def payload_of(envelope: Any) -> Any:
    return json.loads(base64.b64decode(envelope["payload"]))


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_seal_that_holds_says_where_it_came_from(folder: Path, key: SealKey) -> None:
    found = check_seal(folder, key.public)
    assert set(found.files) == {"adapter_config.json", "deep/weights.bin", PROVENANCE}
    assert found.facts == {
        "version": manifest(privacy=PRIVACY).version_id,
        "base digest": "b" * 64,
        "parent version": "d" * 64,
        "round": "5 of run-a",
        "method": "fedit+sgd",
        "participants": "3",
        "privacy": "client: epsilon 3.5 at target_delta 1e-05",
    }


def test_a_first_version_without_an_account(tmp_path: Path, key: SealKey) -> None:
    (tmp_path / "file").touch()
    seal(tmp_path, manifest(parent=None, adapter_id="", code_version=""), key)
    facts = check_seal(tmp_path, key.public).facts
    assert (facts["parent version"], facts["privacy"]) == ("none", "not accounted")


def test_format_of_the_bundle(folder: Path, key: SealKey) -> None:
    """Golden: what ``model_signing`` 1.1 and readers of sigstore bundles look for, byte by byte where it is signed."""
    bundle = bundle_of(folder)
    assert bundle["mediaType"] == "application/vnd.dev.sigstore.bundle.v0.3+json"
    assert bundle["verificationMaterial"] == {
        "publicKey": {"hint": hashlib.sha256(key.public.pem).hexdigest()},
        "tlogEntries": [],
    }
    names = ["adapter_config.json", "deep/weights.bin", PROVENANCE]
    digests = [digest_of(folder / name) for name in names]
    root = hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in digests)).hexdigest()
    assert payload_of(bundle["dsseEnvelope"]) == {
        "_type": "https://in-toto.io/Statement/v1",
        "predicateType": "https://model_signing/signature/v1.0",
        "subject": [{"name": "support", "digest": {"sha256": root}}],
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [".git", ".gitattributes", ".github", ".gitignore", "model.sig"],
            },
            "resources": [
                {"name": name, "algorithm": "sha256", "digest": digest}
                for name, digest in zip(names, digests, strict=True)
            ],
        },
    }


def test_format_of_the_provenance(folder: Path) -> None:
    """Golden: in-toto Statement v1 with SLSA provenance v1, one envelope a line."""
    (line,) = (folder / PROVENANCE).read_bytes().splitlines()
    assert payload_of(json.loads(line)) == {
        "_type": "https://in-toto.io/Statement/v1",
        "predicateType": "https://slsa.dev/provenance/v1",
        "subject": [
            {"name": name, "digest": {"sha256": digest_of(folder / name)}}
            for name in ("adapter_config.json", "deep/weights.bin")
        ],
        "predicate": {
            "buildDefinition": {
                "buildType": "urn:federated-peft:export:1",
                "externalParameters": {
                    "adapter_id": "support",
                    "licence": "",
                    "release_counter": 7,
                    "version_id": manifest(privacy=PRIVACY).version_id,
                    "weights_digest": hashlib.sha256(b"weights").hexdigest(),
                },
                "internalParameters": {
                    "method": "fedit+sgd",
                    "metrics": {},
                    "participants": 3,
                    "privacy": PRIVACY,
                    "spec_digest": manifest().spec.digest,
                },
                "resolvedDependencies": [
                    {
                        "name": "base model",
                        "digest": {"sha256": "b" * 64},
                        "annotations": {"config": "1" * 64, "weights": "2" * 64},
                    },
                    {
                        "name": "round",
                        "uri": "urn:federated-peft:run:run-a",
                        "annotations": {"run_id": "run-a", "round_number": 5},
                    },
                    {"name": "parent version", "digest": {"sha256": "d" * 64}},
                ],
            },
            "runDetails": {
                "builder": {"id": "urn:federated-peft:builder", "version": {"federated-peft": "0.1.0"}},
                "metadata": {"invocationId": "run-a/5"},
            },
        },
    }


@pytest.mark.parametrize(
    ("curve", "hashed"), [(ec.SECP256R1(), SHA256()), (ec.SECP384R1(), SHA384()), (ec.SECP521R1(), SHA512())]
)
def test_signatures_are_ecdsa_over_the_pre_authentication_encoding(tmp_path: Path, curve: Any, hashed: Any) -> None:
    """Checked by hand with `cryptography`, and not for another payload."""
    private = ec.generate_private_key(curve)
    (tmp_path / "file").touch()
    seal(tmp_path, manifest(), SealKey(CryptoSigner(private)))
    for envelope in (bundle_of(tmp_path)["dsseEnvelope"], json.loads((tmp_path / PROVENANCE).read_bytes())):
        payload, (one,) = base64.b64decode(envelope["payload"]), envelope["signatures"]
        signature = base64.b64decode(one["sig"])
        signed = b"DSSEv1 28 application/vnd.in-toto+json %d " % len(payload) + payload
        private.public_key().verify(signature, signed, ec.ECDSA(hashed))
        with pytest.raises(InvalidSignature):
            private.public_key().verify(signature, payload, ec.ECDSA(hashed))
    pem = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    check_seal(tmp_path, PublicKey.of_pem(pem, "key"))


def refused(folder: Path, key: PublicKey, match: str, error: type[FederatedError] = WrongContent) -> None:
    with pytest.raises(error, match=match):
        check_seal(folder, key)


def test_what_differs_is_named(folder: Path, key: SealKey) -> None:
    (folder / "deep" / "weights.bin").write_bytes(b"weighty")
    refused(folder, key.public, r"is not what was sealed; changed: deep/weights\.bin$")
    (folder / "deep" / "run.py").touch()
    (folder / "adapter_config.json").unlink()
    refused(
        folder,
        key.public,
        r"changed: deep/weights\.bin; missing: adapter_config\.json; not sealed: deep/run\.py$",
    )


def test_what_a_repository_adds_is_no_difference(folder: Path, key: SealKey) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").touch()
    (folder / ".gitattributes").touch()
    assert len(check_seal(folder, key.public).files) == 3
    (folder / "deep" / ".gitignore").touch()
    refused(folder, key.public, r"not sealed: deep/\.gitignore")


def test_another_key_is_refused(folder: Path, key: SealKey) -> None:
    other = SealKey(CryptoSigner(ec.generate_private_key(ec.SECP256R1())))
    refused(folder, other.public, f"by key {key.public.hint[:12]}; expected .* by key {other.public.hint[:12]}")
    bundle = bundle_of(folder)
    bundle["verificationMaterial"]["publicKey"]["hint"] = other.public.hint
    (folder / SIGNATURE).write_text(json.dumps(bundle))
    refused(folder, other.public, "not by key", WrongSignature)


def rewrite(folder: Path, key: SealKey, change: Callable[[Any], None]) -> None:
    """Change what ``model.sig`` signs, and sign it again by the same key."""
    bundle = bundle_of(folder)
    statement = payload_of(bundle["dsseEnvelope"])
    del statement["_type"]
    change(statement)
    bundle["dsseEnvelope"] = key.envelope(statement)
    (folder / SIGNATURE).write_text(json.dumps(bundle))


def test_changed_statements_are_refused(folder: Path, key: SealKey) -> None:
    bundle = bundle_of(folder)
    statement = payload_of(bundle["dsseEnvelope"])
    statement["subject"][0]["name"] = "another"
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    (folder / SIGNATURE).write_text(json.dumps(bundle))
    refused(folder, key.public, "or what is signed was changed", WrongSignature)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda one: one["predicate"]["serialization"].update(method="shards"), "leaves files out"),
        (lambda one: one["predicate"]["serialization"].update(hash_type="blake3"), "leaves files out"),
        (lambda one: one["predicate"]["serialization"]["ignore_paths"].append("deep"), "leaves files out"),
        (lambda one: one["subject"][0]["digest"].update(sha256="0" * 64), "contradicts itself"),
        (lambda one: one["predicate"]["resources"].append(one["predicate"]["resources"][0]), "contradicts itself"),
        (lambda one: one.update(subject=[]), "signs no list of files"),
        (lambda one: one.update(predicate=5), "signs no list of files"),
        (lambda one: one["predicate"]["resources"][0].update(digest="no digest"), "signs no list of files"),
        (lambda one: one.update(predicateType="https://slsa.dev/provenance/v1"), "signed is .*slsa"),
    ],
)
def test_other_statements_of_the_key_are_no_seal(folder: Path, key: SealKey, change: Any, match: str) -> None:
    rewrite(folder, key, change)
    refused(folder, key.public, match)


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one.update(predicate=5),
        lambda one: one.update(subject=[{"name": "x"}]),
        lambda one: one["predicate"]["buildDefinition"]["internalParameters"].update(privacy=5),
        lambda one: one["predicate"]["buildDefinition"].update(resolvedDependencies=[]),
    ],
)
def test_other_provenance_of_the_key_is_no_seal(folder: Path, key: SealKey, change: Any) -> None:
    statement = payload_of(json.loads((folder / PROVENANCE).read_bytes()))
    del statement["_type"]
    change(statement)
    replace_provenance(folder, key, json.dumps(key.envelope(statement)).encode())
    refused(folder, key.public, "says nothing of a version")


def replace_provenance(folder: Path, key: SealKey, data: bytes) -> None:
    """As the key's owner could."""
    (folder / PROVENANCE).write_bytes(data)

    def about_it(statement: Any) -> None:
        resources = statement["predicate"]["resources"]
        (one,) = (one for one in resources if one["name"] == PROVENANCE)
        one["digest"] = hashlib.sha256(data).hexdigest()
        root = hashlib.sha256(b"".join(bytes.fromhex(each["digest"]) for each in resources)).hexdigest()
        statement["subject"][0]["digest"]["sha256"] = root

    rewrite(folder, key, about_it)


def test_provenance_of_another_folder_is_refused(folder: Path, key: SealKey, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "weights.bin").touch()
    seal(tmp_path / "other", manifest(), key)
    replace_provenance(folder, key, (tmp_path / "other" / PROVENANCE).read_bytes())
    refused(folder, key.public, r"missing: weights\.bin; not sealed: adapter_config\.json, deep/weights\.bin")


@pytest.mark.parametrize("name", [SIGNATURE, PROVENANCE])
def test_a_seal_that_is_not_there(folder: Path, key: SealKey, name: str) -> None:
    (folder / name).unlink()
    refused(folder, key.public, f"{name} is missing: the folder is not sealed")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[]", "no bundle of a signature by a key"),
        (b"{}", "no bundle of a signature by a key"),
        (
            b'{"mediaType":"other","verificationMaterial":{"publicKey":{"hint":""}},"dsseEnvelope":{}}',
            "is other by key",
        ),
        (b" " * (2**24 + 1), "has more than 16777216 bytes"),
    ],
)
def test_a_signature_that_is_none(folder: Path, key: SealKey, data: bytes, match: str) -> None:
    (folder / SIGNATURE).write_bytes(data)
    refused(folder, key.public, match)


@pytest.mark.parametrize(
    "envelope",
    [5, {}, {"payload": "%", "signatures": [{"sig": ""}]}, {"payload": "", "signatures": []}, {"payload": 5},
     {"payload": "", "signatures": [{}]}],
)  # fmt: skip
def test_an_envelope_that_is_none(folder: Path, key: SealKey, envelope: Any) -> None:
    bundle = bundle_of(folder) | {"dsseEnvelope": envelope}
    (folder / SIGNATURE).write_text(json.dumps(bundle))
    refused(folder, key.public, "no DSSE envelope of one signed statement")


def test_links_and_devices_are_refused(folder: Path, key: SealKey, tmp_path: Path) -> None:
    (folder / "link").symlink_to(folder / "adapter_config.json")
    refused(folder, key.public, "link is a link or a device")
    (folder / "link").unlink()
    os.mkfifo(folder / "pipe")
    refused(folder, key.public, "pipe is a link or a device")
    (folder / "pipe").unlink()
    (folder / SIGNATURE).rename(tmp_path / SIGNATURE)
    (folder / SIGNATURE).symlink_to(tmp_path / SIGNATURE)
    refused(folder, key.public, "is missing")


def test_no_folder(tmp_path: Path, key: SealKey) -> None:
    refused(tmp_path / "nothing", key.public, "is no folder", ReleaseError)


def test_a_folder_is_sealed_once(folder: Path, key: SealKey) -> None:
    for name in (PROVENANCE, SIGNATURE):
        with pytest.raises(ReleaseError, match="is sealed already"):
            seal(folder, manifest(), key)
        (folder / name).unlink()


def test_an_export_is_sealed_or_not_there(tmp_path: Path, key: SealKey) -> None:
    from .test_release_exportable import subject, two_files

    files = export(subject(), two_files, tmp_path / "out", key=key)
    assert files == ("a.txt", "deep/b.txt", SIGNATURE, PROVENANCE)
    assert check_seal(tmp_path / "out", key.public).facts["version"] == subject().artefact.version_id


# Keys.


def test_a_key_of_the_ring_seals(tmp_path: Path) -> None:
    made = ring_of(tmp_path / "keys").make("seal", "seal", sealing=True)
    one = SealKey.of_ring(ring_of(tmp_path / "keys"), "seal")
    assert one.public == PublicKey(made)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    seal(tmp_path / "out", manifest(), one)
    check_seal(tmp_path / "out", PublicKey.of_pem(one.public.pem, "seal"))


def test_keys_of_the_ring_that_do_not_seal(tmp_path: Path) -> None:
    ring = ring_of(tmp_path)
    ring.make("stable-1", "channels/stable")
    ring.make("seal", "seal", sealing=True)
    with pytest.raises(SigningKeyError, match="needs an ECDSA key on P-256, P-384 or P-521, found ed25519/ed25519"):
        SealKey.of_ring(ring, "stable-1")
    with pytest.raises(SigningKeyError, match=r"there is no key other in .*, and no such file; make one with: fedpeft"):
        SealKey.of_ring(ring, "other")
    wrong = KeyRing(tmp_path, passphrase=lambda name, new: b"wrong")
    with pytest.raises(SigningKeyError, match="key seal does not open: the passphrase is wrong"):
        SealKey.of_ring(wrong, "seal")


def pem_file(path: Path, private: Any, secret: bytes = b"") -> Path:
    encryption = BestAvailableEncryption(secret) if secret else NoEncryption()
    path.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    return path


def test_a_pem_file_seals(tmp_path: Path) -> None:
    private = ec.generate_private_key(ec.SECP384R1())
    plain = SealKey.of_file(pem_file(tmp_path / "plain.pem", private), passphrase)
    secret = SealKey.of_file(pem_file(tmp_path / "mine.pem", private, b"passphrase of mine"), passphrase)
    assert plain.public == secret.public


def test_pem_files_that_do_not_seal(tmp_path: Path) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    for path, match in (
        (pem_file(tmp_path / "mine.pem", private, b"another"), r"mine\.pem does not open: the passphrase is wrong"),
        (pem_file(tmp_path / "ed.pem", ed25519.Ed25519PrivateKey.generate()), "found ed25519/ed25519"),
        (pem_file(tmp_path / "rsa.pem", rsa.generate_private_key(65537, 2048)), "found rsa/rsassa-pss-sha256"),
        (pem_file(tmp_path / "k1.pem", ec.generate_private_key(ec.SECP256K1())), "unsupported curve"),
        (tmp_path / "missing.pem", "cannot read the key"),
    ):
        with pytest.raises(ReleaseError, match=match):
            SealKey.of_file(path, passphrase)
    (tmp_path / "text.pem").write_text("no key")
    with pytest.raises(SigningKeyError, match="it is no private key"):
        SealKey.of_file(tmp_path / "text.pem", passphrase)


def test_public_keys_that_are_none() -> None:
    other = ed25519.Ed25519PrivateKey.generate().public_key()
    pem = other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for data, match in ((b"no key", r"seal\.pem is no public key"), (pem, "found ed25519/ed25519")):
        with pytest.raises(SigningKeyError, match=match):
            PublicKey.of_pem(data, "seal.pem")
