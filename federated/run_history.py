"""What a run's events add up to: rounds, clients, baselines and what the device did.

`federated.report` draws it. Nothing here reads files or formats text; missing events leave missing values (None), so
that a run that was interrupted after one round has a history too.

Round k's event measures the adapter that the round *started* from. `History.held_out` puts every measurement where it
belongs: 0 is the adapter before the first round, k the global adapter after round k.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

__all__ = ["ClientSummary", "History", "history_of", "mean_detail", "metric_names", "result_warning"]

Event = Mapping[str, Any]
_NOT_METRICS = frozenset({"loss", "num_examples", "version_id", "labelled", "not_finite"})


@dataclass(frozen=True)
class ClientSummary:
    """One client over the whole run.

    Args:
        client_id: its stable name.
        num_examples: training examples behind its last good update.
        rounds: rounds with a good update.
        missed: reason code to number of rounds, for updates that were refused, failed or came late.
        not_now: condition of its owner to how often it said "not now" because of it.
        train_loss: of its last good update.
        evaluation: the last measurement of a global adapter on its held-out data.
        bytes_up: sent, in all rounds.
        bytes_down: received, in all rounds.
        seconds: mean over good rounds.
        baselines: baseline name to this client's evaluation.
    """

    client_id: str
    num_examples: int | None
    rounds: int
    missed: Mapping[str, int]
    not_now: Mapping[str, int]
    train_loss: float | None
    evaluation: Event | None
    bytes_up: int
    bytes_down: int
    seconds: float | None
    baselines: Mapping[str, Event]


@dataclass
class History:
    """The events of one run, sorted by what they are about.

    Args:
        run: the ``run`` event; empty when there is none.
        rounds: round number to its ``round`` event, the last one where a resumed run repeated it.
        cohorts: round number to the clients asked, from ``round_start``.
        client_events: (round number, client id) to the ``client`` event.
        held_out: 0 or a finished round's number to the evaluation of the global adapter after it.
        baselines: name to its ``baseline`` event.
        joined: clients that came, also those that nothing was asked of.
        not_now: ``not_now`` events, in order: a client takes no part for the moment, by its owner's conditions.
        final: the ``final`` event, if the run came so far.
        activations: what the device activated, in order.
        answers: what the device answered, in order.
        end: the ``end`` event, if there is one.
        started: seconds since the epoch of the first event.
        stopped: and of the last.
    """

    run: Event = field(default_factory=dict)
    rounds: dict[int, Event] = field(default_factory=dict)
    cohorts: dict[int, Sequence[str]] = field(default_factory=dict)
    client_events: dict[tuple[int, str], Event] = field(default_factory=dict)
    held_out: dict[int, Event] = field(default_factory=dict)
    baselines: dict[str, Event] = field(default_factory=dict)
    joined: set[str] = field(default_factory=set)
    not_now: list[Event] = field(default_factory=list)
    final: Event | None = None
    activations: list[Event] = field(default_factory=list)
    answers: list[Event] = field(default_factory=list)
    end: Event | None = None
    started: float | None = None
    stopped: float | None = None

    @property
    def last_round(self) -> int:
        """The highest finished round; 0 when none is."""
        return max(self.rounds, default=0)

    @property
    def final_evaluation(self) -> Event | None:
        """The evaluation of the newest global adapter that was measured."""
        if self.final and self.final.get("evaluation"):
            return dict(self.final["evaluation"])
        return self.held_out[max(self.held_out)] if self.held_out else None

    @property
    def final_share(self) -> float:
        """Share of the clients that measured the last adapter."""
        return float((self.final or {}).get("share", 1.0))

    @property
    def clients(self) -> list[ClientSummary]:
        """One summary per client, by name."""
        names = {client_id for _, client_id in self.client_events}
        names |= {str(event["client_id"]) for event in self.not_now}
        names |= {name for baseline in self.baselines.values() for name in baseline.get("detail") or {}}
        return [self._summary(name) for name in sorted(names)]

    def _summary(self, client_id: str) -> ClientSummary:
        events = [event for (_, name), event in sorted(self.client_events.items()) if name == client_id]
        good = [event for event in events if event.get("status") == "ok"]
        last = good[-1] if good else {}
        missed: dict[str, int] = {}
        for event in events:
            if event.get("status") not in ("ok", "not_now"):
                reason = str(event.get("reason") or event.get("status"))
                missed[reason] = missed.get(reason, 0) + 1
        measured = [event["evaluation"] for event in events if event.get("evaluation")]
        times = _known(good, "seconds")
        return ClientSummary(
            client_id=client_id,
            num_examples=last.get("num_examples"),
            rounds=len(good),
            missed=missed,
            not_now=Counter(str(event["condition"]) for event in self.not_now if event["client_id"] == client_id),
            train_loss=last.get("train_loss"),
            evaluation=measured[-1] if measured else None,
            bytes_up=int(sum(_known(events, "bytes_up"))),
            bytes_down=int(sum(_known(events, "bytes_down"))),
            seconds=fmean(times) if times else None,
            baselines={
                name: baseline["detail"][client_id]
                for name, baseline in self.baselines.items()
                if client_id in (baseline.get("detail") or {})
            },
        )

    def bytes_per_client(self, direction: str) -> float | None:
        """Mean bytes of one good client in one round; ``direction`` is ``"up"`` or ``"down"``."""
        good = [event for event in self.client_events.values() if event.get("status") == "ok"]
        sizes = _known(good, f"bytes_{direction}")
        return fmean(sizes) if sizes else None


def history_of(events: Iterable[Event]) -> History:
    """Sort events into a history; when a folder holds several runs, the last one counts."""
    history = History()
    for event in events:
        if event.get("event") == "run" and history.run and event.get("run_id") != history.run.get("run_id"):
            history = History()
        _take(history, event)
        moment = event.get("time")
        history.started = moment if history.started is None else history.started
        history.stopped = moment
    for number in sorted(history.rounds):
        if evaluation := history.rounds[number].get("evaluation"):
            history.held_out[number - 1] = evaluation
    if history.final and history.final.get("evaluation"):
        history.held_out[history.last_round] = history.final["evaluation"]
    return history


def _take(history: History, event: Event) -> None:
    match event.get("event"):
        case "run":
            history.run, history.end = event, None
        case "round_start":
            history.cohorts[int(event["round_number"])] = list(event.get("cohort") or ())
        case "client":
            history.client_events[int(event["round_number"]), str(event["client_id"])] = event
        case "round":
            history.rounds[int(event["round_number"])] = event
            history.final = None
        case "final":
            history.final = event
        case "joined":
            history.joined.add(str(event["client_id"]))
        case "baseline":
            history.baselines[str(event["name"])] = event
        case "activation" | "answer" | "not_now" as kind:
            lists = {"activation": history.activations, "answer": history.answers, "not_now": history.not_now}
            lists[str(kind)].append(event)
        case "end":
            history.end = event


def rule_figures(history: History) -> list[str]:
    """What the rule reported of itself in any round, in the order of its first mention; staleness is not its own."""
    names = dict.fromkeys(name for event in history.rounds.values() for name in event.get("rule") or {})
    return [name for name in names if not name.startswith("staleness")]


def result_warning(history: History) -> str:
    """What to tell of a run that made its adapter worse; empty for any other run.

    The held-out loss before round 1 is compared with that after the last round, each pooled over the clients that were
    asked. Where those were others, as with sampled cohorts and in buffered rounds, the two losses are of different
    examples, and only one that is twice the other says something. Clients send no loss that is not finite.
    """
    start, final = history.held_out.get(0, {}), history.final or {}
    before, after = start.get("loss"), (final.get("evaluation") or {}).get("loss")
    if before is None or not final:
        return ""
    if after is None and (final.get("refused") or final.get("not_now")):  # they may be why
        return ""
    if after is None:
        return f"the held-out loss of the last adapter is not finite, at the start it was {before:.6g}{_ADVICE}"
    asked, now = start.get("num_examples"), final["evaluation"].get("num_examples")
    same = asked == now and history.final_share == 1.0
    if after <= (before if same else _CLEARLY * before):
        return ""
    others = f" (on {asked:.0f} examples, {now:.0f} at the end)" if asked and now and asked != now else ""
    found = f"held-out loss {after:.6g}, at the start {before:.6g}{others}"
    return f"the last adapter is worse than the initial one: {found}{_ADVICE}"


_CLEARLY = 2.0
_ADVICE = "; lower train.learning_rate, take fewer steps per round, or serve an earlier version"


def metric_names(history: History) -> list[str]:
    """Names of the metrics beside the loss that any evaluation has; accuracy or perplexity first."""
    evaluations = [*history.held_out.values(), *(event.get("evaluation") or {} for event in history.baselines.values())]
    names = {
        str(name)
        for evaluation in evaluations
        for name, value in evaluation.items()
        if name not in _NOT_METRICS and isinstance(value, int | float) and not isinstance(value, bool)
    }
    return sorted(names, key=lambda name: (name not in ("accuracy", "perplexity"), name))


def mean_detail(baseline: Event, metric: str) -> float | None:
    """A metric of a baseline: its own evaluation's, else the plain mean over its clients."""
    value = (baseline.get("evaluation") or {}).get(metric)
    if value is not None:
        return float(value)
    values = _known(list((baseline.get("detail") or {}).values()), metric)
    return fmean(values) if values else None


def _known(events: Sequence[Event], key: str) -> list[float]:
    return [event[key] for event in events if event.get(key) is not None]
