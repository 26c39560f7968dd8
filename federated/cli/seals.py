"""Seals of exported folders: ``fedpeft release keys make`` and ``check-seal``, and the key of ``export --seal KEY``."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from federated.cli.passphrases import Passphrases
from federated.cli.release import KeysOption, PassphraseOption, key_ring
from federated.cli.tables import say
from federated.errors import ConfigError, ReleaseError

if TYPE_CHECKING:
    from federated.release.dsse import SealKey

__all__ = ["COMMANDS", "KEY_COMMANDS", "seal_key"]

_GROUP = "seal"


def seal_key(key: str, keys: list[Path] | None, passphrase_file: Path | None) -> SealKey:
    """The key that a command line names: a PEM file where there is one, else a key of the ring."""
    from federated.release.dsse import SealKey

    if Path(key).is_file():
        return SealKey.of_file(Path(key), Passphrases(passphrase_file))
    return SealKey.of_ring(key_ring(keys, passphrase_file), key)


def make(
    key: Annotated[str, typer.Argument(metavar="NAME", help="Such as seal.")],
    keys: KeysOption = None,
    passphrase_file: PassphraseOption = None,
) -> None:
    """Make a key that seals exported folders (ECDSA on P-256), as an encrypted file.

    Example: fedpeft release keys make seal
    """
    from federated.release.disk import translated, write_file
    from federated.release.dsse import PublicKey

    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,63}", key):
        raise ConfigError(f"{key!r} names no key; expected up to 64 characters of a-z, 0-9 and -")
    ring = key_ring(keys, passphrase_file)
    made = PublicKey(ring.make(key, _GROUP, sealing=True))
    public = ring.home / _GROUP / f"{key}.pub.pem"
    with translated("write the public half"):
        write_file(public, made.pem)
    say(f"made key {key} ({made.hint[:12]}) in {ring.home / _GROUP}; give {public} to those who check seals")


def check_seal(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A sealed folder, from anywhere.")],
    public: Annotated[Path, typer.Option("--public", metavar="FILE", help="The public half of the key, PEM.")],
) -> None:
    """Say whether a folder is what was sealed, and where it came from.

    Example: fedpeft release check-seal support-adapter --public seal.pub.pem
    """
    from federated.release.disk import translated
    from federated.release.dsse import PublicKey
    from federated.release.seal import check_seal as check

    with translated("read the public key"):
        key = PublicKey.of_pem(public.read_bytes(), str(public))
    try:
        found = check(folder, key)
    except ReleaseError as error:
        raise type(error)(f"refused, {type(error).__name__}: {error}") from error
    say(f"{folder} is as key {key.hint[:12]} sealed it: {len(found.files)} files")
    for name, value in found.facts.items():
        say(f"{name}: {value}")


COMMANDS: dict[str, Callable[..., None]] = {"check-seal": check_seal}
"""Of ``fedpeft release``."""

KEY_COMMANDS: dict[str, Callable[..., None]] = {"make": make}
"""Of ``fedpeft release keys``."""
