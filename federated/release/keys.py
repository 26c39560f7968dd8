"""The publisher's private keys: a folder of key records, each with the URI at which its private half is.

    keys/root/root-1.key.json     {"keyid": ..., "name": "root-1", "public": {...}, "uri": "pem:root-1.pem"}
    keys/root/root-1.pem          encrypted, see `federated.release.pem`

``pem:`` is a file beside the record. Every other URI goes to `securesystemslib`: ``hsm:`` (PKCS#11), ``gcpkms:``,
``awskms:``, ``azurekms:``, ``hv:`` (Vault) and whatever a program registers there. A folder may be on a stick that is
mounted when it is needed: what is not there is not held, and whoever needs it says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, CryptoSigner, Key, Signer, SSlibKey

from federated.errors import SigningKeyError
from federated.manifest import canonical_json
from federated.release.disk import translated, write_file
from federated.release.pem import encrypted_pem

__all__ = ["KeyRecord", "KeyRing", "Passphrase", "label_of", "name_of"]

Passphrase = Callable[[str, bool], bytes]
"""Called with a key's name, and whether the key is new; returns the passphrase."""

_NAME = "x-fedpeft-name"
_SUFFIX = ".key.json"


def name_of(key: Key) -> str:
    """The name that a public key carries."""
    return str(key.unrecognized_fields.get(_NAME, "key"))


def label_of(key: Key) -> str:
    """A public key for people: its name and the beginning of its id."""
    return f"{name_of(key)} ({key.keyid[:8]})"


@dataclass(frozen=True)
class KeyRecord:
    """One key that this ring holds.

    Args:
        name: short name, also in the metadata.
        key: the public half.
        uri: where the private half is.
        folder: where the record is; ``pem:`` is relative to it.
    """

    name: str
    key: Key
    uri: str
    folder: Path

    def to_bytes(self) -> bytes:
        """The record's file."""
        return canonical_json(
            {"keyid": self.key.keyid, "name": self.name, "public": self.key.to_dict(), "uri": self.uri}
        )


class KeyRing:
    """The keys in some folders.

    Args:
        folders: looked through with all below them; new keys go into the first.
        passphrase: asked when a key is opened or made, once for each key.
        cost: scrypt's N for new keys; default: see `federated.release.pem`.

    Raises:
        SigningKeyError: if a record cannot be read.
        ReleaseError: if a folder cannot be read.
    """

    def __init__(self, *folders: Path, passphrase: Passphrase, cost: int | None = None) -> None:
        self.folders = folders
        self._passphrase = passphrase
        self._cost = cost
        self._signers: dict[str, Signer] = {}
        with translated("read the keys"):
            files = [path for folder in folders for path in sorted(folder.rglob(f"*{_SUFFIX}"))]
            records = [_record(path, path.read_bytes()) for path in files]
        self._records = {record.key.keyid: record for record in records}

    @property
    def home(self) -> Path:
        """The first folder: new keys go there, and what the publisher remembers."""
        return self.folders[0]

    def holds(self, keyid: str) -> bool:
        """Whether there is a record of this key; whether its private half opens, only signing shows."""
        return keyid in self._records

    def named(self, name: str) -> Key | None:
        """The public half of the key of that name."""
        return next((record.key for record in self._records.values() if record.name == name), None)

    def make(self, name: str, group: str, *, sealing: bool = False) -> Key:
        """Make a key and write it, encrypted.

        Args:
            name: new in this ring.
            group: subfolder, so that keys that belong together can be carried away together.
            sealing: ECDSA on P-256, for `federated.release.dsse`, in place of ed25519.

        Raises:
            SigningKeyError: if the name is taken, or the passphrase is empty.
            ReleaseError: if the folder cannot be written.
        """
        self._require_new(name)
        passphrase = self._passphrase(name, True)
        if not passphrase:
            raise SigningKeyError(f"key {name}: an empty passphrase protects nothing; give one")
        private = generate_private_key(SECP256R1()) if sealing else Ed25519PrivateKey.generate()
        key = SSlibKey.from_crypto(private.public_key())
        record = self._named_record(name, key, f"pem:{name}.pem", group)
        der = private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        with translated(f"write key {name}"):
            write_file(record.folder / f"{name}.pem", encrypted_pem(der, passphrase, cost=self._cost), mode=0o600)
        self._keep(record)
        self._signers[key.keyid] = CryptoSigner(private, key)
        return key

    def add(self, name: str, group: str, *, uri: str, public_pem: bytes) -> Key:
        """Take in a key whose private half is elsewhere.

        Args:
            name: new in this ring.
            group: as in `make`.
            uri: one that `securesystemslib` has a signer for, such as ``hsm:2?label=token``.
            public_pem: the public half: ed25519, ECDSA, RSA or ML-DSA.

        Raises:
            SigningKeyError: if the name is taken, nobody knows the URI's scheme, or the public half is none.
            ReleaseError: if the folder cannot be written.
        """
        self._require_new(name)
        scheme = uri.partition(":")[0]
        if scheme not in SIGNER_FOR_URI_SCHEME:
            known = ", ".join(f"{one}:" for one in sorted(SIGNER_FOR_URI_SCHEME))
            raise SigningKeyError(f"key {name}: no signer for the URI {uri!r}; known are {known} (hsm: is PKCS#11)")
        try:
            key = SSlibKey.from_crypto(load_pem_public_key(public_pem))
        except (ValueError, UnsupportedAlgorithm) as error:
            raise SigningKeyError(f"key {name}: no public key that can be used, in PEM: {error}") from error
        self._keep(self._named_record(name, key, uri, group))
        return key

    def signers(self, keys: Iterable[Key]) -> list[Signer]:
        """Signers of those keys that this ring holds.

        Raises:
            SigningKeyError: if one that it holds does not open.
        """
        return [self._signer(self._records[key.keyid]) for key in keys if self.holds(key.keyid)]

    def _signer(self, record: KeyRecord) -> Signer:
        keyid = record.key.keyid
        if keyid not in self._signers:
            opens = self._open_file if record.uri.startswith("pem:") else self._open_elsewhere
            self._signers[keyid] = opens(record)
        return self._signers[keyid]

    def _open_file(self, record: KeyRecord) -> Signer:
        path = record.folder / record.uri.removeprefix("pem:")
        with translated(f"read key {record.name}"):
            pem = path.read_bytes()
        passphrase = self._passphrase(record.name, False)
        try:
            private: Any = load_pem_private_key(pem, passphrase)
            return CryptoSigner(private, cast("SSlibKey", record.key))  # it refuses a key of another kind itself
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise SigningKeyError(
                f"key {record.name} does not open: the passphrase is wrong, or {path} is not its file ({error})"
            ) from error

    def _open_elsewhere(self, record: KeyRecord) -> Signer:
        def secret(what: str) -> str:
            return self._passphrase(f"{record.name} {what}", False).decode()

        try:
            return Signer.from_priv_key_uri(record.uri, record.key, secret)
        except Exception as error:
            raise SigningKeyError(f"key {record.name}: {record.uri} gives no signer: {_said(error)}") from error

    def _require_new(self, name: str) -> None:
        if self.named(name) is not None:
            raise SigningKeyError(f"there is a key {name} already; keys are never written over: choose another name")

    def _named_record(self, name: str, key: Key, uri: str, group: str) -> KeyRecord:
        key.unrecognized_fields[_NAME] = name
        return KeyRecord(name, key, uri, self.home / group)

    def _keep(self, record: KeyRecord) -> None:
        with translated(f"write key {record.name}"):
            write_file(record.folder / f"{record.name}{_SUFFIX}", record.to_bytes())
        self._records[record.key.keyid] = record


def _record(path: Path, data: bytes) -> KeyRecord:
    try:
        parts = json.loads(data)
        key = Key.from_dict(str(parts["keyid"]), dict(parts["public"]))
        return KeyRecord(str(parts["name"]), key, str(parts["uri"]), path.parent)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SigningKeyError(f"{path} is no record of a key ({_said(error)}); restore it, or take it away") from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
