"""Private keys as encrypted PEM files: PKCS#8 under scrypt and AES-256 (RFC 8018, RFC 7914), which openssl reads too.

Written by hand because `cryptography` writes PKCS#8 with 2048 rounds of PBKDF2, which a stolen file does not withstand
for long. The cost, ``N=2**14, r=8, p=5``, is one that OWASP names; a larger N would go beyond openssl's limit of
32 MiB.
"""

from __future__ import annotations

import base64
import os
import textwrap

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.padding import PKCS7

__all__ = ["COST", "encrypted_pem"]

COST = 2**14
"""scrypt's N."""

_R, _P = 8, 5
_BLOCK = 16

# Object identifiers, as DER: PBES2, scrypt, AES-256-CBC.
_PBES2 = bytes.fromhex("06092a864886f70d01050d")
_SCRYPT = bytes.fromhex("06092b06010401da47040b")
_AES256_CBC = bytes.fromhex("060960864801650304012a")

_INTEGER, _OCTETS, _SEQUENCE = 0x02, 0x04, 0x30


def encrypted_pem(pkcs8: bytes, passphrase: bytes, *, cost: int | None = None) -> bytes:
    """A PEM file of an encrypted private key.

    Args:
        pkcs8: the key as DER.
        passphrase: not empty.
        cost: scrypt's N, a power of two; default `COST`, smaller only where a test must be quick.
    """
    cost = cost or COST
    salt, iv = os.urandom(_BLOCK), os.urandom(_BLOCK)
    derivation = _tlv(_SEQUENCE, _tlv(_OCTETS, salt), *map(_integer, (cost, _R, _P)))
    scheme = _tlv(_SEQUENCE, _tlv(_SEQUENCE, _SCRYPT, derivation), _tlv(_SEQUENCE, _AES256_CBC, _tlv(_OCTETS, iv)))
    sealed = _encrypt(pkcs8, Scrypt(salt=salt, length=32, n=cost, r=_R, p=_P).derive(passphrase), iv)
    info = _tlv(_SEQUENCE, _tlv(_SEQUENCE, _PBES2, scheme), _tlv(_OCTETS, sealed))
    lines = "\n".join(textwrap.wrap(base64.b64encode(info).decode(), 64))
    return f"-----BEGIN ENCRYPTED PRIVATE KEY-----\n{lines}\n-----END ENCRYPTED PRIVATE KEY-----\n".encode()


def _encrypt(plain: bytes, key: bytes, iv: bytes) -> bytes:
    padder = PKCS7(_BLOCK * 8).padder()
    encryptor = Cipher(AES(key), CBC(iv)).encryptor()
    return encryptor.update(padder.update(plain) + padder.finalize()) + encryptor.finalize()


def _tlv(tag: int, *parts: bytes) -> bytes:
    """Tag, length and value; a length over 127 says first in how many bytes it stands."""
    body = b"".join(parts)
    size = len(body)
    if size < 0x80:
        return bytes([tag, size]) + body
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + body


def _integer(number: int) -> bytes:
    return _tlv(_INTEGER, number.to_bytes(number.bit_length() // 8 + 1, "big"))
