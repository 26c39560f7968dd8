"""in-toto statements in DSSE envelopes, signed by an ECDSA key: what a seal is made of.

    PAE(type, body) = "DSSEv1" SP LEN(type) SP type SP LEN(body) SP body        what is signed

Keys are on P-256, P-384 or P-521, which OpenSSF's ``model_signing`` takes; it knows no ed25519, so the keys that sign
releases do not seal. A key is one of a `KeyRing` (an encrypted file, hardware, a KMS) or a PEM file from anywhere.

Source: https://github.com/secure-systems-lab/dsse/blob/v1.0.2/protocol.md, in-toto Attestation Framework v1.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import CryptoSigner, Key, Signature, Signer, SSlibKey

from federated.errors import SigningKeyError, WrongContent, WrongSignature
from federated.manifest import canonical_json, sha256_hex
from federated.release.disk import translated
from federated.release.keys import KeyRing, Passphrase

__all__ = ["PAYLOAD_TYPE", "PublicKey", "SealKey", "opened"]

PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_SCHEMES = ("ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521")


@dataclass(frozen=True)
class PublicKey:
    """The public half of a key that seals.

    Args:
        key: ECDSA on one of the three curves.

    Raises:
        SigningKeyError: for any other kind of key.
    """

    key: Key

    def __post_init__(self) -> None:
        if self.key.scheme not in _SCHEMES:
            raise SigningKeyError(
                f"a seal needs an ECDSA key on P-256, P-384 or P-521, found {self.key.keytype}/{self.key.scheme}; make "
                "one with: fedpeft release keys make seal"
            )

    @classmethod
    def of_pem(cls, pem: bytes, name: str) -> PublicKey:
        """From a PEM file's bytes; ``name`` is for messages.

        Raises:
            SigningKeyError: if it is no public key, or one that does not seal.
        """
        try:
            return cls(SSlibKey.from_crypto(load_pem_public_key(pem)))
        except (ValueError, UnsupportedAlgorithm) as error:
            raise SigningKeyError(f"{name} is no public key in PEM that can be used: {error}") from error

    @property
    def pem(self) -> bytes:
        """The public half, to be given to those who check seals."""
        return str(self.key.to_dict()["keyval"]["public"]).encode()

    @property
    def hint(self) -> str:
        """What ``model_signing`` calls the key by: SHA-256 of its PEM."""
        return sha256_hex(self.pem)

    def verify(self, signature: bytes, payload: bytes) -> None:
        """Check a signature over a payload.

        Raises:
            WrongSignature: if this key did not make it.
        """
        try:
            self.key.verify_signature(Signature(self.key.keyid, signature.hex()), _pae(payload))
        except UnverifiedSignatureError as error:
            raise WrongSignature(
                f"the signature is not by key {self.hint[:12]}, or what is signed was changed"
            ) from error


@dataclass(frozen=True)
class SealKey:
    """A key that seals: signs statements.

    Args:
        signer: of one of the kinds that `PublicKey` takes.
    """

    signer: Signer

    def __post_init__(self) -> None:
        PublicKey(self.signer.public_key)  # refused before anything is written

    @property
    def public(self) -> PublicKey:
        """Its public half."""
        return PublicKey(self.signer.public_key)

    @classmethod
    def of_ring(cls, ring: KeyRing, name: str) -> SealKey:
        """The key of that name.

        Raises:
            SigningKeyError: if there is none, it does not open, or it does not seal.
        """
        key = ring.named(name)
        if key is None:
            raise SigningKeyError(
                f"there is no key {name} in {', '.join(map(str, ring.folders))}, and no such file; make one with: "
                f"fedpeft release keys make {name}"
            )
        PublicKey(key)
        (signer,) = ring.signers([key])
        return cls(signer)

    @classmethod
    def of_file(cls, path: Path, passphrase: Passphrase) -> SealKey:
        """The private key in a PEM file, which may be encrypted.

        Raises:
            SigningKeyError: if it does not open, or does not seal.
            ReleaseError: if the file cannot be read.
        """
        with translated("read the key"):
            pem = path.read_bytes()
        secret = passphrase(path.stem, False) if b"ENCRYPTED" in pem else None
        try:
            return cls(CryptoSigner(load_pem_private_key(pem, secret)))
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise SigningKeyError(
                f"{path} does not open: the passphrase is wrong, or it is no private key ({error})"
            ) from error

    def envelope(self, statement: Mapping[str, Any]) -> dict[str, Any]:
        """A signed statement, as plain data for JSON.

        Args:
            statement: ``subject``, ``predicateType`` and ``predicate``.
        """
        payload = canonical_json({"_type": _STATEMENT, **statement})
        signature = bytes.fromhex(self.signer.sign(_pae(payload)).signature)
        return {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"keyid": "", "sig": base64.b64encode(signature).decode()}],
        }


def opened(envelope: Any, key: PublicKey, predicate_type: str) -> dict[str, Any]:
    """The statement in an envelope, after its signature was checked.

    Args:
        envelope: plain data from anywhere.
        key: that must have signed it.
        predicate_type: of the statement that is expected.

    Raises:
        WrongSignature: if the key did not sign it.
        WrongContent: if it is no envelope, or holds another kind of statement.
    """
    try:
        payload = base64.b64decode(envelope["payload"], validate=True)
        (signature,) = envelope["signatures"]
        key.verify(base64.b64decode(signature["sig"], validate=True), payload)
        statement = json.loads(payload)
        found = (envelope["payloadType"], statement["_type"], statement["predicateType"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WrongContent(f"no DSSE envelope of one signed statement ({type(error).__name__}: {error})") from error
    if found != (PAYLOAD_TYPE, _STATEMENT, predicate_type):
        raise WrongContent(f"signed is {found}, expected {(PAYLOAD_TYPE, _STATEMENT, predicate_type)}")
    return dict(statement)


def _pae(payload: bytes) -> bytes:
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)
