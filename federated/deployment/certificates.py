"""A certificate authority of the deployment's own, and the certificate of its door. No public authority is involved.

    tls/ca.crt       goes to every device; its fingerprint is in every invitation
    tls/ca.key       signs the door's certificate; nobody else needs it, and it may be kept elsewhere in between
    tls/server.crt   the door's, for the names and addresses that devices reach it by
    tls/server.key   the door's

Keys are ECDSA on P-256 (FIPS 186-5), files of their owner alone, without a passphrase: processes that are started again
by themselves read them. Called by `federated.cli` and by whoever starts a deployment.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from federated.deployment.secret_files import SECRET, pem_of, read_secret, write_if_missing, write_once
from federated.errors import ConfigError, DeploymentError
from federated.files import write_whole

__all__ = [
    "CA_CERTIFICATE",
    "CA_KEY",
    "SERVER_CERTIFICATE",
    "SERVER_KEY",
    "Authority",
    "ca_fingerprint",
    "make_ca",
    "make_server_certificate",
    "read_ca",
    "valid_until",
]

CA_CERTIFICATE, CA_KEY = "ca.crt", "ca.key"
SERVER_CERTIFICATE, SERVER_KEY = "server.crt", "server.key"

Clock = Callable[[], datetime]

_CA_DAYS = 3650
_BACKDATED = timedelta(hours=1)  # devices whose clocks are a little behind
_LONGEST_NAME = 64
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True)
class Authority:
    """The deployment's certificate authority, with its key.

    Args:
        certificate: its own.
        key: signs the door's.
    """

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        """Its certificate, as devices get it."""
        return pem_of(self.certificate)


def make_ca(folder: Path, *, name: str, clock: Clock) -> Authority:
    """Make a certificate authority that is good for ten years.

    Args:
        folder: made if it is not there; gets ``ca.crt`` and ``ca.key``.
        name: shown where somebody looks at a certificate, at most 64 characters.
        clock: now, with a time zone.

    Raises:
        ConfigError: for an empty, unprintable or long name.
        DeploymentError: if there is one already, or the folder cannot be written.
    """
    if not (0 < len(name) <= _LONGEST_NAME and name.isprintable()):
        raise ConfigError(f"the authority's name has {len(name)} characters; expected 1 to 64 that can be printed")
    if (folder / CA_CERTIFICATE).exists():
        raise DeploymentError(f"{folder / CA_CERTIFICATE} is there already; every device trusts it: keep it")
    key, now = _kept_key(folder / CA_KEY), clock()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    unsigned = (
        _unsigned(subject, subject, key.public_key())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=_CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
    )
    made = Authority(unsigned.sign(key, SHA256()), key)
    write_once(folder / CA_CERTIFICATE, made.pem)
    return made


def read_ca(folder: Path) -> Authority:
    """The authority that `make_ca` wrote.

    Raises:
        DeploymentError: if one of its files is missing, damaged or open to others, or they do not belong together.
    """
    certificate = _certificate(folder / CA_CERTIFICATE)
    key = _key(folder / CA_KEY)
    if certificate.public_key() != key.public_key():
        raise DeploymentError(f"{folder}: {CA_KEY} is not the key of {CA_CERTIFICATE}; restore both from one backup")
    return Authority(certificate, key)


def make_server_certificate(
    folder: Path, ca: Authority, *, hosts: Sequence[str], clock: Clock, days: int = 365, renew: bool = False
) -> datetime:
    """Make the door's certificate.

    A renewed one keeps the key: one file is replaced, as a whole, so a door that starts meanwhile finds a pair.

    Args:
        folder: gets ``server.crt`` and ``server.key``.
        ca: signs it.
        hosts: DNS names and IP addresses under which devices reach the door.
        clock: now, with a time zone.
        days: that it is good for, at most as long as the authority.
        renew: whether to take the place of one that is there.

    Returns:
        When it ends.

    Raises:
        ConfigError: for no hosts or one that is neither name nor address, or no days.
        DeploymentError: if one is there that was not to be renewed, or a file cannot be read or written.
    """
    names = [_general_name(host) for host in hosts]
    if not names or days < 1:
        raise ConfigError(f"a certificate for {len(names)} hosts and {days} days; expected at least one of each")
    target = folder / SERVER_CERTIFICATE
    if target.exists() and not renew:
        raise DeploymentError(f"{target} is there already; ask for its renewal to replace it")
    key = _kept_key(folder / SERVER_KEY)
    now, last = clock(), ca.certificate.not_valid_after_utc
    end = min(now + timedelta(days=days), last)
    if now >= last:
        raise DeploymentError(f"the authority of {folder} ended at {last:%F}: make a new one, and enrol devices anew")
    made = _door_certificate(ca, key, names).not_valid_before(now - _BACKDATED).not_valid_after(end)
    try:
        write_whole(target, pem_of(made.sign(ca.key, SHA256())), mode=0o644)
    except OSError as error:
        raise DeploymentError(f"cannot write {target}: {error.strerror}") from error
    return end


def ca_fingerprint(pem: bytes | str) -> str:
    """SHA-256 of the certificate's DER, 64 lower-case hexadecimal digits: what an invitation names.

    Raises:
        DeploymentError: if this is not one certificate in PEM.
    """
    text = pem if isinstance(pem, str) else pem.decode("latin-1")
    try:
        if text.count("-----BEGIN ") != 1:
            raise ValueError("more or less than one block")
        der = ssl.PEM_cert_to_DER_cert(text.strip())
        x509.load_der_x509_certificate(der)
    except (ValueError, UnsupportedAlgorithm):
        raise DeploymentError("found no certificate; expected one, in PEM") from None
    return hashlib.sha256(der).hexdigest()


def valid_until(path: Path) -> datetime:
    """When a certificate ends.

    Raises:
        DeploymentError: if it cannot be read.
    """
    return _certificate(path).not_valid_after_utc


def _unsigned(subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _door_certificate(
    ca: Authority, key: ec.EllipticCurvePrivateKey, names: Sequence[x509.GeneralName]
) -> x509.CertificateBuilder:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "federated-peft door")])
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key())
    return (
        _unsigned(subject, ca.certificate.subject, key.public_key())
        .add_extension(issuer_key, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        labels = host.split(".")
        if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels) or labels[-1].isdigit():
            shown = ascii(host[:80])
            raise ConfigError(f"{shown} is neither an IP address nor a DNS name, in ASCII and without *") from None
        return x509.DNSName(host)


def _kept_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The key of a file; made where there is none."""
    if not path.exists():
        write_if_missing(path, pem_of(ec.generate_private_key(ec.SECP256R1())), mode=SECRET)
    return _key(path)


def _key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(read_secret(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise DeploymentError(f"{path} is no private key in PEM without a passphrase; restore it") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise DeploymentError(f"{path} holds no elliptic-curve key; restore it")
    return key


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise DeploymentError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise DeploymentError(f"{path} is no certificate in PEM; restore it") from None
