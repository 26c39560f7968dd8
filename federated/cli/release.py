"""``fedpeft release``: publish signed versions, keep them fresh, and bundle them for devices without a network.

What is published is what the registry's channel points at: who may promote, and with whose approval, is settled there.
Keys are `federated.cli.release_keys`' business; `federated.cli.release_look` only reads.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from federated.cli.passphrases import Passphrases
from federated.cli.probes import AppOption, ProbesOption, ProbeToleranceOption, measured
from federated.cli.registry import AsOption, BlobsOption, RegistryOption, open_registry
from federated.cli.release_variants import (
    DiffFromOption,
    HeldOutOption,
    ToleranceOption,
    VariantsOption,
    add_variants,
)
from federated.cli.tables import say
from federated.errors import ConfigError, ReleaseError

if TYPE_CHECKING:
    from federated.release import KeyRing, Publisher, ReleaseRecord

__all__ = [
    "RELEASES",
    "ChannelArgument",
    "KeysOption",
    "PassphraseOption",
    "ReleasesOption",
    "TrustClockOption",
    "app",
    "key_ring",
    "noted",
    "publisher_of",
    "told",
]

app = typer.Typer(help="Sign versions and publish them as static files that devices can trust.", no_args_is_help=True)

ReleasesOption = Annotated[
    Path, typer.Option("--releases", metavar="DIR", envvar="FEDPEFT_RELEASES", help="Folder of the repository.")
]
KeysOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--keys",
        metavar="DIR",
        help="Folder of keys; again for more, such as a stick. Default: $FEDPEFT_KEYS, else keys.",
    ),
]
PassphraseOption = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        metavar="FILE",
        help="Its first line opens all keys. Default: $FEDPEFT_PASSPHRASE, else a prompt.",
    ),
]
TrustClockOption = Annotated[
    bool, typer.Option("--trust-clock", help="Sign though the last signature seems to be in the future.")
]
ChannelArgument = Annotated[str, typer.Argument(metavar="CHANNEL", help="Such as dev, canary or stable.")]
RELEASES = Path("releases")


def key_ring(keys: list[Path] | None, passphrase_file: Path | None) -> KeyRing:
    """The keys for a command."""
    from federated.release import KeyRing  # TUF and its cryptography take their time

    folders = keys or [Path(os.environ.get("FEDPEFT_KEYS") or "keys")]
    return KeyRing(*folders, passphrase=Passphrases(passphrase_file))


def publisher_of(
    releases: Path, keys: list[Path] | None, passphrase_file: Path | None = None, *, trust_clock: bool = False
) -> Publisher:
    """The publisher for a command."""
    from federated.release import Publisher

    return Publisher(releases, key_ring(keys, passphrase_file), trust_clock=trust_clock)


def noted(registry: str | None, blobs: str | None, name: str | None, action: str, subject: str, **details: Any) -> None:
    """Write a key event into the registry's audit log, where a registry was named; else say that it is in none."""
    if registry is None and not os.environ.get("FEDPEFT_REGISTRY"):
        say("in no audit log: name a registry with --registry, or set FEDPEFT_REGISTRY", stderr=True)
        return
    with open_registry(registry, blobs, name) as store:
        store.audit.note(action, subject, **details)


@app.command()
def publish(
    channel: ChannelArgument,
    file: Annotated[
        list[str] | None,
        typer.Option("--file", metavar="NAME=PATH", help="Release this file with the version; again for more."),
    ] = None,
    probes: ProbesOption = None,
    probe_tolerance: ProbeToleranceOption = 0.02,
    app_dir: AppOption = Path(),
    variants: VariantsOption = "auto",
    held_out: HeldOutOption = None,
    tolerance: ToleranceOption = 0.002,
    diff_from: DiffFromOption = None,
    releases: ReleasesOption = RELEASES,
    keys: KeysOption = None,
    passphrase_file: PassphraseOption = None,
    trust_clock: TrustClockOption = False,
    registry: RegistryOption = None,
    blobs: BlobsOption = None,
    name: AsOption = None,
) -> None:
    """Sign and publish the version that the registry's channel points at, with smaller variants beside it.

    Published before, it is published again: that is a rollback. Example: fedpeft release publish stable --held-out
    held-out.csv --probes inputs.jsonl
    """
    from federated.release import Artefact

    files = dict(_file(one) for one in file or ())
    publisher = publisher_of(releases, keys, passphrase_file, trust_clock=trust_clock)
    with open_registry(registry, blobs, name) as store:
        pointed = store.channels()
        if channel not in pointed:
            raise ReleaseError(
                f"channel {channel!r} of registry {store.location} points nowhere; promote a version first: "
                f"fedpeft channel promote VERSION --to {channel}"
            )
        if probes is not None:
            files |= measured(store, pointed[channel], probes, tolerance=probe_tolerance, app_dir=app_dir)
        artefact = add_variants(
            Artefact.of(store, pointed[channel], files),
            channel,
            variants,
            publisher=publisher,
            registry=store,
            diff_from=diff_from,
            held_out=held_out,
            tolerance=tolerance,
        )
        (record,) = publisher.publish(channel, artefact, audit_head=str(store.audit.head()))
        store.audit.note("release", record.version_id, channel=channel, release_counter=record.release_counter)
    say(f"published on {channel}: {told(record)}")


@app.command()
def rollback(
    channel: ChannelArgument,
    to: Annotated[str, typer.Option("--to", metavar="VERSION_ID", help="A released version's whole id.")],
    releases: ReleasesOption = RELEASES,
    keys: KeysOption = None,
    passphrase_file: PassphraseOption = None,
    trust_clock: TrustClockOption = False,
    registry: RegistryOption = None,
    blobs: BlobsOption = None,
    name: AsOption = None,
) -> None:
    """Point a channel at a version that it has, from the repository alone.

    The registry's channel stays: roll it back too, or the next publish goes forward again. Example: fedpeft release
    rollback stable --to 9f2ab1...
    """
    publisher = publisher_of(releases, keys, passphrase_file, trust_clock=trust_clock)
    record = publisher.rollback(channel, to)
    noted(registry, blobs, name, "release", record.version_id, channel=channel, rollback=True)
    say(f"{channel} points at {told(record)} again")


@app.command()
def renew(
    roles: Annotated[
        list[str] | None, typer.Argument(metavar="[ROLE]...", help="Default: what the online keys must do regularly.")
    ] = None,
    releases: ReleasesOption = RELEASES,
    keys: KeysOption = None,
    passphrase_file: PassphraseOption = None,
    trust_clock: TrustClockOption = False,
) -> None:
    """Sign roles again so that they last; run it daily, without a role, for timestamp and snapshot.

    Example: fedpeft release renew
    """
    publisher = publisher_of(releases, keys, passphrase_file, trust_clock=trust_clock)
    signed = publisher.renew(*roles or ())
    until = {role.name: role.expires for role in publisher.status().roles}
    say(", ".join(f"{name} until {until[name]:%F %H:%M} UTC" for name in signed))


@app.command()
def bundle(
    channel: ChannelArgument,
    into: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder, such as one on a stick.")],
    days: Annotated[
        int, typer.Option("--days", min=0, metavar="N", help="Sign it for so long; needs the online keys.")
    ] = 0,
    releases: ReleasesOption = RELEASES,
    keys: KeysOption = None,
    passphrase_file: PassphraseOption = None,
    trust_clock: TrustClockOption = False,
) -> None:
    """Copy what a device needs to install a channel's version without a network.

    Example: fedpeft release bundle stable /media/stick/releases --days 30
    """
    publisher = publisher_of(releases, keys, passphrase_file, trust_clock=trust_clock)
    made = publisher.bundle(channel, into, days=days)
    say(f"{made.folder}: {told(made.record)}, {made.nbytes} bytes, good until {made.valid_until:%F %H:%M} UTC")


def told(record: ReleaseRecord) -> str:
    """A released version in words."""
    return f"version {record.version_id} (release counter {record.release_counter})"


def _file(text: str) -> tuple[str, bytes]:
    name, _, path = text.partition("=")
    if not path:
        raise ConfigError(f"--file {text!r}; expected NAME=PATH")
    try:
        return name, Path(path).read_bytes()
    except OSError as error:
        raise ReleaseError(f"cannot read {path}: {error.strerror}") from error
