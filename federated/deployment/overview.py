"""How a deployment stands, gathered from what its processes wrote down: Flower is asked nothing.

    process manager's socket   processes
    devices.db                 devices and invitations
    traffic.json               bytes at the door, by the key that a device proves itself with
    runs/*.json, runs/*/metrics.jsonl   runs, rounds, refusals, what was spent of privacy
    registry/                  versions and channels

Whatever cannot be read is named among the faults, and the rest is shown: an overview is looked at when something is
wrong. Called by `federated.deployment.operating` for the status page, and by ``fedpeft deploy status``.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from federated.deployment.devices import DeviceBook
from federated.deployment.keys import read_node_key
from federated.deployment.layout import Layout
from federated.deployment.overview_records import (
    ChannelView,
    DeviceView,
    Overview,
    ProcessView,
    RunView,
    VersionView,
)
from federated.deployment.processes import NotUp, Processes
from federated.deployment.run_feed import RunFeed
from federated.deployment.runs import Runs
from federated.deployment.server_config import ServerConfig
from federated.deployment.traffic import STRANGERS
from federated.errors import FederatedError

if TYPE_CHECKING:
    from federated.registry import Registry

__all__ = ["Gatherer", "traffic_key"]

_MOST_DEVICES = 1_000
_MOST_RUNS = 50
_MOST_VERSIONS = 10
_LONGEST = 300
_Found = TypeVar("_Found")
_Flows = Mapping[str, Mapping[str, Any]]
_Known = Mapping[str, tuple[str, str]]
_Published = tuple[list[VersionView], list[ChannelView]]


def traffic_key(node_line: str) -> str:
    """The name under which the door counts a device's bytes.

    It is the SHA-256 of the key as Flower's nodes send it with each request: PEM of the SubjectPublicKeyInfo.

    Args:
        node_line: OpenSSH line of the device's node key.

    Raises:
        DeploymentError: if it is none.
    """
    pem = read_node_key(node_line).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


class Gatherer:
    """Gathers overviews of one deployment; one that is kept reads of each run what is new. Threads take turns.

    Args:
        layout: of the deployment.
        config: of the deployment.
        clock: seconds since the epoch.
    """

    def __init__(self, layout: Layout, config: ServerConfig, *, clock: Callable[[], float] = time.time) -> None:
        self._layout = layout
        self._config = config
        self._clock = clock
        self._runs = Runs(layout, config)
        self._feeds: dict[str, RunFeed] = {}
        self._keys: dict[str, str] = {}
        self._registry: Registry | None = None
        self._seen: tuple[tuple[int, int], ...] = ()
        self._published: _Published = [], []
        self._faults: list[str] = []
        self._turn = threading.Lock()

    def overview(self) -> Overview:
        """The deployment now."""
        with self._turn:
            return self._overview()

    def close(self) -> None:
        """Let go of the registry."""
        if self._registry is not None:
            self._registry.close()
            self._registry = None

    def _overview(self) -> Overview:
        self._faults = []
        not_up: tuple[list[ProcessView], bool] = [], False
        processes, up = self._tried("the process manager", self._processes, not_up)
        feeds = self._read_runs(up)
        views = [feeds[name] for name in reversed(feeds)]
        no_flows: tuple[_Flows, int] = {}, 0
        flows, refused = self._tried("traffic.json", self._traffic, no_flows)
        nobody: tuple[_Known, int] = {}, 0
        known, invitations = self._tried("the book of devices", self._book, nobody)
        devices = self._devices(known, flows)
        nothing: _Published = [], []
        versions, channels = self._tried("the registry", self._versions, nothing)
        return Overview(
            at=self._clock(),
            federation=self._config.name,
            door=self._config.url,
            secured=not self._config.insecure,
            up=up,
            processes=processes,
            devices=devices[:_MOST_DEVICES],
            devices_by_state=dict(Counter(one.state for one in devices)),
            devices_left_out=max(0, len(devices) - _MOST_DEVICES),
            invitations=invitations,
            bytes_up=sum(_whole(flow.get("up")) for flow in flows.values()),
            bytes_down=sum(_whole(flow.get("down")) for flow in flows.values()),
            strange_requests=_whole(flows.get(STRANGERS, {}).get("requests")),
            refused_at_door=refused,
            runs=views[:_MOST_RUNS],
            runs_left_out=max(0, len(views) - _MOST_RUNS),
            versions=versions,
            channels=channels,
            faults=tuple(self._faults),
        )

    def _tried(self, what: str, work: Callable[[], _Found], otherwise: _Found) -> _Found:
        try:
            return work()
        except (FederatedError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            said = str(error) if isinstance(error, FederatedError) else f"{type(error).__name__}: {error}"
            self._faults.append(f"{what}: {said}"[:_LONGEST])
            return otherwise

    def _processes(self) -> tuple[list[ProcessView], bool]:
        """Not up is no fault: on a server, systemd keeps the processes."""
        try:
            states = Processes(self._layout).states()
        except NotUp:
            return [], False
        return [ProcessView(one.name, one.state, one.pid, round(one.since, 1)) for one in states], True

    def _read_runs(self, up: bool) -> dict[str, RunView]:
        """Every run's view, the oldest first."""
        found = {}
        for path in sorted(self._layout.runs.glob("*.json")):
            view = self._tried(f"run {path.stem}", partial(self._run, path.stem, up=up), None)
            if view is not None:
                found[path.stem] = view
        return dict(sorted(found.items(), key=lambda item: item[1].submitted))

    def _run(self, name: str, *, up: bool) -> RunView | None:
        submission = self._runs.submission(name)
        feed = self._feeds.setdefault(name, RunFeed(self._runs.folder(name) / "metrics.jsonl"))
        feed.read()
        if feed.damaged:
            self._faults.append(f"run {name}: {feed.damaged} lines of {feed.path} are damaged and left out")
        return feed.view(submission, up=up or self._kept_elsewhere())

    def _kept_elsewhere(self) -> bool:
        """Whether another manager keeps the processes: then nothing here says that they are down."""
        return not self._layout.supervisor_config.is_file()

    def _traffic(self) -> tuple[_Flows, int]:
        try:
            found = json.loads(self._layout.traffic.read_text())
        except FileNotFoundError:
            return {}, 0
        return dict(found["flows"]), int(found["refused"])

    def _book(self) -> tuple[_Known, int]:
        """State and node key of each name's newest entry, and how many invitations are open."""
        if self._config.insecure or not self._layout.devices_db.is_file():
            return {}, 0
        book = DeviceBook(self._layout.folder, clock=lambda: datetime.fromtimestamp(self._clock(), UTC))
        known = {one.client_id: (str(one.state), one.node_key) for one in book.devices()}
        return known, len(book.open_invitations())

    def _key(self, line: str) -> str:
        if line not in self._keys:
            self._keys[line] = traffic_key(line)
        return self._keys[line]

    def _devices(self, known: _Known, flows: _Flows) -> list[DeviceView]:
        feeds = list(self._feeds.values())
        names = sorted(
            known.keys()
            | {name for feed in feeds for name in (*feed.updates, *feed.apps, *feed.refusals, *feed.not_now)}
        )
        return [self._device(name, *known.get(name, ("unknown", "")), flows, feeds) for name in names]

    def _device(self, name: str, state: str, line: str, flows: _Flows, feeds: Iterable[RunFeed]) -> DeviceView:
        flow = flows.get(self._key(line), {}) if line else {}
        feeds = list(feeds)
        rounds = [feed.last_rounds[name] for feed in feeds if name in feed.last_rounds]
        return DeviceView(
            client_id=name,
            state=state,
            last_seen=float(flow["last"]) if flow.get("last") else None,
            bytes_up=_whole(flow.get("up")),
            bytes_down=_whole(flow.get("down")),
            requests=_whole(flow.get("requests")),
            app=next((feed.apps[name] for feed in reversed(feeds) if name in feed.apps), ""),
            last_round=rounds[-1] if rounds else 0,
            updates=sum(feed.updates.get(name, 0) for feed in feeds),
            refusals=_summed(feed.refusals.get(name, {}) for feed in feeds),
            not_now=_summed(feed.not_now.get(name, {}) for feed in feeds),
        )

    def _versions(self) -> _Published:
        """The newest versions and all channels, read again when the database has changed."""
        from federated.registry import Registry

        database = self._layout.registry / "registry.db"
        if not database.is_file():
            return [], []
        seen = tuple(_stamp(path) for path in (database, Path(f"{database}-wal")))
        if self._registry is None:
            self._registry = Registry.open(self._layout.registry, create=False, actor="status")
        elif seen == self._seen:
            return self._published
        records = reversed(self._registry.versions(newest=_MOST_VERSIONS))
        views = [
            VersionView(
                version_id=one.version_id,
                name=f"{one.manifest.run_id}:v{one.number}",
                created_at=one.created_at.isoformat(timespec="seconds"),
                channels=one.channels,
                participants=one.manifest.participants,
                servable=one.manifest.servable,
            )
            for one in records
        ]
        channels = [ChannelView(one.name, one.version_id or "") for one in self._registry.channel_states()]
        self._seen, self._published = seen, (views, channels)
        return self._published


def _summed(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)


def _whole(value: Any) -> int:
    return int(value) if isinstance(value, int | float) else 0


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_mtime_ns, found.st_size
