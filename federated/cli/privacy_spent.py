"""``fedpeft privacy spent``: what each version's own record says of its privacy. It only reads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from federated.cli.registry import open_registry
from federated.errors import PrivacyError
from federated.privacy.account import Account, accounts_of

if TYPE_CHECKING:
    from federated.registry import VersionRecord

__all__ = ["run"]

_NONE = "not accounted"


def run(place: str, *, blobs: str | None, as_json: bool, console: Console) -> None:
    """Print the accounts of all versions, newest first.

    Args:
        place: a run's folder, or a registry's folder or URL.
        blobs: folder or URL of the bytes, for a URL.
        as_json: one JSON object in place of tables.
        console: where tables go.

    Raises:
        RegistryError: if there is no registry.
    """
    with open_registry(_registry_of(place), blobs) as store:
        records = list(reversed(store.versions()))
    if as_json:
        print(json.dumps({"versions": [_plain(record) for record in records]}, allow_nan=False))
    else:
        _show(records, console)


def _registry_of(place: str) -> str:
    """A run's folder holds its registry; anything else is one."""
    below = Path(place) / "registry"
    if "://" in place or not below.is_dir():
        return place
    return str(below)


def _accounts(record: VersionRecord) -> tuple[Account, ...] | str:
    """A version's accounts, or in words why there are none."""
    try:
        return accounts_of(record.manifest.privacy) or _NONE
    except PrivacyError as error:
        return f"cannot be read: {error}"


def _show(records: Iterable[VersionRecord], console: Console) -> None:
    table = Table("version", "unit", "epsilon", "target_delta", "accountant", "neighbouring", "sampling", "private")
    not_protected: list[str] = []
    for record in records:
        name, accounts = f"v{record.number}", _accounts(record)
        if isinstance(accounts, str):
            table.add_row(name, accounts)
            continue
        for account in accounts:
            cells = (
                account.unit,
                _number(account.epsilon),
                f"{account.target_delta:g}",
                account.accountant,
                account.neighbouring,
                account.sampling,
                "yes" if account.private else "NO: test seed",
            )
            table.add_row(name, *cells)
            not_protected += [words for words in account.not_protected if words not in not_protected]
    console.print(table, markup=False)
    if not_protected:
        console.print(f"not protected: {'; '.join(not_protected)}", markup=False, highlight=False, soft_wrap=True)


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "no bound"


def _plain(record: VersionRecord) -> dict[str, Any]:
    accounts = _accounts(record)
    said = {"accounts": [], "why": accounts} if isinstance(accounts, str) else _listed(accounts)
    return {"version": record.number, "version_id": record.version_id, "run": record.manifest.run_id, **said}


def _listed(accounts: tuple[Account, ...]) -> dict[str, Any]:
    return {"accounts": [account.to_dict() for account in accounts], "why": None}
