"""Keys: encrypted files that other programs read, records, signers elsewhere, and what goes wrong with them."""

import json
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, CryptoSigner, Key, Signer, SSlibKey

from federated.errors import ReleaseError, SigningKeyError
from federated.release import KeyRing, pem
from federated.release.keys import label_of, name_of

PAYLOAD = b"what is signed"


def passphrase(name: str, new: bool) -> bytes:
    return b"correct"


def wrong(name: str, new: bool) -> bytes:
    return b"wrong"


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    return KeyRing(tmp_path, passphrase=passphrase, cost=2)


def der_of(private) -> bytes:
    return private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 100, 200, 70_000])
def test_pem_holds_bytes_of_any_length(size: int) -> None:
    """Through the decoder of another library; lengths around DER's and the cipher's boundaries."""
    private = Ed25519PrivateKey.generate()
    text = pem.encrypted_pem(der_of(private), b"x" * (size or 1), cost=2)
    assert load_pem_private_key(text, b"x" * (size or 1)).private_bytes_raw() == private.private_bytes_raw()


def test_long_keys_survive() -> None:
    """An RSA key needs DER's long lengths; a short one does, and is quick to make."""
    der = der_of(generate_private_key(65537, 1024))  # noqa: S505 - signs nothing
    assert len(der) > 0xFF
    assert der_of(load_pem_private_key(pem.encrypted_pem(der, b"correct", cost=2), b"correct")) == der


def test_two_files_of_one_key_differ() -> None:
    """Salt and initialisation vector are fresh."""
    der = der_of(Ed25519PrivateKey.generate())
    assert pem.encrypted_pem(der, b"correct", cost=2) != pem.encrypted_pem(der, b"correct", cost=2)


@pytest.mark.interop
def test_openssl_reads_a_key_at_full_cost(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    private = Ed25519PrivateKey.generate()
    (tmp_path / "key.pem").write_bytes(pem.encrypted_pem(der_of(private), b"correct"))
    command = ["openssl", "pkey", "-in", "key.pem", "-passin", "pass:correct", "-pubout", "-outform", "DER"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout == private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def test_a_made_key_signs_also_from_its_file(ring: KeyRing, tmp_path: Path) -> None:
    key = ring.make("stable-1", "channels/stable")
    for one in (ring, KeyRing(tmp_path, passphrase=passphrase)):
        (signer,) = one.signers([key])
        key.verify_signature(signer.sign(PAYLOAD), PAYLOAD)
    assert (name_of(key), label_of(key)) == ("stable-1", f"stable-1 ({key.keyid[:8]})")
    assert ring.named("stable-1") == key
    assert ring.holds(key.keyid)


def test_files_of_a_key(ring: KeyRing, tmp_path: Path) -> None:
    ring.make("root-1", "root")
    private, record = tmp_path / "root" / "root-1.pem", tmp_path / "root" / "root-1.key.json"
    assert private.read_text().startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert json.loads(record.read_text()).keys() == {"keyid", "name", "public", "uri"}
    assert sorted(path.name for path in (tmp_path / "root").iterdir()) == ["root-1.key.json", "root-1.pem"]


def test_a_passphrase_is_asked_for_once(ring: KeyRing, tmp_path: Path) -> None:
    asked = []
    key = ring.make("root-1", "root")
    again = KeyRing(tmp_path, passphrase=lambda name, new: asked.append((name, new)) or b"correct")
    again.signers([key])
    again.signers([key])
    assert asked == [("root-1", False)]


def test_keys_of_several_folders(tmp_path: Path) -> None:
    first = KeyRing(tmp_path / "a", passphrase=passphrase, cost=2).make("root-1", "root")
    second = KeyRing(tmp_path / "b", passphrase=passphrase, cost=2).make("root-2", "root")
    both = KeyRing(tmp_path / "a", tmp_path / "b", tmp_path / "not there", passphrase=passphrase)
    assert len(both.signers([first, second])) == 2
    assert both.home == tmp_path / "a"


def test_a_key_that_is_not_here_gives_no_signer(ring: KeyRing) -> None:
    other = CryptoSigner.generate_ed25519().public_key
    assert ring.signers([other]) == []
    assert not ring.holds(other.keyid)
    assert ring.named("nobody") is None
    assert name_of(other) == "key"


def test_wrong_passphrase(ring: KeyRing, tmp_path: Path) -> None:
    key = ring.make("root-1", "root")
    with pytest.raises(SigningKeyError, match="key root-1 does not open: the passphrase is wrong, or"):
        KeyRing(tmp_path, passphrase=wrong).signers([key])


def test_private_half_of_another_key(ring: KeyRing, tmp_path: Path) -> None:
    key = ring.make("root-1", "root")
    ring.make("root-2", "root")
    (tmp_path / "root" / "root-2.pem").replace(tmp_path / "root" / "root-1.pem")
    with pytest.raises(SigningKeyError, match=r"is not its file \(CryptoSigner private key does not match"):
        KeyRing(tmp_path, passphrase=passphrase).signers([key])


def test_private_half_that_is_gone(ring: KeyRing, tmp_path: Path) -> None:
    key = ring.make("root-1", "root")
    (tmp_path / "root" / "root-1.pem").unlink()
    with pytest.raises(ReleaseError, match=r"cannot read key root-1: No such file or directory \(.*root-1\.pem\)"):
        KeyRing(tmp_path, passphrase=passphrase).signers([key])


@pytest.mark.parametrize("data", [b"no pem", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_private_half_that_is_damaged(ring: KeyRing, tmp_path: Path, data: bytes) -> None:
    key = ring.make("root-1", "root")
    (tmp_path / "root" / "root-1.pem").write_bytes(data)
    with pytest.raises(SigningKeyError, match="key root-1 does not open"):
        KeyRing(tmp_path, passphrase=passphrase).signers([key])


def test_empty_passphrase_makes_no_key(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path, passphrase=lambda name, new: b"")
    with pytest.raises(SigningKeyError, match="key root-1: an empty passphrase protects nothing"):
        ring.make("root-1", "root")
    assert list(tmp_path.iterdir()) == []


def test_a_key_is_never_written_over(ring: KeyRing, tmp_path: Path) -> None:
    ring.make("root-1", "root")
    before = (tmp_path / "root" / "root-1.pem").read_bytes()
    with pytest.raises(SigningKeyError, match="there is a key root-1 already"):
        ring.make("root-1", "elsewhere")
    with pytest.raises(SigningKeyError, match="there is a key root-1 already"):
        ring.add("root-1", "root", uri="hsm:2", public_pem=b"")
    assert (tmp_path / "root" / "root-1.pem").read_bytes() == before


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ReleaseError, match="cannot write key root-1: Not a directory"):
        KeyRing(tmp_path / "file", passphrase=passphrase, cost=2).make("root-1", "root")


def test_full_disk_leaves_no_half_key(ring: KeyRing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device", "disk")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ReleaseError, match="cannot write key root-1: No space left on device"):
        ring.make("root-1", "root")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"keyid":"a","name":"b","uri":"pem:c","public":{"keytype":"secret"}}',
        '{"public":5,"keyid":"a"}',
    ],
)
def test_record_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "root-1.key.json").write_text(text)
    with pytest.raises(SigningKeyError, match=r"root-1\.key\.json is no record of a key"):
        KeyRing(tmp_path, passphrase=passphrase)


class InMemory(Signer):
    """Stands for a key in hardware: `securesystemslib` has it by a scheme."""

    private = CryptoSigner.generate_ecdsa()
    fails = False

    def __init__(self, key: Key) -> None:
        self._key = key

    @property
    def public_key(self) -> Key:
        return self._key

    @classmethod
    def from_priv_key_uri(cls, uri: str, key: Key, secrets_handler=None) -> Signer:
        if secrets_handler("pin") != "correct":
            raise LookupError("no token answers")
        return cls(key)

    def sign(self, payload: bytes):
        if self.fails:
            raise OSError("the token was pulled out")
        signature = self.private.sign(payload)
        signature.keyid = self._key.keyid
        return signature


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Public half of a key that is not in a file."""
    monkeypatch.setitem(SIGNER_FOR_URI_SCHEME, "memory", InMemory)
    key = InMemory.private.public_key
    assert isinstance(key, SSlibKey)
    return key.keyval["public"].encode()


def test_signer_by_uri(ring: KeyRing, tmp_path: Path, elsewhere: bytes) -> None:
    key = ring.add("root-1", "root", uri="memory:slot-2", public_pem=elsewhere)
    asked = []
    again = KeyRing(tmp_path, passphrase=lambda name, new: asked.append((name, new)) or b"correct")
    (signer,) = again.signers([key])
    key.verify_signature(signer.sign(PAYLOAD), PAYLOAD)
    assert asked == [("root-1 pin", False)]
    assert name_of(key) == "root-1"


def test_signer_by_uri_that_does_not_answer(ring: KeyRing, tmp_path: Path, elsewhere: bytes) -> None:
    key = ring.add("root-1", "root", uri="memory:slot-2", public_pem=elsewhere)
    with pytest.raises(SigningKeyError, match="root-1: memory:slot-2 gives no signer: LookupError: no token answers"):
        KeyRing(tmp_path, passphrase=wrong).signers([key])


def test_signer_whose_library_is_not_installed(ring: KeyRing, elsewhere: bytes) -> None:
    key = ring.add("root-1", "root", uri="hsm:2?label=token", public_pem=elsewhere)
    with pytest.raises(SigningKeyError, match=r"hsm:2.label=token gives no signer: UnsupportedLibraryError"):
        ring.signers([key])


def test_uri_that_nobody_knows(ring: KeyRing, elsewhere: bytes) -> None:
    with pytest.raises(
        SigningKeyError, match=r"no signer for the URI 'pkcs11:x'; known are .*hsm:.*\(hsm: is PKCS#11\)"
    ):
        ring.add("root-1", "root", uri="pkcs11:x", public_pem=elsewhere)


def test_public_half_that_is_none(ring: KeyRing) -> None:
    with pytest.raises(SigningKeyError, match="key root-1: no public key that can be used, in PEM"):
        ring.add("root-1", "root", uri="hsm:2", public_pem=b"nothing")
