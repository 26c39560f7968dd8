"""A device's two keys, as Flower and OpenSSH read them."""

from __future__ import annotations

import argparse
import base64
import importlib
import shutil
import stat
import subprocess
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from flwr.cli.supernode.register import try_load_public_key

from federated.deployment.keys import fingerprint, keys_of, read_keys, read_node_key
from federated.errors import DeploymentError


def openssh(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def line(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def test_flower_reads_both_halves_of_the_nodes_key(tmp_path: Path) -> None:
    keys = keys_of(tmp_path)
    given = argparse.Namespace(auth_supernode_private_key=str(tmp_path / "node.key"), auth_supernode_public_key=None)
    supernode = importlib.import_module("flwr.supernode.cli.flower_supernode")
    private, _ = supernode._try_setup_client_authentication(given) or (None, None)
    assert private is not None
    assert private.private_numbers() == keys.node.private_numbers()
    pem = keys.node.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert try_load_public_key(tmp_path / "node.key.pub") == pem


def test_the_update_key_signs(tmp_path: Path) -> None:
    keys = keys_of(tmp_path)
    again = load_pem_private_key((tmp_path / "update.key").read_bytes(), None)
    assert isinstance(again, Ed25519PrivateKey)
    Ed25519PublicKey.from_public_bytes(keys.update_raw).verify(again.sign(b"words"), b"words")
    assert len(keys.update_raw) == 32


def test_private_halves_are_their_owners_alone(tmp_path: Path) -> None:
    keys_of(tmp_path / "device")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "device").iterdir()}
    assert modes == {"node.key": 0o600, "node.key.pub": 0o644, "update.key": 0o600}
    assert stat.S_IMODE((tmp_path / "device").stat().st_mode) == 0o700


def test_keys_are_made_once(tmp_path: Path) -> None:
    first = keys_of(tmp_path)
    again = keys_of(tmp_path)
    assert (again.node_line, again.update_raw) == (first.node_line, first.update_raw)


def test_what_a_kill_left_out_is_made(tmp_path: Path) -> None:
    first = keys_of(tmp_path)
    (tmp_path / "update.key").unlink()
    (tmp_path / "node.key.pub").unlink()
    again = keys_of(tmp_path)
    assert again.node_line == first.node_line
    assert (tmp_path / "node.key.pub").read_text() == f"{first.node_line}\n"


def test_two_at_once_agree(tmp_path: Path) -> None:
    found: list[tuple[str, bytes]] = []
    start = threading.Barrier(4)

    def make() -> None:
        start.wait()
        keys = keys_of(tmp_path)
        found.append((keys.node_line, keys.update_raw))

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1


@pytest.mark.parametrize("name", ["node.key", "update.key"])
def test_a_damaged_key_is_named_and_not_replaced(tmp_path: Path, name: str) -> None:
    keys_of(tmp_path)
    for damaged in (b"", b"nothing", b"\0" * 10**5):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(DeploymentError, match=f"{name} is no"):
            keys_of(tmp_path)
        assert (tmp_path / name).read_bytes() == damaged


@pytest.mark.parametrize("other", [ec.generate_private_key(ec.SECP256R1()), Ed25519PrivateKey.generate()])
def test_a_nodes_key_of_another_kind_is_refused(
    tmp_path: Path, other: ec.EllipticCurvePrivateKey | Ed25519PrivateKey
) -> None:
    keys_of(tmp_path)
    (tmp_path / "node.key").write_bytes(openssh(other))
    with pytest.raises(DeploymentError, match=r"no P-384 key"):
        read_keys(tmp_path)


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    keys_of(tmp_path)
    (tmp_path / "update.key").chmod(0o644)
    with pytest.raises(DeploymentError, match=r"update\.key can be read by others \(mode 644\)"):
        read_keys(tmp_path)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match=r"cannot read .*node\.key"):
        read_keys(tmp_path)


def test_a_public_line_is_read_back(tmp_path: Path) -> None:
    keys = keys_of(tmp_path)
    assert read_node_key(keys.node_line) == keys.node.public_key()


def test_one_key_has_one_text(tmp_path: Path) -> None:
    """A second spelling of a key would get past the rule that a key enrols once."""
    good = keys_of(tmp_path).node_line
    kind, body = good.split()
    for other in (
        "",
        f"{good} comment",
        f"{good}\n",
        f" {good}",
        f"{kind}  {body}",
        f'command="rm" {good}',
        f"{kind} {body[:-4]}",
        f"{kind} {body}====",
        line(ec.generate_private_key(ec.SECP256R1())),
        line(Ed25519PrivateKey.generate()),
        "x" * 10**6,
        f"{kind} {base64.b64encode(bytes(200)).decode()}",
        "ecdsa-sha2-nistp384 \u0410\u0410",
    ):
        with pytest.raises(DeploymentError, match="no public key"):
            read_node_key(other)


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed")
def test_the_fingerprint_is_that_of_openssh(tmp_path: Path) -> None:
    keys = keys_of(tmp_path)
    told = subprocess.run(
        ["ssh-keygen", "-l", "-f", tmp_path / "node.key"], capture_output=True, text=True, check=True
    ).stdout
    assert told.split()[1] == fingerprint(keys.node_line)


def test_fingerprints_of_update_keys_differ(tmp_path: Path) -> None:
    assert fingerprint(bytes(32)) == "SHA256:Zmh6rfhivXdsj8GLjp+OIAiXFIVu4jOzkCpZHQ1fKSU"
    assert fingerprint(bytes(31) + b"\1") != fingerprint(bytes(32))
