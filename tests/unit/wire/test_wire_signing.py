"""Signatures of updates: what is signed, what is refused, and which key files are read."""

import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)

from federated.errors import ConfigError, UpdateRejected
from federated.manifest import Envelope, RawTensor, TensorEntry, TensorLayout
from federated.wire import Expectation, admit, decode_packet, read_envelope, read_signing_key
from federated.wire.signing import check_signature, sign_envelope, signed_bytes

Seal = Callable[..., bytes]
KEY = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw()
OTHER = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))


@pytest.fixture
def signing(expected: Expectation) -> Expectation:
    return replace(expected, update_key=PUBLIC)


def envelope_of(packet: bytes) -> Envelope:
    return read_envelope(decode_packet(packet)[0], client_id="clinic")


def reason(packet: bytes, expected: Expectation, layout: TensorLayout) -> str:
    with pytest.raises(UpdateRejected) as caught:
        admit(packet, expected, layout=layout)
    return caught.value.reason


def key_file(path: Path, key: Any, mode: int = 0o600, encryption: KeySerializationEncryption | None = None) -> Path:
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption()))
    path.chmod(mode)
    return path


class TestSignatures:
    def test_a_signed_update_is_admitted(self, seal: Seal, signing: Expectation, layout: TensorLayout):
        assert admit(seal(signing_key=KEY), signing, layout=layout).envelope.client_id == "clinic"

    def test_what_is_signed_is_the_prefix_and_all_other_fields(self, seal: Seal):
        envelope = envelope_of(seal(signing_key=KEY))
        text = signed_bytes(envelope)
        assert text.startswith(b'federated-peft update 1\n{"base_digest":"bbbb')
        assert text == signed_bytes(replace(envelope, signature=None))
        KEY.public_key().verify(bytes.fromhex(envelope.signature or ""), text)

    def test_equal_updates_sign_equally(self, seal: Seal):
        assert seal(signing_key=KEY) == seal(signing_key=KEY)

    def test_without_a_key_nothing_is_signed(self, seal: Seal):
        assert envelope_of(seal()).signature is None

    def test_where_no_signature_is_asked_for_any_is_carried(
        self, seal: Seal, expected: Expectation, layout: TensorLayout
    ):
        assert admit(seal(signing_key=OTHER), expected, layout=layout).envelope.signature is not None

    def test_an_unsigned_update_is_refused(self, seal: Seal, signing: Expectation, layout: TensorLayout):
        assert reason(seal(), signing, layout) == "unsigned"

    def test_another_devices_signature_is_refused(self, seal: Seal, signing: Expectation, layout: TensorLayout):
        assert reason(seal(signing_key=OTHER), signing, layout) == "bad_signature"

    @pytest.mark.parametrize("change", ["", "00", "0" * 128, "g" * 128, "upper", "longer", "\n"])
    def test_a_signature_that_is_none_is_refused(self, seal: Seal, signing: Expectation, change: str):
        envelope = envelope_of(seal(signing_key=KEY))
        good = envelope.signature or ""
        changed = {"upper": good.upper(), "longer": f"{good}00", "\n": f"{good}\n"}.get(change, change)
        with pytest.raises(UpdateRejected) as caught:
            check_signature(replace(envelope, signature=changed), PUBLIC, client_id="clinic")
        assert caught.value.reason == "bad_signature"

    @pytest.mark.parametrize("name", [one.name for one in fields(Envelope) if one.name != "signature"])
    def test_every_field_is_covered(self, seal: Seal, name: str):
        envelope = envelope_of(seal(signing_key=KEY))
        check_signature(envelope, PUBLIC, client_id="clinic")
        found = getattr(envelope, name)
        other = {
            "spec": replace(envelope.spec, alpha=400.0),
            "layout": (TensorEntry("more", (1,), "F32"), *envelope.layout),
        }.get(name, found + 1 if isinstance(found, int) else f"{found}x")
        with pytest.raises(UpdateRejected) as caught:
            check_signature(replace(envelope, **{name: other}), PUBLIC, client_id="clinic")
        assert caught.value.reason == "bad_signature"

    def test_the_payload_is_covered_by_its_digest(
        self, seal: Seal, signing: Expectation, layout: TensorLayout, tensors: dict[str, RawTensor]
    ):
        changed = {**tensors, "head.bias": RawTensor("BF16", (2,), bytes(4))}
        signed, other = seal(signing_key=KEY), seal(changed, signing_key=KEY)
        size = sum(len(one.data) for one in tensors.values())
        assert reason(signed[:-size] + other[-size:], signing, layout) == "payload_digest_mismatch"

    def test_a_signature_means_nothing_without_our_prefix(self, seal: Seal):
        envelope = envelope_of(seal())
        bare = KEY.sign(signed_bytes(envelope).partition(b"\n")[2]).hex()
        with pytest.raises(UpdateRejected):
            check_signature(replace(envelope, signature=bare), PUBLIC, client_id="clinic")

    def test_a_signed_envelope_is_the_same_envelope(self, seal: Seal):
        envelope = envelope_of(seal())
        assert replace(sign_envelope(envelope, KEY), signature=None) == envelope

    @pytest.mark.parametrize("size", [0, 31, 33, 44])
    def test_a_public_key_of_another_length_is_a_mistake_of_the_server(self, seal: Seal, size: int):
        with pytest.raises(ConfigError, match=rf"has {size} bytes; expected the 32"):
            check_signature(envelope_of(seal()), bytes(size), client_id="clinic")


class TestOrder:
    """The cheap checks decide first, and no byte of the payload is interpreted before the signature."""

    def test_the_place_is_named_before_the_signature(self, seal: Seal, signing: Expectation, layout: TensorLayout):
        assert reason(seal(round_number=1, signing_key=OTHER), signing, layout) == "wrong_round"

    def test_the_signature_is_named_before_the_payload(self, seal: Seal, signing: Expectation, layout: TensorLayout):
        assert reason(seal(signing_key=OTHER)[:-1], signing, layout) == "bad_signature"

    def test_the_digest_is_named_before_the_payload_is_read(
        self, seal: Seal, signing: Expectation, layout: TensorLayout
    ):
        assert reason(seal(signing_key=KEY)[:-1], signing, layout) == "payload_digest_mismatch"

    def test_no_tensor_is_decoded_of_what_nobody_signed(
        self, seal: Seal, signing: Expectation, layout: TensorLayout, monkeypatch: pytest.MonkeyPatch
    ):
        def never(*_: object) -> None:
            raise AssertionError("decoded")

        monkeypatch.setattr("federated.wire.admission.decode_tensors", never)
        assert reason(seal(signing_key=OTHER), signing, layout) == "bad_signature"
        with pytest.raises(AssertionError, match="decoded"):
            admit(seal(signing_key=KEY), signing, layout=layout)


class TestKeyFiles:
    def test_a_key_is_read(self, tmp_path: Path):
        read = read_signing_key(key_file(tmp_path / "update.pem", KEY))
        assert read.private_bytes_raw() == KEY.private_bytes_raw()

    @pytest.mark.parametrize("mode", [0o400, 0o600, 0o700])
    def test_what_the_owner_may_do_does_not_matter(self, tmp_path: Path, mode: int):
        assert read_signing_key(key_file(tmp_path / "update.pem", KEY, mode))

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o601, 0o666])
    def test_a_key_that_others_reach_is_refused(self, tmp_path: Path, mode: int):
        path = key_file(tmp_path / "update.pem", KEY, mode)
        with pytest.raises(ConfigError, match=rf"signing_key .*others may read it \(mode 0{mode:o}\).*chmod 600"):
            read_signing_key(path)

    @pytest.mark.parametrize(
        "key", [ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)], ids=["EC", "RSA"]
    )
    def test_a_key_of_another_kind_is_refused(self, tmp_path: Path, key: Any):
        with pytest.raises(ConfigError, match="a key of another kind; expected Ed25519"):
            read_signing_key(key_file(tmp_path / "update.pem", key))

    @pytest.mark.parametrize("data", [b"", b"ssh-ed25519 AAAA", os.urandom(200), b"-----BEGIN PRIVATE KEY-----\nAA\n"])
    def test_what_is_no_key_is_refused(self, tmp_path: Path, data: bytes):
        path = tmp_path / "update.pem"
        path.write_bytes(data)
        path.chmod(0o600)
        with pytest.raises(ConfigError, match="no private key that opens without a password"):
            read_signing_key(path)

    def test_an_encrypted_key_is_refused(self, tmp_path: Path):
        path = key_file(tmp_path / "update.pem", KEY, encryption=BestAvailableEncryption(b"secret"))
        with pytest.raises(ConfigError, match="opens without a password"):
            read_signing_key(path)

    def test_a_missing_key_is_named(self, tmp_path: Path):
        with pytest.raises(ConfigError, match=r"update\.pem: No such file or directory; expected the key that"):
            read_signing_key(tmp_path / "update.pem")

    def test_a_folder_is_no_key(self, tmp_path: Path):
        with pytest.raises(ConfigError, match="Is a directory"):
            read_signing_key(tmp_path)

    def test_a_pipe_does_not_hold_the_client_up(self, tmp_path: Path):
        os.mkfifo(tmp_path / "update.pem", 0o600)
        with pytest.raises(ConfigError, match="no private key"):
            read_signing_key(tmp_path / "update.pem")
