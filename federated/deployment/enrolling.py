"""A device enrols: makes its keys, finds the door, uses its invitation, and waits for the operator's word.

    DIR/ca.crt           the deployment's authority, checked against the invitation
    DIR/node.key, update.key, node.key.pub      see `federated.deployment.keys`
    DIR/enrolment.json   door, name, state, and the fingerprints of authority and keys

Every step can be taken twice: whoever gives the same command again goes on where it stopped, or learns the state.
Called by `federated.cli.device_enrol`, and by what starts the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from federated.deployment.certificates import CA_CERTIFICATE, ca_fingerprint
from federated.deployment.door_client import Busy, DoorClient, fetched_authority
from federated.deployment.enrolment_messages import FRESH_SECONDS, Answer, Refusal, enrol_body, state_body
from federated.deployment.invitations import Invitation
from federated.deployment.keys import DeviceKeys, fingerprint, keys_of, read_keys
from federated.deployment.secret_files import own_folder, write_if_missing
from federated.errors import DeploymentError, DoorUnreachable, EnrolmentRefused
from federated.files import sync_folder, write_whole

__all__ = ["ENROLMENT_FILE", "Enrolment", "ask_state", "enrol", "read_enrolment", "wait_for_approval"]

ENROLMENT_FILE = "enrolment.json"
_TRIES = 3
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 20.0
_Said = TypeVar("_Said")
_SHA256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_NEW_FOLDER = "ask the operator for a new invitation, and enrol into a new folder: keys are taken once"

Clock = Callable[[], datetime]


class Enrolment(BaseModel):
    """What ``enrolment.json`` says."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    format: Literal[1] = 1
    door: str
    client_id: str
    state: Literal["pending", "approved", "revoked"]
    ca_sha256: _SHA256
    node_key: str
    update_key: str


@dataclass(frozen=True)
class _Folder:
    path: Path
    keys: DeviceKeys
    ca_pem: str


def enrol(invitation: Invitation, folder: Path, *, clock: Clock = lambda: datetime.now(UTC)) -> Enrolment:
    """Use an invitation, or, if it was used from this folder already, ask for the state.

    Args:
        invitation: for this device.
        folder: the device's own; made if it is not there.
        clock: the device's.

    Returns:
        What is in ``enrolment.json`` now.

    Raises:
        DoorUnreachable: if the door does not answer; the same call goes on later.
        EnrolmentRefused: if it, or the operator, says no.
        DeploymentError: if the door shows another authority, or the folder belongs to another enrolment.
    """
    own_folder(folder)
    before = read_enrolment(folder) if (folder / ENROLMENT_FILE).exists() else None
    if before is not None:
        _check_same(before, invitation, folder)
        return ask_state(folder, clock=clock)
    ca_pem = _authority(invitation, folder)
    place = _Folder(folder, keys_of(folder), ca_pem)
    body = enrol_body(
        place.keys,
        client_id=invitation.client_id,
        token=invitation.token,
        token_sha256=invitation.token_sha256,
        ca_sha256=invitation.ca_sha256,
    )
    with DoorClient(invitation.door, ca_pem) as door:
        answer = _patiently(lambda: door.enrol(body))
    if isinstance(answer, Refusal):
        raise _not_enrolled(answer, invitation, clock())
    return _kept(place, answer, door=invitation.door, name=invitation.client_id)


def ask_state(folder: Path, *, clock: Clock = lambda: datetime.now(UTC)) -> Enrolment:
    """Ask the door for the state of the device that enrolled from a folder, and keep it there.

    Raises:
        DoorUnreachable: if the door does not answer.
        EnrolmentRefused: if it does not know this device, or the clocks are too far apart.
        DeploymentError: if a file of the folder is missing or damaged.
    """
    before = read_enrolment(folder)
    place = _Folder(folder, read_keys(folder), _own_authority(folder, before.ca_sha256))
    at = int(clock().timestamp())
    body = state_body(place.keys, client_id=before.client_id, at=at, ca_sha256=before.ca_sha256)
    with DoorClient(before.door, place.ca_pem) as door:
        answer = _patiently(lambda: door.state(body))
    if isinstance(answer, Refusal):
        raise _no_state(answer, before, at)
    return _kept(place, answer, door=before.door, name=before.client_id)


def wait_for_approval(
    folder: Path,
    *,
    seconds: float,
    clock: Clock = lambda: datetime.now(UTC),
    sleep: Callable[[float], None] = time.sleep,
) -> Enrolment:
    """Ask again and again, ever less often; a door that does not answer in between is waited for.

    Returns:
        What is known when the device is no longer pending, or the time is over.

    Raises:
        EnrolmentRefused: if the door does not know this device, or the clocks are too far apart.
        DoorUnreachable: if the door did not answer at the last time of asking.
    """
    until, pause = time.monotonic() + seconds, _FIRST_PAUSE
    found = read_enrolment(folder)
    while found.state == "pending" and (left := until - time.monotonic()) > 0:
        sleep(min(pause, left))
        pause = min(2 * pause, _LONGEST_PAUSE)
        try:
            found = ask_state(folder, clock=clock)
        except DoorUnreachable:
            if time.monotonic() >= until:
                raise
    return found


def read_enrolment(folder: Path) -> Enrolment:
    """What a folder's enrolment is, as far as the device knows.

    Raises:
        DeploymentError: if there is none, or it is damaged.
    """
    path = folder / ENROLMENT_FILE
    try:
        return Enrolment.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DeploymentError(f"{folder} is not enrolled: give 'fedpeft device enroll INVITATION --folder'") from None
    except OSError as error:
        raise DeploymentError(f"cannot read {path}: {error.strerror}") from None
    except ValidationError:
        raise DeploymentError(f"{path} is damaged; move it away and enrol again with the same invitation") from None


def _check_same(before: Enrolment, invitation: Invitation, folder: Path) -> None:
    if (before.client_id, before.ca_sha256) != (invitation.client_id, invitation.ca_sha256):
        raise DeploymentError(
            f"{folder} is enrolled as {before.client_id} at {before.door}, and the invitation is for "
            f"{invitation.client_id} at {invitation.door}; give another --folder"
        )


def _authority(invitation: Invitation, folder: Path) -> str:
    """The authority that the invitation names: from the folder, else from the door; kept in the folder."""
    path = folder / CA_CERTIFICATE
    if not path.exists():
        fetched = _patiently(lambda: fetched_authority(invitation.door, invitation.ca_sha256))
        write_if_missing(path, fetched.encode())
    return _own_authority(folder, invitation.ca_sha256)


def _own_authority(folder: Path, ca_sha256: str) -> str:
    path = folder / CA_CERTIFICATE
    try:
        pem = path.read_bytes()
    except OSError as error:
        raise DeploymentError(f"cannot read {path}: {error.strerror}") from None
    try:
        found = ca_fingerprint(pem)
    except DeploymentError:
        found = ""
    if found != ca_sha256:
        raise DeploymentError(f"{path} is damaged, or the authority of another deployment; give another --folder")
    return pem.decode("ascii")


def _patiently(ask: Callable[[], _Said]) -> _Said:
    """Ask; come back a few times when the door says so."""
    for _ in range(_TRIES):
        try:
            return ask()
        except Busy as error:
            time.sleep(min(error.seconds, _LONGEST_PAUSE))
    return ask()


def _kept(place: _Folder, answer: Answer, *, door: str, name: str) -> Enrolment:
    if answer.client_id != name:
        raise DoorUnreachable(f"{door} answered for {answer.client_id}, and this device is {name}; tell the operator")
    made = Enrolment(
        door=door,
        client_id=name,
        state=answer.state,
        ca_sha256=ca_fingerprint(place.ca_pem),
        node_key=fingerprint(place.keys.node_line),
        update_key=fingerprint(place.keys.update_raw),
    )
    path = place.path / ENROLMENT_FILE
    try:
        write_whole(path, made.model_dump_json(indent=1).encode() + b"\n", mode=0o600)
        sync_folder(place.path)
    except OSError as error:
        raise DeploymentError(f"cannot write {path}: {error.strerror}; give the same command again") from error
    if made.state == "revoked":
        raise EnrolmentRefused(f"{name} was revoked by the operator of {door}; {_NEW_FOLDER}")
    return made


def _not_enrolled(refusal: Refusal, invitation: Invitation, now: datetime) -> EnrolmentRefused:
    """Why, as far as a device can know: the door says the same for a used, a withdrawn and an unknown invitation."""
    who = f"{invitation.client_id} at {invitation.door}"
    if refusal.code == "keys_used":
        return EnrolmentRefused(f"{who}: the keys in this folder were enrolled before; {_NEW_FOLDER}")
    if refusal.code == "malformed":
        return EnrolmentRefused(f"{who}: the door does not understand this device; install the same version on both")
    if refusal.at >= invitation.expires_at.timestamp():
        end = f"{invitation.expires_at:%F %T} UTC"
        return EnrolmentRefused(f"{who}: the invitation ended at {end}{_skew(refusal.at, now)}; ask for a new one")
    return EnrolmentRefused(
        f"{who}: the door refuses the invitation: it was used by another device, withdrawn, or a newer one was made. "
        "If this device is the first to use it, tell the operator: somebody else may have"
    )


def _no_state(refusal: Refusal, before: Enrolment, at: int) -> EnrolmentRefused:
    who = f"{before.client_id} at {before.door}"
    if refusal.code == "clock":
        apart = abs(refusal.at - at)
        return EnrolmentRefused(
            f"{who}: this device's clock and the door's are {apart} s apart, at most {FRESH_SECONDS} are allowed; "
            "set the clock of this device"
        )
    return EnrolmentRefused(f"{who}: the door does not know this device (any more); {_NEW_FOLDER}")


def _skew(at: int, now: datetime) -> str:
    apart = int(now.timestamp()) - at
    return f" (this device's clock is {abs(apart)} s off the door's)" if abs(apart) > FRESH_SECONDS else ""
