"""Flower's list of SuperNodes, kept in step with the book of devices.

A SuperLink with node authentication lets in the keys that were registered with it. Flower's command answers with a node
id and does not list keys, so the book remembers which id belongs to which device. Flower never takes a key again that
was unregistered, nor does the book.

`sync_nodes` may be called at any time and as often as one likes: when the SuperLink has started, and after each
approval and revocation. Called by `federated.cli.deploy_devices`, and by whoever starts the SuperLink.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from federated.deployment.devices import Device, DeviceBook
from federated.deployment.flwr_command import (
    CONNECTION,
    FlowerLink,
    KeyTaken,
    live_nodes,
    register_node,
    unregister_node,
)
from federated.errors import DeploymentError

__all__ = ["CONNECTION", "FlowerLink", "Synced", "live_nodes", "register_node", "sync_nodes", "unregister_node"]


@dataclass(frozen=True)
class Synced:
    """What `sync_nodes` did.

    Args:
        registered: names of devices that Flower knows since.
        unregistered: names of devices that it let in before.
        strangers: ids of nodes that Flower lets in and the book does not know: somebody registered them by hand.
    """

    registered: tuple[str, ...]
    unregistered: tuple[str, ...]
    strangers: tuple[str, ...]


def sync_nodes(book: DeviceBook, link: FlowerLink, *, actor: str) -> Synced:
    """Register what is approved, unregister what is revoked, and note in the book what Flower said.

    Processes take turns. What a kill left half done is found again: a node that came while the answer to a
    registration was lost is that device's.

    Args:
        book: says who is approved.
        link: to the SuperLink.
        actor: for the book's log.

    Raises:
        DeploymentError: if the SuperLink cannot be asked, or does not take a device's key; what was done is noted, the
            other devices are seen to, and the same call does the rest.
    """
    with _one_at_a_time(link):
        live = live_nodes(link)
        _settle(book, live, actor=actor)
        gone = [one for one in book.devices() if one.state == "revoked" and one.node_id]
        ended = [one.client_id for one in gone if _ended(book, link, one, live=live, actor=actor)]
        strangers = live - {one.node_id for one in [*book.devices(), *gone]}
        waiting = [one for one in book.devices() if one.state == "approved" and one.node_id not in live]
        refused = [one for one in waiting if not _begun(book, link, one, strangers=strangers, actor=actor)]
    if refused:
        raise DeploymentError(
            f"the SuperLink has or had the key of {', '.join(one.client_id for one in refused)} under an id that the "
            "book does not know: revoke the device, and invite it again into a new folder"
        )
    return Synced(tuple(one.client_id for one in waiting), tuple(ended), tuple(sorted(strangers)))


def _settle(book: DeviceBook, live: set[str], *, actor: str) -> None:
    """Finish a registration whose answer was lost with the process that asked.

    Raises:
        DeploymentError: if more than one node has come since.
    """
    devices = book.devices()
    strangers = live - {one.node_id for one in devices}
    for device in devices:
        if device.registering is None:
            continue
        came = sorted(strangers - set(device.registering))
        if len(came) > 1:
            raise DeploymentError(
                f"{device.client_id} is registered as one of the nodes {', '.join(came)}, and its id was lost: "
                "unregister those that are not its ('flwr supernode unregister'), and try again"
            )
        book.note_node(device.number, came[0] if came else "", actor=actor)


def _begun(book: DeviceBook, link: FlowerLink, device: Device, *, strangers: set[str], actor: str) -> bool:
    """Register a device; whether the SuperLink took its key."""
    book.note_registering(device.number, strangers)
    with TemporaryDirectory(dir=link.home) as folder:
        file = Path(folder) / "node.pub"
        file.write_text(f"{device.node_key}\n", encoding="ascii")
        try:
            node_id = register_node(link, file, name=device.client_id)
        except KeyTaken:
            node_id = ""
    book.note_node(device.number, node_id, actor=actor)
    return bool(node_id)


def _ended(book: DeviceBook, link: FlowerLink, device: Device, *, live: set[str], actor: str) -> bool:
    """End a revoked device's node; whether it was let in until now."""
    was_live = device.node_id in live
    if was_live:
        unregister_node(link, device.node_id)
    book.note_node(device.number, "", actor=actor)
    return was_live


@contextmanager
def _one_at_a_time(link: FlowerLink) -> Iterator[None]:
    path = link.home / "nodes.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise DeploymentError(
            f"cannot open {path}: {error.strerror}; start the deployment once with 'fedpeft deploy up'"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
