"""Tags inside a transaction: names that people give to versions. A tag never moves, and keeps its version from gc."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from federated.errors import RegistryError
from federated.registry.access import Transaction
from federated.registry.names import check_tag_name
from federated.registry.schema import ChannelRow, TagRow, VersionRow

__all__ = ["tag", "tags_of", "untag"]


def tags_of(session: Session) -> dict[str, str]:
    """Every tag and the id of its version, by name."""
    return {row.name: row.version_id for row in session.scalars(select(TagRow).order_by(TagRow.name))}


def tag(work: Transaction, row: VersionRow, name: str) -> None:
    """Give a version a name; the same again changes nothing.

    Raises:
        RegistryError: if the name is malformed, a channel's, or another version has it.
    """
    check_tag_name(name)
    if work.session.get(ChannelRow, name) is not None:
        raise RegistryError(f"{name!r} is a channel, and a tag does not move; choose another name")
    there = work.session.get(TagRow, name)
    if there is None:
        work.session.add(TagRow(name=name, version_id=row.version_id, tagged_at=work.at))
        work.note("tag", name, version_id=row.version_id)
    elif there.version_id != row.version_id:
        raise RegistryError(
            f"the tag {name!r} is at {there.version_id} and does not move; choose another name, or remove it first "
            f"(fedpeft registry tag --remove {name})"
        )


def untag(work: Transaction, name: str) -> None:
    """Take a name away; its version stays until gc finds that nothing else needs it.

    Raises:
        RegistryError: if there is no such tag.
    """
    there = work.session.get(TagRow, name)
    if there is None:
        raise RegistryError(f"there is no tag {name!r}; the tags are: {', '.join(tags_of(work.session)) or 'none'}")
    work.session.delete(there)
    work.note("untag", name, version_id=there.version_id)
