"""``fedpeft device enroll``: make this device's keys, and ask a deployment to let it take part."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from federated.cli.tables import say
from federated.errors import DeploymentError

if TYPE_CHECKING:
    from federated.deployment.enrolling import Enrolment

__all__ = ["COMMANDS"]

_LONGEST = 10_000


def enroll(
    invitation: Annotated[
        str,
        typer.Argument(
            metavar="INVITATION", help="The operator's line; - reads it from stdin, where no other user sees it."
        ),
    ],
    folder: Annotated[
        Path, typer.Option("--folder", metavar="DIR", help="The device's own, for its keys and what it learns.")
    ] = Path("device"),
    wait: Annotated[
        float, typer.Option("--wait", min=0, metavar="SECONDS", help="For the operator's approval, at most.")
    ] = 0.0,
) -> None:
    """Take part in a deployment: make keys that stay here, use an invitation, and wait for approval.

    The same command again goes on where it stopped, or tells the state. Example: fedpeft device enroll - --wait 600
    """
    from federated.deployment.enrolling import enrol, wait_for_approval
    from federated.deployment.invitations import parse_invitation

    parsed = parse_invitation(sys.stdin.readline(_LONGEST) if invitation == "-" else invitation)
    found = enrol(parsed, folder)
    _show(found, folder)
    if found.state == "pending" and wait:
        found = wait_for_approval(folder, seconds=wait)
        if found.state == "pending":
            raise DeploymentError(
                f"{found.client_id} was not approved within {wait:g} s; the same command asks again, at any time"
            )
    say(_next(found))


COMMANDS: dict[str, Callable[..., None]] = {"enroll": enroll}
"""By name, for the group of `federated.cli.device`."""


def _show(found: Enrolment, folder: Path) -> None:
    say(f"{found.client_id} at {found.door}, keys in {folder}")
    say(f"node key   {found.node_key}")
    say(f"update key {found.update_key}")


def _next(found: Enrolment) -> str:
    if found.state == "approved":
        return f"{found.client_id} is approved"
    return (
        f"{found.client_id} is pending: read the two fingerprints out to the operator, who gives "
        f"'fedpeft deploy approve {found.client_id}'; then give the same command again"
    )
