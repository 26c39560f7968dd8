"""What a device and the door say to each other at enrolment: the records, and the statements that both keys sign.

A statement begins with words that no other signature of this project begins with, and names the authority: what a
device signs for one deployment is worth nothing at another one, even if somebody passes it on.
"""

from __future__ import annotations

from typing import Annotated, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA384
from pydantic import BaseModel, ConfigDict, Field

from federated.deployment.invitations import decoded, encoded
from federated.deployment.keys import DeviceKeys, read_node_key
from federated.digests import canonical_json
from federated.errors import DeploymentError

__all__ = [
    "Answer",
    "EnrolBody",
    "FRESH_SECONDS",
    "Refusal",
    "StateBody",
    "asks_for_itself",
    "enrol_body",
    "proves",
    "state_body",
]

FRESH_SECONDS = 300
"""How far a device's clock may be from the door's when it asks for its state."""

_ENROL = b"federated-peft device enrolment 1\n"
_STATE = b"federated-peft device state 1\n"

Name = Annotated[str, Field(max_length=64)]
Bytes32 = Annotated[str, Field(min_length=43, max_length=43)]
Signature64 = Annotated[str, Field(min_length=86, max_length=86)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)


class EnrolBody(_Strict):
    """``POST /enrol``; bytes are base64url without padding."""

    client_id: Name
    token: Bytes32
    node_key: Annotated[str, Field(max_length=400)]
    update_key: Bytes32
    node_proof: Annotated[str, Field(min_length=80, max_length=150)]
    update_proof: Signature64


class StateBody(_Strict):
    """``POST /enrol/state``; ``at`` is the device's clock in seconds since 1970."""

    client_id: Name
    at: Annotated[int, Field(ge=0, le=1 << 40)]
    proof: Signature64


class Answer(_Strict):
    """What the door answers; ``at`` is its own clock."""

    client_id: Name
    state: Literal["pending", "approved", "revoked"]
    at: int


class Refusal(_Strict):
    """What it answers when it does not let somebody in; ``code`` is a stable word."""

    code: Annotated[str, Field(max_length=40)]
    message: Annotated[str, Field(max_length=400)]
    at: int


def enrol_body(keys: DeviceKeys, *, client_id: str, token: bytes, token_sha256: bytes, ca_sha256: str) -> EnrolBody:
    """A device's request, signed by both of its keys."""
    update_key = encoded(keys.update_raw)
    statement = _enrol_statement(client_id, encoded(token_sha256), keys.node_line, update_key, ca_sha256)
    return EnrolBody(
        client_id=client_id,
        token=encoded(token),
        node_key=keys.node_line,
        update_key=update_key,
        node_proof=encoded(keys.node.sign(statement, ec.ECDSA(SHA384()))),
        update_proof=encoded(keys.update.sign(statement)),
    )


def state_body(keys: DeviceKeys, *, client_id: str, at: int, ca_sha256: str) -> StateBody:
    """A device's question for its state, signed by the key that signs its updates."""
    proof = keys.update.sign(_state_statement(client_id, at, ca_sha256))
    return StateBody(client_id=client_id, at=at, proof=encoded(proof))


def proves(body: EnrolBody, *, token_sha256: bytes, ca_sha256: str) -> bool:
    """Whether whoever sent this has both private keys, for this token at this deployment."""
    statement = _enrol_statement(body.client_id, encoded(token_sha256), body.node_key, body.update_key, ca_sha256)
    try:
        node = read_node_key(body.node_key)
        node.verify(decoded(body.node_proof), statement, ec.ECDSA(SHA384()))
        Ed25519PublicKey.from_public_bytes(decoded(body.update_key)).verify(decoded(body.update_proof), statement)
    except (InvalidSignature, ValueError, DeploymentError):
        return False
    return True


def asks_for_itself(body: StateBody, *, update_key: bytes, ca_sha256: str) -> bool:
    """Whether whoever sent this has the private half of an update key."""
    statement = _state_statement(body.client_id, body.at, ca_sha256)
    try:
        Ed25519PublicKey.from_public_bytes(update_key).verify(decoded(body.proof), statement)
    except (InvalidSignature, ValueError):
        return False
    return True


def _enrol_statement(client_id: str, token_sha256: str, node_key: str, update_key: str, ca_sha256: str) -> bytes:
    return _ENROL + canonical_json(
        {
            "ca_sha256": ca_sha256,
            "client_id": client_id,
            "node_key": node_key,
            "token_sha256": token_sha256,
            "update_key": update_key,
        }
    )


def _state_statement(client_id: str, at: int, ca_sha256: str) -> bytes:
    return _STATE + canonical_json({"at": at, "ca_sha256": ca_sha256, "client_id": client_id})
