"""From what people type to one version: ``latest``, ``v3``, ``RUN:v3``, a channel, a tag, a full id or its beginning.

Names of channels and tags that could be read as one of the others are refused when they are made, so no name is
ambiguous.
"""

from __future__ import annotations

import re

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from federated.errors import RegistryError, VersionNotFound
from federated.registry.schema import ChannelRow, TagRow, VersionRow

__all__ = ["check_channel_name", "check_tag_name", "find", "newest_run", "resolve"]

_NUMBER = re.compile(r"(?:(?P<run>.+):)?v(?P<number>[0-9]{1,9})")
_PREFIX = re.compile(r"[0-9a-f]{6,64}")
_CHANNEL = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
_LONGEST = 64


def check_channel_name(channel: str) -> None:
    """Refuse a channel name that is malformed or means something else.

    Raises:
        RegistryError: naming the rule.
    """
    if not _CHANNEL.fullmatch(channel):
        raise RegistryError(
            f"{channel!r} is no channel name; expected up to 64 of a-z, 0-9 and '-', a letter or digit first"
        )
    if _reads_otherwise(channel):
        raise RegistryError(
            f"{channel!r} cannot name a channel: it reads as a version number, a version id, 'latest' or 'null'; "
            f"choose a name such as dev, canary or stable"
        )


def check_tag_name(tag: str) -> None:
    """Refuse a tag that is malformed or means something else.

    Raises:
        RegistryError: naming the rule.
    """
    if not _TAG.fullmatch(tag) or len(tag) > _LONGEST:
        raise RegistryError(
            f"{tag!r} is no tag; expected up to {_LONGEST} letters, digits and any of . _ -, "
            f"a letter or digit first and no '..'"
        )
    if _reads_otherwise(tag.lower()):
        raise RegistryError(
            f"{tag!r} cannot be a tag: it reads as a version number, a version id, 'latest' or 'null'; "
            f"choose a name such as release-1.0"
        )


def _reads_otherwise(name: str) -> bool:
    return bool(name in ("latest", "null") or _NUMBER.fullmatch(name) or _PREFIX.fullmatch(name))


def find(session: Session, version_id: str) -> VersionRow | None:
    """The version of a whole id, or None."""
    return session.scalar(select(VersionRow).where(VersionRow.version_id == version_id))


def resolve(session: Session, name: str) -> VersionRow:
    """The version that ``name`` means.

    Raises:
        VersionNotFound: if there is none, or more than one.
    """
    if name == "latest":
        return _latest(session)
    numbered = _NUMBER.fullmatch(name)
    if numbered and name.isprintable():
        return _numbered(session, int(numbered["number"]), run_id=numbered["run"])
    if _PREFIX.fullmatch(name.lower()):
        return _by_prefix(session, name.lower())
    found = _named(session, name) if _TAG.fullmatch(name) else None
    if found is None:
        raise _unknown(session, name)
    return found


_DEV = "dev"
"""Runs that publish by themselves move this channel; a centrally trained version beside them does not."""


def newest_run(session: Session) -> str | None:
    """The run that ``v3`` is looked up in; None in an empty registry.

    It is the run that the channel ``dev`` points into; without that channel, the one whose first version was published
    last.
    """
    current = _in_channel(session, _DEV)
    if current is not None:
        return current.run_id
    first = func.min(VersionRow.sequence)
    return session.scalar(select(VersionRow.run_id).group_by(VersionRow.run_id).order_by(first.desc()).limit(1))


def _in_channel(session: Session, channel: str) -> VersionRow | None:
    pointed = select(VersionRow).join(ChannelRow, ChannelRow.version_id == VersionRow.version_id)
    return session.scalar(pointed.where(ChannelRow.name == channel))


def _named(session: Session, name: str) -> VersionRow | None:
    """Of a channel, else of a tag."""
    tagged = select(VersionRow).join(TagRow, TagRow.version_id == VersionRow.version_id).where(TagRow.name == name)
    return _in_channel(session, name) or session.scalar(tagged)


def _latest(session: Session) -> VersionRow:
    row = _in_channel(session, _DEV) or session.scalar(select(VersionRow).order_by(VersionRow.sequence.desc()).limit(1))
    if row is None:
        raise VersionNotFound("the registry holds no versions yet; publish one first")
    return row


def _numbered(session: Session, number: int, *, run_id: str | None) -> VersionRow:
    run = newest_run(session) if run_id is None else run_id
    of_run = select(VersionRow).where(VersionRow.run_id == run)
    newest_first = of_run.where(VersionRow.round_number == number).order_by(VersionRow.sequence.desc())
    row = session.scalar(newest_first.limit(1))
    if row is None:
        raise VersionNotFound(_no_number(session, number, run=run))
    return row


def _no_number(session: Session, number: int, *, run: str | None) -> str:
    in_run = (
        select(VersionRow.round_number).where(VersionRow.run_id == run).distinct().order_by(VersionRow.round_number)
    )
    numbers = session.scalars(in_run).all()
    if numbers:
        return f"run {run} has no v{number}; it has v{numbers[0]} to v{numbers[-1]} ({len(numbers)} numbers)"
    newest = newest_run(session)
    if newest is None:
        return "the registry holds no versions yet; publish one first"
    return f"there is no run {run!r} here; the newest run is {newest!r}"


def _by_prefix(session: Session, prefix: str) -> VersionRow:
    # A range, which an index answers, in place of a pattern; no hexadecimal digit comes after "f".
    begins = VersionRow.version_id.between(prefix, f"{prefix}g")
    rows = session.scalars(select(VersionRow).where(begins).order_by(VersionRow.version_id).limit(3)).all()
    if not rows:
        raise VersionNotFound(f"no version's id begins with {prefix!r}; list the versions to see their ids")
    if len(rows) > 1:
        some = ", ".join(row.version_id[:16] for row in rows)
        raise VersionNotFound(f"more than one version's id begins with {prefix!r} ({some} ...); give more characters")
    return rows[0]


def _unknown(session: Session, name: str) -> VersionNotFound:
    channels = ", ".join(session.scalars(select(ChannelRow.name).order_by(ChannelRow.name))) or "none yet"
    return VersionNotFound(
        f"no version is named {name!r}; expected 'latest', a number such as v3 or RUN:v3, a channel ({channels}), "
        f"a tag, or at least 6 hexadecimal characters of an id"
    )
