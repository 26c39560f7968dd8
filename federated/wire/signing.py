"""Signatures of updates: an enrolled device signs each with its own key, so that a name is more than a claim.

What is signed is a prefix of our own, so that the signature means nothing anywhere else, and the canonical JSON of all
other fields of the envelope. The payload's digest is among them, and so is everything that says where the update
belongs. Ed25519 (RFC 8032): a private key is a PEM file (PKCS 8) on the device, a public key the raw 32 bytes that the
server holds. It decides nothing about who is enrolled. Releases have keys of their own (`federated.release.keys`).
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey as SigningKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from federated.errors import ConfigError
from federated.manifest import Envelope, canonical_json
from federated.wire.reasons import refused

__all__ = [
    "KEY_BYTES",
    "SIGNED_PREFIX",
    "SigningKey",
    "check_signature",
    "read_signing_key",
    "sign_envelope",
    "signed_bytes",
]

SIGNED_PREFIX = b"federated-peft update 1\n"
"""What stands in front of the signed JSON; it changes when what is signed does."""

KEY_BYTES = 32
"""Length of a raw public key."""

_SIGNATURE = re.compile(r"[0-9a-f]{128}")
_LARGEST_FILE = 16_384  # bytes; a key has about 120


def signed_bytes(envelope: Envelope) -> bytes:
    """What a device signs: the prefix, and every field but the signature as canonical JSON.

    >>> SIGNED_PREFIX.decode().strip()
    'federated-peft update 1'
    """
    fields = envelope.to_dict()
    del fields["signature"]
    return SIGNED_PREFIX + canonical_json(fields)


def sign_envelope(envelope: Envelope, key: SigningKey) -> Envelope:
    """The same envelope with its signature, 128 lower-case hexadecimal characters. Equal fields sign equally."""
    return replace(envelope, signature=key.sign(signed_bytes(envelope)).hex())


def check_signature(envelope: Envelope, update_key: bytes, *, client_id: str) -> None:
    """Check that a device signed this envelope.

    Args:
        envelope: as it arrived, and as `federated.wire.read_envelope` read it: exactly what was sent.
        update_key: the client's public key, 32 bytes.
        client_id: who is to be named in a refusal.

    Raises:
        UpdateRejected: ``unsigned`` without a signature, ``bad_signature`` for any that this key did not make.
        ConfigError: if the public key is none.
    """
    key = _public_key(update_key)
    if envelope.signature is None:
        raise refused("unsigned", "the envelope has no signature", client_id)
    if not _SIGNATURE.fullmatch(envelope.signature):
        raise refused("bad_signature", "the signature is not 128 lower-case hexadecimal characters", client_id)
    try:
        key.verify(bytes.fromhex(envelope.signature), signed_bytes(envelope))
    except InvalidSignature:
        raise refused("bad_signature", "the signature does not fit envelope and key", client_id) from None


def _public_key(raw: bytes) -> Ed25519PublicKey:
    if len(raw) != KEY_BYTES:
        raise ConfigError(f"a client's public key has {len(raw)} bytes; expected the {KEY_BYTES} of Ed25519")
    return Ed25519PublicKey.from_public_bytes(raw)


def read_signing_key(path: Path) -> SigningKey:
    """Read a device's private key.

    Args:
        path: a PEM file (PKCS 8, Ed25519, not encrypted) that only its owner may read.

    Raises:
        ConfigError: if it cannot be read, others may read it, or it holds no such key.
    """
    try:
        with open(path, "rb", opener=_at_once) as file:
            mode, data = os.fstat(file.fileno()).st_mode & 0o777, file.read(_LARGEST_FILE)
    except OSError as error:
        raise ConfigError(f"signing_key {path}: {error.strerror}; expected the key that the device enrolled") from None
    if mode & 0o077:
        raise ConfigError(f"signing_key {path}: others may read it (mode {mode:04o}); expected 0600 or less: chmod 600")
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # no PEM, encrypted, a kind that OpenSSL lacks
        key = None
    if not isinstance(key, SigningKey):
        found = "no private key that opens without a password" if key is None else "a key of another kind"
        raise ConfigError(f"signing_key {path}: found {found}; expected Ed25519 as PEM (PKCS 8)")
    return key


def _at_once(path: str, flags: int) -> int:
    """Open without waiting for whoever writes to a pipe of that name."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
