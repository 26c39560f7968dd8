"""A deployment's numbers for Prometheus, from an overview: the server's side, with the bytes of each device.

Names and units are listed in docs/observability.md. Labels are names of devices, runs, channels and reason codes; their
number is bounded where they are gathered. Called by `federated.deployment.status_page`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from federated.deployment.overview_records import Overview, RunView

__all__ = ["CONTENT_TYPE", "metrics_text"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def metrics_text(view: Overview) -> bytes:
    """All numbers in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Numbers(view))
    return generate_latest(registry)


class _Numbers(Collector):
    def __init__(self, view: Overview) -> None:
        self._view = view

    def collect(self) -> Iterable[Metric]:
        """The numbers of the overview."""
        yield from _deployment(self._view)
        yield from _devices(self._view)
        yield from _runs(self._view.runs)


def _gauge(name: str, said: str, labels: Iterable[str], rows: Iterable[tuple[list[str], float]]) -> Metric:
    family = GaugeMetricFamily(f"fedpeft_{name}", said, labels=list(labels))
    for values, number in rows:
        family.add_metric(values, number)
    return family


def _counter(name: str, said: str, labels: Iterable[str], rows: Iterable[tuple[list[str], float]]) -> Metric:
    family = CounterMetricFamily(f"fedpeft_{name}", said, labels=list(labels))
    for values, number in rows:
        family.add_metric(values, number)
    return family


def _deployment(view: Overview) -> Iterator[Metric]:
    yield _gauge("up", "1 while the process manager answers", (), [([], float(view.up))])
    yield _gauge(
        "process_up",
        "1 for a process that runs",
        ["process"],
        [([one.name], float(one.state == "RUNNING")) for one in view.processes],
    )
    yield _gauge(
        "process_uptime_seconds",
        "Seconds that a process has run",
        ["process"],
        [([one.name], one.seconds) for one in view.processes],
    )
    yield _gauge(
        "devices", "Devices by state", ["state"], [([key], count) for key, count in view.devices_by_state.items()]
    )
    yield _gauge("invitations_open", "Invitations that can be used", (), [([], view.invitations)])
    both = [(["up"], view.bytes_up), (["down"], view.bytes_down)]
    yield _counter("door_bytes", "Bytes of bodies through the door", ["direction"], both)
    yield _counter(
        "door_refused_requests", "Requests for what the door does not pass", (), [([], view.refused_at_door)]
    )
    strange = "Requests under keys that the SuperLink did not let in"
    yield _counter("door_strange_requests", strange, (), [([], view.strange_requests)])
    yield _gauge("faults", "Sources of the overview that cannot be read", (), [([], len(view.faults))])
    yield _gauge(
        "channel_info",
        "1 for the version that a channel points at",
        ["channel", "version"],
        [([one.name, one.version_id], 1) for one in view.channels if one.version_id],
    )


def _devices(view: Overview) -> Iterator[Metric]:
    devices = view.devices
    yield _counter(
        "device_wire_bytes",
        "Bytes of bodies through the door by device: up is from the device",
        ["client_id", "direction"],
        [
            row
            for one in devices
            for row in (([one.client_id, "up"], one.bytes_up), ([one.client_id, "down"], one.bytes_down))
        ],
    )
    yield _counter(
        "device_requests", "Requests at the door", ["client_id"], [([one.client_id], one.requests) for one in devices]
    )
    yield _gauge(
        "device_last_seen_timestamp_seconds",
        "Time of a device's last request at the door",
        ["client_id"],
        [([one.client_id], one.last_seen) for one in devices if one.last_seen is not None],
    )
    yield _counter(
        "device_updates",
        "Updates of a device that were good",
        ["client_id"],
        [([one.client_id], one.updates) for one in devices],
    )
    yield _counter(
        "device_refusals",
        "Updates of a device that were refused, failed or late, by reason code",
        ["client_id", "reason"],
        [([one.client_id, key], count) for one in devices for key, count in one.refusals.items()],
    )
    yield _counter(
        "device_not_now",
        "Times that a device said that it does not train now, by its owner's condition",
        ["client_id", "condition"],
        [([one.client_id, key], count) for one in devices for key, count in one.not_now.items()],
    )


def _runs(runs: Iterable[RunView]) -> Iterator[Metric]:
    runs = list(runs)
    ended = [(run, run.last_round) for run in runs if run.last_round is not None]
    yield _gauge("run_info", "1 for a run's state", ["run", "state"], [([run.name, run.state], 1) for run in runs])
    done = [([run.name], run.rounds_done) for run in runs]
    yield _gauge("run_rounds_done", "Newest round that made a version", ["run"], done)
    yield _gauge("run_rounds", "Rounds that a run shall have", ["run"], [([run.name], run.rounds) for run in runs])
    tries = [([run.name], run.attempts) for run in runs]
    yield _gauge("run_attempts", "Times that a run was submitted", ["run"], tries)
    yield _gauge(
        "run_last_event_timestamp_seconds",
        "Time of the last thing that a run said",
        ["run"],
        [([run.name], run.last_event) for run in runs if run.last_event is not None],
    )
    yield _gauge(
        "round_seconds", "Length of the last round", ["run"], [([run.name], last.seconds) for run, last in ended]
    )
    yield _gauge(
        "round_participants", "Good updates of the last round", ["run"],
        [([run.name], last.participants) for run, last in ended],
    )  # fmt: skip
    yield _gauge("round_cohort", "Clients asked in the last round", ["run"],
                 [([run.name], last.cohort) for run, last in ended])  # fmt: skip
    yield _gauge(
        "run_held_out",
        "Held-out metrics as the last round's clients measured them",
        ["run", "metric"],
        [([run.name, key], value) for run, last in ended for key, value in list(last.evaluation.items())[:20]],
    )
    yield _gauge(
        "run_epsilon",
        "Epsilon spent, at target_delta, for each unit",
        ["run", "unit", "target_delta"],
        [
            ([run.name, one.unit, f"{one.target_delta:g}"], float("inf") if one.epsilon is None else one.epsilon)
            for run in runs
            for one in run.accounts
        ],
    )
    yield _counter(
        "run_refusals",
        "Updates that were refused, failed or late, by reason code",
        ["run", "reason"],
        [([run.name, key], count) for run in runs for key, count in run.refusals.items()],
    )
