"""The server's book of devices: invitations, who enrolled with which keys, who may take part, and who said so.

    invited --(the device asks)--> pending --(the operator approves)--> approved --> revoked
                                        (or at once, where the invitation says so)

A key belongs to one entry for ever: a revoked name is invited again with new keys and gets an entry of its own. The
book is a database in the server's folder that several processes may use at once: the door and the operator's commands.
After each change it writes ``devices.json``, which is all that the strategy reads (`federated.flower.enrolled`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from federated.deployment.device_records import (
    Claim,
    Device,
    KeysUsed,
    LogEntry,
    OpenInvitation,
    State,
    device_of,
    published,
    time_text,
)
from federated.deployment.device_rules import (
    check_free,
    current,
    enter,
    invitation_of,
    keys_of,
    not_to_approve,
    note,
    note_refusal,
    refusal,
    row_where,
    rows_where,
    unknown,
    used_by,
    withdraw,
)
from federated.deployment.device_tables import DATABASE, open_book, transaction
from federated.deployment.invitations import Invitation, check_door, new_token
from federated.errors import ConfigError, DeploymentError, EnrolmentRefused
from federated.files import sync_folder, write_whole
from federated.names import check_device_name

__all__ = ["DEVICES_FILE", "Claim", "Device", "DeviceBook", "KeysUsed", "LogEntry", "OpenInvitation", "State"]

DEVICES_FILE = "devices.json"
FORMAT = 1

Clock = Callable[[], datetime]

_LONGEST_REMARK = 300
_LONGEST_VALIDITY = timedelta(days=30)


class DeviceBook:
    """The book in a server's folder; made where there is none.

    Args:
        folder: of the deployment; it must be there.
        clock: now, with a time zone.

    Raises:
        DeploymentError: if the database cannot be opened.
    """

    def __init__(self, folder: Path, *, clock: Clock) -> None:
        self.folder = folder
        self.path = folder / DATABASE
        self._clock = clock
        open_book(self.path)

    def invite(
        self, client_id: str, *, door: str, ca_sha256: str, valid: timedelta, auto_approve: bool, actor: str
    ) -> Invitation:
        """Invite a device. An older invitation of the name that was not used yet ends.

        Args:
            client_id: its name from now on.
            door: ``https://HOST[:PORT]`` as devices reach it.
            ca_sha256: fingerprint of the door's authority.
            valid: at most 30 days.
            auto_approve: whether whoever uses the invitation is let in at once.
            actor: who invites.

        Returns:
            The invitation with its token, which the book does not keep.

        Raises:
            ConfigError: for a name, door or time that cannot be.
            DeploymentError: if such a device is enrolled, or the name is known in another spelling.
        """
        check_device_name(client_id)
        if not timedelta(minutes=1) <= valid <= _LONGEST_VALIDITY:
            raise ConfigError(f"an invitation that is valid for {valid}; expected one minute to 30 days")
        now = self._clock()
        expires = datetime.fromtimestamp(int((now + valid).timestamp()), UTC)
        made = Invitation(check_door(door), client_id, new_token(), ca_sha256, expires)
        with transaction(self.path) as book:
            check_free(book, client_id)
            withdraw(book, client_id, at=time_text(now), actor=actor)
            book.execute(
                "INSERT INTO invitations (client_id, token_sha256, made_at, expires_at, auto_approve) "
                "VALUES (?, ?, ?, ?, ?)",
                (client_id, made.token_sha256, time_text(now), time_text(expires), auto_approve),
            )
            how = "approved at once" if auto_approve else "to be approved"
            note(book, time_text(now), actor, "invited", client_id, f"until {time_text(expires)}, {how}")
        return made

    def enrol(self, claim: Claim) -> tuple[Device, bool]:
        """Let a device use its invitation, once. The same keys with the same token find their entry again.

        Args:
            claim: with proofs that were checked.

        Returns:
            The entry, and whether it was made now.

        Raises:
            EnrolmentRefused: for a token that is unknown, used, withdrawn or out of date; which, the message says: it
                is for the operator and not for whoever asked.
            KeysUsed: if the token is good and a key is not new; the token stays good.
        """
        check_device_name(claim.client_id)
        now = self._clock()
        with transaction(self.path) as book:
            invitation = invitation_of(book, claim)
            entry = None if invitation is None else used_by(book, invitation, claim)
            refused, new = "" if entry else refusal(invitation, now), entry is None
            if invitation is not None and not (entry or refused):
                entry = enter(book, claim, invitation, at=time_text(now))
            if invitation is not None and refused:
                note_refusal(book, claim, invitation, f"{refused}, from {claim.address}", at=time_text(now))
        if entry is None:
            raise EnrolmentRefused(f"{claim.client_id}: {refused}")
        self.write_devices_file()
        return entry, new

    def approve(self, client_id: str, *, actor: str) -> Device:
        """Let a device take part that asked; one that is in stays so.

        Raises:
            DeploymentError: if it did not ask, is not known, or was revoked.
        """
        at = time_text(self._clock())
        check_device_name(client_id)
        with transaction(self.path) as book:
            entry = current(book, client_id)
            if entry is None or entry.state == "revoked":
                raise DeploymentError(not_to_approve(book, client_id, entry))
            if entry.state == "pending":
                book.execute(
                    "UPDATE devices SET state = 'approved', approved_at = ? WHERE number = ?", (at, entry.number)
                )
                note(book, at, actor, "approved", entry.client_id, keys_of(entry))
            entry = device_of(row_where(book, "number = ?", entry.number))
        self.write_devices_file()
        return entry

    def revoke(self, client_id: str, *, actor: str, reason: str) -> Device | None:
        """End a device's part from the next round on, or withdraw an invitation that nobody used.

        Args:
            client_id: which.
            actor: who does it.
            reason: why, at most 300 characters on one line.

        Returns:
            The device; None where there was only an invitation.

        Raises:
            ConfigError: for a reason that is empty, too long or not printable.
            DeploymentError: if the name is not known.
        """
        check_device_name(client_id)
        if not (0 < len(reason) <= _LONGEST_REMARK and reason.isprintable()):
            raise ConfigError(f"a reason of {len(reason)} characters; expected 1 to {_LONGEST_REMARK} on one line")
        at = time_text(self._clock())
        with transaction(self.path) as book:
            withdrawn = withdraw(book, client_id, at=at, actor=actor, reason=reason)
            entry = current(book, client_id)
            if entry is None and not withdrawn:
                raise DeploymentError(unknown(book, client_id))
            if entry is not None and entry.state != "revoked":
                book.execute(
                    "UPDATE devices SET state = 'revoked', revoked_at = ?, remark = ? WHERE number = ?",
                    (at, reason, entry.number),
                )
                note(book, at, actor, "revoked", entry.client_id, reason)
                entry = device_of(row_where(book, "number = ?", entry.number))
        self.write_devices_file()
        return entry

    def device(self, client_id: str) -> Device | None:
        """The newest entry of a name."""
        check_device_name(client_id)
        with transaction(self.path) as book:
            return current(book, client_id)

    def entries(self, client_id: str) -> list[Device]:
        """All entries of a name, the oldest first."""
        check_device_name(client_id)
        with transaction(self.path) as book:
            return [device_of(row) for row in rows_where(book, "client_id = ? ORDER BY number", client_id)]

    def devices(self) -> list[Device]:
        """All entries in their order, with those that are revoked."""
        with transaction(self.path) as book:
            return [device_of(row) for row in book.execute("SELECT * FROM devices ORDER BY number")]

    def open_invitations(self) -> list[OpenInvitation]:
        """Those that are neither used nor withdrawn nor out of date."""
        with transaction(self.path) as book:
            rows = book.execute(
                "SELECT * FROM invitations WHERE used_at IS NULL AND withdrawn_at IS NULL ORDER BY number"
            ).fetchall()
        now = time_text(self._clock())
        return [
            OpenInvitation(row["client_id"], row["made_at"], row["expires_at"], bool(row["auto_approve"]))
            for row in rows
            if row["expires_at"] > now
        ]

    def log(self) -> list[LogEntry]:
        """All that was done, the oldest first."""
        with transaction(self.path) as book:
            return [LogEntry(*row) for row in book.execute("SELECT * FROM log ORDER BY number")]

    def note_registering(self, number: int, strangers: Iterable[str] = ()) -> None:
        """Say that Flower is about to be asked to register an entry's key, and which nodes nobody knows before that."""
        with transaction(self.path) as book:
            book.execute("UPDATE devices SET registering = ? WHERE number = ?", (" ".join(sorted(strangers)), number))

    def note_node(self, number: int, node_id: str, *, actor: str) -> None:
        """Say under which id Flower knows an entry's key; empty: it does not."""
        with transaction(self.path) as book:
            entry = device_of(row_where(book, "number = ?", number))
            book.execute("UPDATE devices SET registering = NULL, node_id = ? WHERE number = ?", (node_id, number))
            if entry.node_id != node_id:
                action = "registered" if node_id else "unregistered"
                told = f"node {node_id or entry.node_id}"
                note(book, time_text(self._clock()), actor, action, entry.client_id, told)

    def write_devices_file(self, path: Path | None = None) -> None:
        """Write what the strategy reads. Nobody else changes the book meanwhile, so an older state never comes last.

        Args:
            path: default: ``devices.json`` beside the database.

        Raises:
            DeploymentError: if it cannot be written; the book is right then, and the next change writes it again.
        """
        target = path or self.folder / DEVICES_FILE
        with transaction(self.path) as book:
            rows = book.execute("SELECT * FROM devices ORDER BY number")
            entries = {device.client_id: published(device) for device in map(device_of, rows)}
            data = json.dumps({"format": FORMAT, "devices": entries}, indent=1, sort_keys=True).encode()
            try:
                write_whole(target, data + b"\n", mode=0o600)
                sync_folder(target.parent)
            except OSError as error:
                raise DeploymentError(
                    f"the change is in the book, and {target} could not be written ({error.strerror}); "
                    "runs go by the old file until the command is given again"
                ) from error
