"""The deployment's own authority and the door's certificate, as Python's TLS sees them."""

from __future__ import annotations

import hashlib
import socket
import ssl
import stat
import subprocess
import threading
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from federated.deployment.certificates import (
    Authority,
    ca_fingerprint,
    make_ca,
    make_server_certificate,
    read_ca,
    valid_until,
)
from federated.errors import ConfigError, DeploymentError


def shaken(folder: Path, ca_pem: bytes, host: str) -> str:
    """The version that both sides agree on after a handshake in which the client trusts ``ca_pem`` alone."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.crt", folder / "server.key")
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    client.load_verify_locations(cadata=ca_pem.decode())
    here, there = socket.socketpair()

    def serve() -> None:
        try:
            with server.wrap_socket(there, server_side=True) as shaken:
                shaken.recv(1)
        except (ssl.SSLError, OSError):
            there.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(here, server_hostname=host) as done:
            return str(done.version())
    finally:
        here.close()
        thread.join()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_the_door_is_trusted_under_its_names(tls: Any, host: str) -> None:
    assert shaken(tls.folder, tls.ca.pem, host) == "TLSv1.3"


def test_the_door_is_not_trusted_under_another_name(tls: Any) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=r"(?i)hostname mismatch"):
        shaken(tls.folder, tls.ca.pem, "elsewhere.example")


def test_another_authority_of_the_same_name_is_not_trusted(tls: Any, tmp_path: Path, clock: Any) -> None:
    other = make_ca(tmp_path, name="federation of the tests", clock=clock)
    with pytest.raises(ssl.SSLCertVerificationError):
        shaken(tls.folder, other.pem, "localhost")


def test_the_doors_certificate_signs_no_others(tls: Any, tmp_path: Path, clock: Any) -> None:
    door = Authority(read_ca(tls.folder).certificate, read_ca(tls.folder).key)
    extensions = door.certificate.extensions
    assert [one.value.path_length for one in extensions if one.oid.dotted_string == "2.5.29.19"] == [0]
    text = subprocess.run(
        ["openssl", "x509", "-noout", "-text", "-in", tls.folder / "server.crt"], capture_output=True, text=True
    ).stdout
    assert "CA:FALSE" in text


def test_keys_are_their_owners_alone(tls: Any) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tls.folder.iterdir()}
    assert modes == {"ca.crt": 0o644, "ca.key": 0o600, "server.crt": 0o644, "server.key": 0o600}


def test_the_authority_is_read_back(tls: Any) -> None:
    again = read_ca(tls.folder)
    assert (again.pem, again.key.private_numbers()) == (tls.ca.pem, tls.ca.key.private_numbers())


def test_it_is_never_written_over(tmp_path: Path, clock: Any) -> None:
    first = make_ca(tmp_path, name="one", clock=clock)
    with pytest.raises(DeploymentError, match="there already"):
        make_ca(tmp_path, name="two", clock=clock)
    assert read_ca(tmp_path).pem == first.pem


def test_one_that_was_killed_half_way_is_finished(tmp_path: Path, clock: Any) -> None:
    first = make_ca(tmp_path, name="one", clock=clock)
    (tmp_path / "ca.crt").unlink()
    assert make_ca(tmp_path, name="one", clock=clock).key.private_numbers() == first.key.private_numbers()


def test_a_certificate_is_replaced_when_that_is_asked_for(tmp_path: Path, clock: Any) -> None:
    clock.move(days=-6)
    ca = make_ca(tmp_path, name="one", clock=clock)
    first = make_server_certificate(tmp_path, ca, hosts=["localhost"], clock=clock, days=10)
    key = (tmp_path / "server.key").read_bytes()
    with pytest.raises(DeploymentError, match="renewal"):
        make_server_certificate(tmp_path, ca, hosts=["localhost"], clock=clock)
    clock.move(days=5)
    second = make_server_certificate(tmp_path, ca, hosts=["localhost"], clock=clock, days=10, renew=True)
    assert second - first == timedelta(days=5)
    assert valid_until(tmp_path / "server.crt") == second.replace(microsecond=0)
    assert (tmp_path / "server.key").read_bytes() == key
    assert shaken(tmp_path, ca.pem, "localhost")


def test_no_certificate_outlives_its_authority(tmp_path: Path, clock: Any) -> None:
    ca = make_ca(tmp_path, name="one", clock=clock)
    end: datetime = ca.certificate.not_valid_after_utc
    assert make_server_certificate(tmp_path, ca, hosts=["localhost"], clock=clock, days=5000) == end
    clock.move(days=3651)
    with pytest.raises(DeploymentError, match=r"authority .* ended"):
        make_server_certificate(tmp_path, ca, hosts=["localhost"], clock=clock, renew=True)


@pytest.mark.parametrize(
    "host", ["", "*.example.org", "a b", "-a", "a..b", "exämple.org", "x" * 64, "https://a", "1.2.3", "a" * 10**6]
)
def test_a_host_that_is_none_is_refused(tls: Any, tmp_path: Path, clock: Any, host: str) -> None:
    with pytest.raises(ConfigError, match="neither an IP address nor a DNS name"):
        make_server_certificate(tmp_path, tls.ca, hosts=["localhost", host], clock=clock)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("hosts", "days"), [([], 1), (["localhost"], 0)])
def test_a_certificate_for_nothing_is_refused(
    tls: Any, tmp_path: Path, clock: Any, hosts: list[str], days: int
) -> None:
    with pytest.raises(ConfigError, match="at least one of each"):
        make_server_certificate(tmp_path, tls.ca, hosts=hosts, clock=clock, days=days)


def test_ipv6_and_names_go_together(tls: Any, tmp_path: Path, clock: Any) -> None:
    make_server_certificate(tmp_path, tls.ca, hosts=["::1", "door.example.org"], clock=clock)
    assert shaken(tmp_path, tls.ca.pem, "door.example.org")
    assert shaken(tmp_path, tls.ca.pem, "::1")


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 65])
def test_an_authority_needs_a_name(tmp_path: Path, clock: Any, name: str) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 64"):
        make_ca(tmp_path, name=name, clock=clock)


def test_the_fingerprint_is_that_of_openssl(tls: Any) -> None:
    told = subprocess.run(
        ["openssl", "x509", "-noout", "-fingerprint", "-sha256", "-in", tls.folder / "ca.crt"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    expected = told.partition("=")[2].strip().replace(":", "").lower()
    assert ca_fingerprint(tls.ca.pem) == ca_fingerprint(tls.ca.pem.decode()) == expected
    assert expected == hashlib.sha256(ssl.PEM_cert_to_DER_cert(tls.ca.pem.decode())).hexdigest()


def test_a_fingerprint_is_of_one_certificate(tls: Any) -> None:
    for pem in (b"", b"\xff\0", b"x" * 10**6, tls.ca.pem * 2, (tls.folder / "ca.key").read_bytes()):
        with pytest.raises(DeploymentError, match="expected one, in PEM"):
            ca_fingerprint(pem)


def test_a_key_that_others_can_read_is_not_used(tmp_path: Path, clock: Any) -> None:
    make_ca(tmp_path, name="one", clock=clock)
    (tmp_path / "ca.key").chmod(0o640)
    with pytest.raises(DeploymentError, match="read by others"):
        read_ca(tmp_path)


def test_damaged_files_are_named(tmp_path: Path, clock: Any) -> None:
    with pytest.raises(DeploymentError, match=r"ca\.crt: No such file"):
        read_ca(tmp_path)
    make_ca(tmp_path, name="one", clock=clock)
    good = (tmp_path / "ca.key").read_bytes()
    for damaged in (b"", good[:100], b"\0" * 10**5):
        (tmp_path / "ca.key").write_bytes(damaged)
        with pytest.raises(DeploymentError, match=r"ca\.key is no private key"):
            read_ca(tmp_path)
    (tmp_path / "ca.crt").write_bytes(b"nothing")
    with pytest.raises(DeploymentError, match=r"ca\.crt is no certificate"):
        read_ca(tmp_path)


def test_a_key_of_another_authority_is_noticed(tls: Any, tmp_path: Path, clock: Any) -> None:
    make_ca(tmp_path, name="one", clock=clock)
    (tmp_path / "ca.crt").write_bytes(tls.ca.pem)
    with pytest.raises(DeploymentError, match="not the key of"):
        read_ca(tmp_path)


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path: Path, clock: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DeploymentError, match="cannot make the folder"):
        make_ca(tmp_path / "file" / "tls", name="one", clock=clock)
