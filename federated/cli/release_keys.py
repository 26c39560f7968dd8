"""``fedpeft release keys``, ``rotate`` and ``revoke``: what is done with the offline keys.

Each is noted in the registry's audit log where a registry is named; it works without one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from federated.cli.registry import AsOption, BlobsOption, RegistryOption, open_registry
from federated.cli.release import (
    RELEASES,
    KeysOption,
    PassphraseOption,
    ReleasesOption,
    TrustClockOption,
    key_ring,
    noted,
    publisher_of,
)
from federated.cli.tables import say
from federated.errors import ConfigError, ReleaseError

if TYPE_CHECKING:
    from federated.release import Status

__all__ = ["COMMANDS", "app"]

KeyOption = Annotated[
    str | None, typer.Option("--key", metavar="NAME", help="This key of the role alone; default: all of them.")
]

app = typer.Typer(help="Make a repository and its keys, or take in keys from hardware or a KMS.", no_args_is_help=True)


@app.command()
def init(
    channel: Annotated[
        list[str] | None,
        typer.Option("--channel", metavar="NAME", help="Again for more. Default: dev, canary, stable."),
    ] = None,
    signatures: Annotated[
        list[str] | None,
        typer.Option("--signatures", metavar="ROLE=M/N", help="M of N keys must sign. Default: root=2/3, others 1/1."),
    ] = None,
    days: Annotated[
        list[str] | None,
        typer.Option(
            "--days",
            metavar="ROLE=N",
            help="How long a signature lasts. Default: root 365, targets 180, a channel 90, snapshot 14, timestamp 3.",
        ),
    ] = None,
    bins: Annotated[
        int, typer.Option("--bins", metavar="N", help="Hash bins of a large channel, a power of two.")
    ] = 64,
    bins_past: Annotated[
        int, typer.Option("--bins-past", metavar="N", help="Files of a channel from which on it has bins.")
    ] = 40,
    releases: ReleasesOption = RELEASES,
    keys: KeysOption = None,
    passphrase_file: PassphraseOption = None,
    registry: RegistryOption = None,
    blobs: BlobsOption = None,
    name: AsOption = None,
) -> None:
    """Make a repository, and its keys as encrypted files; keys that `keys add` brought are used.

    Afterwards carry keys/root and keys/targets away. Example: fedpeft release keys init --signatures root=1/1
    """
    from federated.release import Plan, Publisher, Quorum

    plan = Plan(
        tuple(channel or Plan.channels),
        {role: Quorum(*_fraction(text, role)) for role, text in _pairs("--signatures", signatures)},
        {role: _number(text, f"--days {role}") for role, text in _pairs("--days", days)},
        bins,
        bins_past,
    )
    ring = key_ring(keys, passphrase_file)
    publisher = Publisher.create(releases, ring, plan)
    held = [label for role in publisher.status().roles for label in role.keys]
    noted(registry, blobs, name, "keys", str(releases), channels=list(plan.channels), keys=held)
    say(f"made {releases}, and in {ring.home}: {', '.join(held)}")
    say(f"give {publisher.trusted_root} to devices; keep {ring.home}/root and {ring.home}/targets offline")


@app.command()
def add(
    key: Annotated[str, typer.Argument(metavar="NAME", help="ROLE-NUMBER, such as root-1.")],
    uri: Annotated[
        str, typer.Option("--uri", metavar="URI", help="Of the signer: hsm:, gcpkms:, awskms:, azurekms: ...")
    ],
    public: Annotated[Path, typer.Option("--public", metavar="FILE", help="The public half, PEM.")],
    keys: KeysOption = None,
) -> None:
    """Take in a key whose private half is in hardware (PKCS#11) or a cloud's KMS, before `init` or `rotate`.

    Example: fedpeft release keys add root-1 --uri "hsm:2?label=token" --public root-1.pub.pem
    """
    from federated.release.roles import group_of

    role, _, number = key.rpartition("-")
    if not role or not number.isdigit():
        raise ConfigError(f"{key!r} names no key; expected ROLE-NUMBER, such as root-1 or stable-1")
    try:
        pem = public.read_bytes()
    except OSError as error:
        raise ReleaseError(f"cannot read {public}: {error.strerror}") from error
    ring = key_ring(keys, None)
    made = ring.add(key, group_of(role), uri=uri, public_pem=pem)
    say(f"{key} ({made.keyid[:8]}) is at {uri}")


def rotate(
    role: Annotated[str, typer.Argument(metavar="ROLE", help="root, targets, snapshot, timestamp or a channel.")],
    key: KeyOption = None,
    releases: ReleasesOption = RELEASES,
    keys: KeysOption = None,
    passphrase_file: PassphraseOption = None,
    trust_clock: TrustClockOption = False,
    registry: RegistryOption = None,
    blobs: BlobsOption = None,
    name: AsOption = None,
) -> None:
    """Replace a role's keys by new ones, as planned; what they signed stays, signed by the new ones.

    Example: fedpeft release rotate stable --keys keys --keys /media/targets
    """
    publisher = publisher_of(releases, keys, passphrase_file, trust_clock=trust_clock)
    names = publisher.rotate(role, key=key)
    noted(registry, blobs, name, "rotate", role, replaced=key or "all", keys=names)
    say(f"{role} is signed by {', '.join(names)} now")


def revoke(
    role: Annotated[str | None, typer.Argument(metavar="[ROLE]", help="Whose keys somebody else may have.")] = None,
    key: KeyOption = None,
    version: Annotated[
        str | None, typer.Option("--version", metavar="VERSION", help="A version's id, or its name in the registry.")
    ] = None,
    floor: Annotated[
        int | None, typer.Option("--floor", metavar="N", help="Set the security floor itself, also to a lower one.")
    ] = None,
    adapter: Annotated[str, typer.Option("--adapter", metavar="NAME", help="Whose floor; for --floor.")] = "",
    releases: ReleasesOption = RELEASES,
    keys: KeysOption = None,
    passphrase_file: PassphraseOption = None,
    trust_clock: TrustClockOption = False,
    registry: RegistryOption = None,
    blobs: BlobsOption = None,
    name: AsOption = None,
) -> None:
    """Replace stolen keys of a role (a channel is emptied), or raise the security floor above a version.

    Examples: fedpeft release revoke timestamp, fedpeft release revoke --version v7
    """
    if sum(one is not None for one in (role, version, floor)) != 1:
        raise ConfigError("name one thing to revoke: a ROLE, --version VERSION or --floor N")
    publisher = publisher_of(releases, keys, passphrase_file, trust_clock=trust_clock)
    if role is not None:
        names = publisher.revoke(role, key=key)
        noted(registry, blobs, name, "revoke", role, replaced=key or "all", keys=names)
        say(f"{role} is signed by {', '.join(names)} now; a channel is empty until you publish there again")
    elif version is not None:
        version_id = _version_id(version, registry, blobs)
        least = publisher.revoke_version(version_id)
        noted(registry, blobs, name, "revoke", version_id, security_floor=least)
        say(f"release counters below {least} are refused from now on{_stranded(publisher.status())}")
    elif floor is not None:
        publisher.set_floor(floor, adapter_id=adapter)
        noted(registry, blobs, name, "revoke", adapter, security_floor=floor)
        say(f"adapter {adapter!r}: release counters below {floor} are refused{_stranded(publisher.status())}")


COMMANDS: dict[str, Callable[..., None]] = {"rotate": rotate, "revoke": revoke}
"""Of ``fedpeft release`` itself."""


def _version_id(version: str, registry: str | None, blobs: str | None) -> str:
    if len(version) == 64:
        return version
    with open_registry(registry, blobs) as store:
        return store.get(version).version_id


def _stranded(found: Status) -> str:
    names = ", ".join(one.name for one in found.channels if one.revoked)
    return f"; devices refuse what is on {names}: publish a newer version there" if names else ""


def _pairs(option: str, texts: list[str] | None) -> list[tuple[str, str]]:
    pairs = [text.partition("=") for text in texts or ()]
    wrong = [text for text, (role, _, value) in zip(texts or (), pairs, strict=True) if not (role and value)]
    if wrong:
        raise ConfigError(f"{option} {wrong[0]!r}; expected ROLE=VALUE")
    return [(role, value) for role, _, value in pairs]


def _fraction(text: str, role: str) -> tuple[int, int]:
    threshold, _, keys = text.partition("/")
    return _number(threshold, f"--signatures {role}"), _number(keys, f"--signatures {role}")


def _number(text: str, what: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{what} is {text!r}; expected a whole number (signatures: M/N, such as 2/3)")
    return int(text)
