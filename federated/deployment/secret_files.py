"""Private keys on the disk: of their owner alone, whole or not there, and never written over."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from federated.errors import DeploymentError
from federated.files import sync_folder, write_new

__all__ = ["PUBLIC", "SECRET", "own_folder", "pem_of", "read_secret", "write_if_missing", "write_once"]

SECRET = 0o600
PUBLIC = 0o644
_LARGEST = 65_536


def pem_of(thing: x509.Certificate | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    """A certificate, or a private key as PKCS#8 without a passphrase."""
    if isinstance(thing, x509.Certificate):
        return thing.public_bytes(Encoding.PEM)
    return thing.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def own_folder(folder: Path) -> None:
    """Make a folder that its owner alone can enter; one that is there stays as it is.

    Raises:
        DeploymentError: if it cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DeploymentError(f"cannot make the folder {folder}: {error.strerror}") from error


def write_once(path: Path, data: bytes, *, mode: int = PUBLIC) -> None:
    """Write a file that is not there yet; its folder is made.

    Raises:
        DeploymentError: if it is there, or cannot be written.
    """
    if not write_if_missing(path, data, mode=mode):
        raise DeploymentError(f"{path} is there already and is never written over; move it away first")


def write_if_missing(path: Path, data: bytes, *, mode: int = PUBLIC) -> bool:
    """As `write_once`; of several processes one writes, and the others leave what it wrote.

    Returns:
        Whether this call wrote it.

    Raises:
        DeploymentError: if it cannot be written.
    """
    own_folder(path.parent)
    try:
        write_new(path, data, mode=mode)
        sync_folder(path.parent)
    except FileExistsError:
        return False
    except OSError as error:
        raise DeploymentError(f"cannot write {path}: {error.strerror}") from error
    return True


def read_secret(path: Path) -> bytes:
    """A private key's file.

    Raises:
        DeploymentError: if it cannot be read, or others than its owner can.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(_LARGEST)
    except OSError as error:
        raise DeploymentError(f"cannot read {path}: {error.strerror}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise DeploymentError(
            f"{path} can be read by others (mode {stat.S_IMODE(mode):o}); chmod 600 it, if it is safe"
        )
    return data
