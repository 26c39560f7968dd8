"""How a deployment stands, as plain records: what the status page, the metrics and ``deploy status`` are made from.

Counts, names, states and times. Privacy: no example, no adapter and no client's own words are in them: of a refusal
its code alone. `federated.deployment.overview` fills them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = [
    "FORMAT",
    "Account",
    "ChannelView",
    "DeviceView",
    "Overview",
    "ProcessView",
    "RoundView",
    "RunView",
    "VersionView",
]

FORMAT = 1
"""Of the JSON; a key that means something else has another number here, one that is new has not."""

Counts = Mapping[str, int]


@dataclass(frozen=True)
class ProcessView:
    """A process that the manager keeps.

    Args:
        name: its name here.
        state: ``RUNNING``, ``STARTING``, ``BACKOFF``, ``STOPPED``, ``EXITED`` or ``FATAL``.
        pid: 0 when it does not run.
        seconds: that it has run.
    """

    name: str
    state: str
    pid: int
    seconds: float


@dataclass(frozen=True)
class DeviceView:
    """A device.

    Args:
        client_id: its name.
        state: ``pending``, ``approved`` or ``revoked``; ``unknown`` where nobody enrols.
        last_seen: seconds since the epoch of its last request at the door; None before the first.
        bytes_up: of the bodies that it sent through the door, in all runs and between them.
        bytes_down: of those that it got.
        requests: how many it made.
        last_round: of the newest run that it gave an update to; 0 for none.
        updates: good ones, in all runs.
        refusals: by reason code, in all runs.
        not_now: by condition of its owner: how often it said that it does not train now.
        app: digest of the app bundle that it has pinned, or ``unpinned``, by its own word; empty before it joined.
    """

    client_id: str
    state: str
    last_seen: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    requests: int = 0
    last_round: int = 0
    updates: int = 0
    refusals: Counts = field(default_factory=dict)
    not_now: Counts = field(default_factory=dict)
    app: str = ""


@dataclass(frozen=True)
class Account:
    """What was spent of privacy.

    Args:
        unit: whose presence is hidden: ``example`` or ``client``.
        epsilon: spent until now; None: no bound holds.
        target_delta: the probability beside it.
        target_epsilon: what may be spent; None for no bound.
        private: False for repeatable noise of a test.
    """

    unit: str
    epsilon: float | None
    target_delta: float
    target_epsilon: float | None = None
    private: bool = True


@dataclass(frozen=True)
class RoundView:
    """A round that has ended.

    Args:
        round_number: 1-based.
        published: whether it made a version.
        version_id: of the global adapter after it.
        participants: good updates.
        cohort: clients that were asked.
        seconds: that it took.
        bytes_up: of clients' packets, before transport.
        bytes_down: of the packets to them.
        train_loss: mean over the good updates.
        evaluation: held-out metrics of the adapter that the round began with, where clients measured it.
    """

    round_number: int
    published: bool
    version_id: str
    participants: int
    cohort: int
    seconds: float
    bytes_up: int
    bytes_down: int
    train_loss: float | None
    evaluation: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunView:
    """A run.

    Args:
        name: on this deployment.
        run_id: as the versions say it; empty before it began.
        state: ``waiting`` (nothing heard of it yet), ``running``, ``completed``, ``failed``, ``interrupted``,
            ``stopped``, ``gave up`` (the keeper resumes it no more) or ``down`` (not ended, and no process runs).
        message: why it ended, or what it last warned of.
        method: rule and server optimizer.
        attempts: how often it was submitted.
        submitted: seconds since the epoch.
        last_event: likewise; None before the first.
        rounds: that it shall have; 0 before it said so.
        rounds_done: newest round that made a version.
        current_round: under way; 0 for none.
        cohort: clients asked in it, or in the last one.
        answered: of these, who has answered in the round under way.
        last_round: None before the first.
        history: ``[round, train_loss, held-out loss]`` of the newest rounds, for a line; values may be None.
        accounts: what was spent, one for each unit.
        not_protected: what no account covers, in words.
        refusals: by reason code.
        refusals_by_client: by client, then by reason code.
        not_now: by client, then by condition.
        problems: nodes that took no part, by reason code.
    """

    name: str
    run_id: str
    state: str
    message: str
    method: str
    attempts: int
    submitted: float
    last_event: float | None
    rounds: int
    rounds_done: int
    current_round: int
    cohort: Sequence[str]
    answered: int
    last_round: RoundView | None
    history: Sequence[tuple[int, float | None, float | None]]
    accounts: Sequence[Account]
    not_protected: Sequence[str]
    refusals: Counts
    refusals_by_client: Mapping[str, Counts]
    not_now: Mapping[str, Counts]
    problems: Counts


@dataclass(frozen=True)
class VersionView:
    """A version of the registry.

    Args:
        version_id: digest of its record.
        name: ``RUN:vN``.
        created_at: ISO 8601, UTC.
        channels: that point at it.
        participants: clients whose updates are in it.
        servable: whether a device can serve it.
    """

    version_id: str
    name: str
    created_at: str
    channels: Sequence[str]
    participants: int
    servable: bool


@dataclass(frozen=True)
class ChannelView:
    """A channel and the version that it points at; empty for none."""

    name: str
    version_id: str


@dataclass(frozen=True)
class Overview:
    """A deployment at one moment.

    Args:
        at: seconds since the epoch.
        federation: its name.
        door: how devices call it.
        secured: TLS, authentication of devices and signatures.
        up: whether the process manager answers.
        processes: what it keeps.
        devices: in order of name, at most a thousand.
        devices_by_state: all of them.
        devices_left_out: beyond the thousand.
        invitations: that can still be used.
        bytes_up: through the door, by whomever.
        bytes_down: likewise.
        strange_requests: requests at the door under keys that the SuperLink did not let in.
        refused_at_door: requests for what the door does not pass.
        runs: the newest first, at most fifty.
        runs_left_out: beyond the fifty.
        versions: the newest first, at most ten.
        channels: by name.
        faults: what could not be read, and why.
    """

    at: float
    federation: str
    door: str
    secured: bool
    up: bool
    processes: Sequence[ProcessView]
    devices: Sequence[DeviceView]
    devices_by_state: Counts
    devices_left_out: int
    invitations: int
    bytes_up: int
    bytes_down: int
    strange_requests: int
    refused_at_door: int
    runs: Sequence[RunView]
    runs_left_out: int
    versions: Sequence[VersionView]
    channels: Sequence[ChannelView]
    faults: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with its format's number."""
        return {"format": FORMAT, **asdict(self)}
