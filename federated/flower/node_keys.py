"""The public keys that Flower authenticates nodes with, as the file of enrolled devices writes them.

A SuperNode proves with each of its calls that it holds the private key of the public one under which the SuperLink
knows it; `Grid.get_nodes` hands that key on. In a simulation nobody proves anything: such Grids say so.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from flwr.serverapp import Grid

__all__ = ["Keyless", "fingerprint", "node_keys", "openssh_line"]


@runtime_checkable
class Keyless(Protocol):
    """A Grid of simulated nodes, which have no keys. Every other Grid has to say its nodes' keys."""

    keyless: bool


def node_keys(grid: Grid) -> Mapping[int, str] | None:
    """Node id to public key, as `openssh_line` writes it, of the nodes that are there; None in a simulation."""
    if isinstance(grid, Keyless) and grid.keyless:
        return None
    return {node.node_id: openssh_line(node.public_key) for node in grid.get_nodes()}


def openssh_line(pem: bytes) -> str:
    """A public key as Flower keeps it (PEM), as one line of OpenSSH; empty where it is no key of an elliptic curve."""
    try:
        key = load_pem_public_key(pem)
        if isinstance(key, EllipticCurvePublicKey):
            return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    except (ValueError, UnsupportedAlgorithm):  # no PEM, a curve that OpenSSH does not know
        pass
    return ""


def fingerprint(line: str) -> str:
    """A key's short name, as ``ssh-keygen -l`` shows it.

    >>> fingerprint("ecdsa-sha2-nistp384 AAAA")[:12]
    'SHA256:cJ6Ay'
    """
    body = base64.b64decode(line.partition(" ")[2] or "")
    return f"SHA256:{base64.b64encode(hashlib.sha256(body).digest()).decode().rstrip('=')}"
