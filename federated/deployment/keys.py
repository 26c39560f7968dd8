"""A device's two keys, which never leave it.

    node.key, node.key.pub   ECDSA on P-384: Flower authenticates the SuperNode with it (OpenSSH's formats, RFC 4253)
    update.key               Ed25519 (RFC 8032), PKCS#8 in PEM: signs the envelopes of the client's updates

Two, because Flower's key is used by Flower's processes and the other never is: what one signs cannot be shown as the
other's word. Neither has a passphrase; a device trains unattended. Called by `federated.deployment.enrolling`, which
sends the public halves, and by whoever starts the SuperNode.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from federated.deployment.secret_files import SECRET, pem_of, read_secret, write_if_missing
from federated.errors import DeploymentError

__all__ = [
    "NODE_KEY",
    "NODE_KEY_KIND",
    "UPDATE_KEY",
    "DeviceKeys",
    "fingerprint",
    "keys_of",
    "read_keys",
    "read_node_key",
]

NODE_KEY, UPDATE_KEY = "node.key", "update.key"
NODE_KEY_KIND = "ecdsa-sha2-nistp384"
_LONGEST_LINE = 400


@dataclass(frozen=True)
class DeviceKeys:
    """Both private keys.

    Args:
        node: P-384.
        update: Ed25519.
    """

    node: ec.EllipticCurvePrivateKey
    update: Ed25519PrivateKey

    @property
    def node_line(self) -> str:
        """The public half as OpenSSH writes it: kind and body, without a comment."""
        return _text(self.node.public_key())

    @property
    def update_raw(self) -> bytes:
        """The public half, 32 bytes."""
        return self.update.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def keys_of(folder: Path) -> DeviceKeys:
    """The keys in a folder; what is missing is made, what is there is never written over.

    Raises:
        DeploymentError: if one cannot be read, is of another kind or open to others, or cannot be written.
    """
    if not (folder / NODE_KEY).exists():
        private = ec.generate_private_key(ec.SECP384R1())
        written = private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        write_if_missing(folder / NODE_KEY, written, mode=SECRET)
    if not (folder / UPDATE_KEY).exists():
        write_if_missing(folder / UPDATE_KEY, pem_of(Ed25519PrivateKey.generate()), mode=SECRET)
    keys = read_keys(folder)
    write_if_missing(folder / f"{NODE_KEY}.pub", f"{keys.node_line}\n".encode())
    return keys


def read_keys(folder: Path) -> DeviceKeys:
    """The keys that `keys_of` made.

    Raises:
        DeploymentError: if one is missing, damaged, of another kind, or open to others than its owner.
    """
    node_file, update_file = folder / NODE_KEY, folder / UPDATE_KEY
    try:
        node = load_ssh_private_key(read_secret(node_file), None)
    except (ValueError, UnsupportedAlgorithm):
        node = None
    if not (isinstance(node, ec.EllipticCurvePrivateKey) and isinstance(node.curve, ec.SECP384R1)):
        raise DeploymentError(f"{node_file} is no P-384 key of OpenSSH without a passphrase; restore it")
    try:
        update = load_pem_private_key(read_secret(update_file), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        update = None
    if not isinstance(update, Ed25519PrivateKey):
        raise DeploymentError(f"{update_file} is no Ed25519 key in PEM without a passphrase; restore it")
    return DeviceKeys(node, update)


def read_node_key(line: str) -> ec.EllipticCurvePublicKey:
    """The public key of an OpenSSH line.

    Raises:
        DeploymentError: unless it is a P-384 key, written as `DeviceKeys.node_line` writes it: one key has one text.
    """
    key = _openssh(line) if len(line) <= _LONGEST_LINE and line.isascii() else None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1) or _text(key) != line:
        raise DeploymentError(f"found no public key; expected '{NODE_KEY_KIND} AAAA...' without a comment")
    return key


def _openssh(line: str) -> object:
    try:
        return load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm):
        return None


def _text(key: ec.EllipticCurvePublicKey) -> str:
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def fingerprint(key: str | bytes) -> str:
    """A public key for people: ``SHA256:`` and 43 characters, for a node's line what ``ssh-keygen -l`` says.

    Args:
        key: a node key's line, or the 32 bytes of an update key.
    """
    body = base64.b64decode(key.split()[1]) if isinstance(key, str) else key
    return "SHA256:" + base64.b64encode(hashlib.sha256(body).digest()).decode().rstrip("=")
