"""What is done with the offline keys: found a repository, replace keys, revoke.

Each function changes an edition; nothing is signed or written here. A key is replaced by a new one of the same role, so
that thresholds stay what they were planned to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from securesystemslib.signer import Key
from tuf.api.metadata import DelegatedRole, Delegations, Root, Snapshot, Targets, Timestamp

from federated.errors import ReleaseError
from federated.release import shelf
from federated.release.documents import BINS, BINS_PAST, DAYS
from federated.release.edition import Edition
from federated.release.keys import KeyRing, label_of, name_of
from federated.release.roles import ONLINE, ROOT, SNAPSHOT, TARGETS, TOP, Plan, group_of, patterns_of

__all__ = ["found", "replace_keys"]


def found(ring: KeyRing, plan: Plan) -> Edition:
    """The first edition of a new repository, with its keys: those of the ring that have the names, else new ones.

    Raises:
        SigningKeyError: if a key cannot be made.
    """
    keys = {
        role: [_key(ring, role, number) for number in range(1, plan.quorum(role).keys + 1)]
        for role in (*TOP, *plan.channels)
    }
    root = Root(consistent_snapshot=True)
    for role in TOP:
        root.roles[role].threshold = plan.quorum(role).threshold
        root.roles[role].unrecognized_fields[DAYS] = plan.days_of(role)
        for key in keys[role]:
            root.add_key(key, role)
    targets = Targets()
    targets.delegations = Delegations(
        {key.keyid: key for channel in plan.channels for key in keys[channel]},
        {channel: _delegated(channel, keys[channel], plan) for channel in plan.channels},
    )
    parts = (root, Timestamp(), Snapshot(meta={}), targets)
    for part in parts:
        part.version = 0  # nothing is signed yet
    edition = Edition(*parts, load=_nothing)
    edition.change_root()
    for channel in plan.channels:
        edition.start(channel)
    shelf.sign_floors(edition, {})
    return edition


def replace_keys(
    edition: Edition, ring: KeyRing, role: str, key: str | None = None, *, empty: bool = False
) -> list[str]:
    """Replace the keys of a role, and sign again what they signed.

    The next numbers are taken: keys of the ring that have these names (added ahead, from hardware), else new ones.

    Args:
        edition: changed.
        ring: gets the new keys.
        role: one of the top-level roles, or a channel.
        key: the name of one key; None replaces all of the role.
        empty: take everything off a channel, in place of signing it again.

    Returns:
        The new keys' names.

    Raises:
        ReleaseError: if there is no such role or key.
        SigningKeyError: if a key cannot be made.
    """
    if role not in TOP:
        edition.channel(role)
    delegator = edition.change_root() if role in TOP else edition.change(TARGETS)
    keys = edition.needs(role)[1]
    used = {one.keyid for one in keys}
    newer = (_key(ring, role, number) for number in count(1 + max(map(_number, keys))))
    names = []
    for old in _chosen(keys, role, key):
        fresh = next(one for one in newer if one.keyid not in used)
        delegator.revoke_key(old.keyid, role)
        delegator.add_key(fresh, role)
        names.append(name_of(fresh))
    if role not in TOP:
        (shelf.clear if empty else shelf.use_keys)(edition, role)
    elif role != ROOT:
        edition.renew(SNAPSHOT if role in ONLINE else role)
    return names


def _key(ring: KeyRing, role: str, number: int) -> Key:
    name = f"{role}-{number}"
    return ring.named(name) or ring.make(name, group_of(role))


def _number(key: Key) -> int:
    """The number in a key's name; 0 where another program named it."""
    number = name_of(key).rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def _delegated(channel: str, keys: list[Key], plan: Plan) -> DelegatedRole:
    terms = {DAYS: plan.days_of(channel), BINS: plan.bins, BINS_PAST: plan.bins_past}
    return DelegatedRole(
        channel,
        [key.keyid for key in keys],
        plan.quorum(channel).threshold,
        terminating=True,
        paths=patterns_of(channel),
        unrecognized_fields=terms,
    )


def _chosen(keys: Sequence[Key], role: str, key: str | None) -> list[Key]:
    chosen = [one for one in keys if key in (None, name_of(one))]
    if not chosen:
        raise ReleaseError(f"role {role} has no key {key!r}; it has {', '.join(map(label_of, keys))}")
    return chosen


def _nothing(name: str, _: str) -> Targets:
    raise ReleaseError(f"there is no role {name} yet")
