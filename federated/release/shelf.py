"""A channel's files in an edition: the pointer, the current version, the versions before it, and hash bins.

While a channel is small its role lists all its files. Past the plan's number they go into hash bins (TUF's succinct
delegations), and the role keeps the pointer and the current version's files alone: what a device fetches for an update
stays small, however many versions there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from securesystemslib.signer import Key
from tuf.api.metadata import Delegations, SuccinctRoles, TargetFile, Targets

from federated.errors import BelowSecurityFloor, NotReleased, ReleaseError, WrongContent
from federated.manifest import canonical_json
from federated.release.artefact import Artefact
from federated.release.documents import BINS, BINS_PAST, COUNTER, number
from federated.release.edition import Edition
from federated.release.records import LARGEST, ReleaseRecord, floors_of, to_floors
from federated.release.roles import FLOORS, MANIFEST, TARGETS, WEIGHTS, bin_prefix, current_path, target_path

__all__ = [
    "add",
    "clear",
    "current",
    "files_of",
    "floors",
    "is_revoked",
    "known",
    "point",
    "require_allowed",
    "roles_of",
    "set_floor",
    "sign_floors",
    "use_keys",
]

Files = Mapping[str, TargetFile]
_BELIEVED = 2**40
_MOST_BITS = 20


def floors(edition: Edition) -> dict[str, int]:
    """The security floors that are signed now, by adapter."""
    return floors_of(edition.role(TARGETS))


def is_revoked(edition: Edition, record: ReleaseRecord) -> bool:
    """Whether a version is below its adapter's floor."""
    return record.release_counter < floors(edition).get(record.adapter_id, 0)


def require_allowed(edition: Edition, record: ReleaseRecord) -> None:
    """Check that a version is not below its adapter's floor.

    Raises:
        BelowSecurityFloor: if it is.
    """
    if is_revoked(edition, record):
        raise BelowSecurityFloor(
            f"version {record.version_id[:12]} was revoked: its release counter is {record.release_counter}, the "
            f"security floor of adapter {record.adapter_id!r} is {floors(edition)[record.adapter_id]}; publish a newer "
            f"version"
        )


def set_floor(edition: Edition, adapter_id: str, least: int) -> None:
    """Sign an adapter's security floor, beside those of the others.

    Raises:
        ReleaseError: if no version could ever reach it.
    """
    if not 0 <= least < LARGEST:
        raise ReleaseError(f"a security floor of {least}; expected a release counter, from 0 to {LARGEST - 1}")
    sign_floors(edition, floors(edition) | {adapter_id: least})


def sign_floors(edition: Edition, least: Mapping[str, int]) -> None:
    """Sign all security floors."""
    custom = to_floors(least)
    edition.change(TARGETS).targets[FLOORS] = edition.add_file(FLOORS, canonical_json(custom), custom)


def add(edition: Edition, channel: str, artefacts: Iterable[Artefact], *, audit_head: str = "") -> list[ReleaseRecord]:
    """Put versions on a channel; the last one becomes its current version.

    Raises:
        BelowSecurityFloor: if one was revoked.
        ReleaseError: if there is no such channel, nothing to add, or the release counters have run out.
    """
    edition.channel(channel)
    records: list[ReleaseRecord] = []
    files: Files = {}
    for artefact in artefacts:
        records.append(_record(edition, channel, artefact, audit_head))
        files = _files(edition, channel, artefact, records[-1])
        _shelve(edition, channel, files)
    if not records:
        raise ReleaseError("nothing to publish: expected at least one version")
    _show(edition, channel, records[-1], files)
    return records


def point(edition: Edition, channel: str, version_id: str) -> ReleaseRecord:
    """Make a version that the channel has already its current one.

    Raises:
        NotReleased: if the channel does not have it.
        BelowSecurityFloor: if it was revoked.
    """
    record = known(edition, version_id, [channel])
    if record is None:
        raise NotReleased(f"channel {channel} has no version {version_id}: publish it there")
    require_allowed(edition, record)
    _show(edition, channel, record, files_of(edition, channel, record))
    return record


def current(edition: Edition, channel: str) -> ReleaseRecord | None:
    """Where a channel points; None where nothing was published yet."""
    path = current_path(channel)
    pointer = edition.channel(channel).targets.get(path)
    return None if pointer is None else ReleaseRecord.from_custom(pointer.custom, path)


def known(edition: Edition, version_id: str, channels: Iterable[str]) -> ReleaseRecord | None:
    """What was signed of a version on the first of these channels that has it; None if none has."""
    for channel in channels:
        path = target_path(channel, version_id, MANIFEST)
        found = _find(edition, channel, path)
        if found is not None:
            return ReleaseRecord.from_custom(found.custom, path)
    return None


def files_of(edition: Edition, channel: str, record: ReleaseRecord) -> dict[str, TargetFile]:
    """The files of a version on a channel, by path.

    Raises:
        NotReleased: if the channel does not have all of them.
    """
    found = {}
    for name in (MANIFEST, WEIGHTS, *record.files):
        path = target_path(channel, record.version_id, name)
        file = _find(edition, channel, path)
        if file is None:
            raise NotReleased(f"channel {channel} has version {record.version_id} without its {name}: publish it again")
        found[path] = file
    return found


def roles_of(edition: Edition, channel: str) -> Iterator[str]:
    """The channel's role, and its hash bins if it has any."""
    bins = _bins(edition.channel(channel))
    yield channel
    if bins is not None:
        yield from bins.get_roles()


def clear(edition: Edition, channel: str) -> None:
    """Take everything off a channel: whatever somebody with its keys put there is gone, hash bins too.

    Counting goes on, unless that somebody wrote a number that no repository counts to.
    """
    counted = edition.channel(channel).unrecognized_fields.get(COUNTER)
    believed = type(counted) is int and 0 <= counted < _BELIEVED
    edition.start(channel).unrecognized_fields[COUNTER] = counted if believed else 0


def use_keys(edition: Edition, channel: str) -> None:
    """Sign a channel and its hash bins again, the bins by the channel's keys as they are now."""
    threshold, keys = edition.needs(channel)
    role = edition.change(channel)
    bins = _bins(role)
    if bins is not None:
        _delegate(role, SuccinctRoles([key.keyid for key in keys], threshold, bins.bit_length, bins.name_prefix), keys)
    for name in roles_of(edition, channel):
        edition.change(name)


def _record(edition: Edition, channel: str, artefact: Artefact, audit_head: str) -> ReleaseRecord:
    before = known(edition, artefact.version_id, edition.channels)
    one, role = artefact.manifest, edition.change(channel)
    own = one.release_counter
    if before is not None and own not in (0, before.release_counter):
        raise ReleaseError(
            f"version {artefact.version_id[:12]} was released with counter {before.release_counter}, and its manifest "
            f"says {own}"
        )
    counter = before.release_counter if before is not None else own or _next_counter(edition, one.adapter_id)
    if not counter < LARGEST:
        raise ReleaseError(
            f"release counter {counter} is too large: somebody with a channel's key drove it up; revoke that key"
        )
    role.unrecognized_fields[COUNTER] = max(counter, _counted(role))
    files = tuple(sorted(artefact.files))
    record = ReleaseRecord(
        one.version_id,
        counter,
        one.base_digest,
        one.weights_digest,
        one.adapter_id,
        audit_head,
        files,
        artefact.variants,
        artefact.loss,
    )
    require_allowed(edition, record)
    return record


def _next_counter(edition: Edition, adapter_id: str) -> int:
    """Larger than all that were ever used here, whatever their adapter."""
    used = [_counted(edition.role(channel)) for channel in edition.channels]
    return max(*used, floors(edition).get(adapter_id, 0) - 1) + 1


def _counted(role: Targets) -> int:
    return number(role.unrecognized_fields, COUNTER, 0)


def _files(edition: Edition, channel: str, artefact: Artefact, record: ReleaseRecord) -> Files:
    made = {}
    for name, data in artefact.contents().items():
        path = target_path(channel, record.version_id, name)
        made[path] = edition.add_file(path, data, record.to_custom() if name == MANIFEST else None)
    return made


def _show(edition: Edition, channel: str, record: ReleaseRecord, files: Files) -> None:
    """Make the pointer name a version."""
    role, path = edition.change(channel), current_path(channel)
    pointer = edition.add_file(path, record.to_bytes(), record.to_custom())
    if _bins(role) is None:
        role.targets[path] = pointer
    else:
        role.targets = {path: pointer, **files}


def _shelve(edition: Edition, channel: str, files: Files) -> None:
    role = edition.change(channel)
    bins = _bins(role)
    if bins is not None:
        _distribute(edition, bins, files)
        return
    role.targets.update(files)
    if len(role.targets) > edition.term(channel, BINS_PAST, 0):
        _split(edition, channel, role)


def _split(edition: Edition, channel: str, role: Targets) -> None:
    """Move all files of a channel into new hash bins."""
    threshold, keys = edition.needs(channel)
    bits = edition.term(channel, BINS, 64).bit_length() - 1
    bins = SuccinctRoles([key.keyid for key in keys], threshold, bits, bin_prefix(channel))
    _delegate(role, bins, keys)
    for name in bins.get_roles():
        edition.start(name)
    files = {path: file for path, file in role.targets.items() if path != current_path(channel)}
    _distribute(edition, bins, files)


def _delegate(role: Targets, bins: SuccinctRoles, keys: Iterable[Key]) -> None:
    role.delegations = Delegations({key.keyid: key for key in keys}, succinct_roles=bins)


def _distribute(edition: Edition, bins: SuccinctRoles, files: Files) -> None:
    for path, file in files.items():
        edition.change(bins.get_role_for_target(path)).targets[path] = file


def _find(edition: Edition, channel: str, path: str) -> TargetFile | None:
    role = edition.channel(channel)
    bins = _bins(role)
    if path in role.targets or bins is None:
        return role.targets.get(path)
    return edition.role(bins.get_role_for_target(path)).targets.get(path)


def _bins(role: Targets) -> SuccinctRoles | None:
    bins = None if role.delegations is None else role.delegations.succinct_roles
    if bins is not None and bins.bit_length > _MOST_BITS:
        raise WrongContent(
            f"a channel's metadata name 2**{bins.bit_length} hash bins: somebody with its key did; revoke it"
        )
    return bins
