"""One round's book: who was asked, what came back, and why something was not taken.

Every member of the cohort ends with exactly one outcome: ``ok``, ``refused`` (came, and failed a check), ``failed``
(the client said that it could not), ``late``, or ``not_now`` (a condition of its owner does not hold: it counts as if
it had not been asked). One bad client never ends a round.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import Message

from federated.delta import Update
from federated.errors import UpdateRejected, WireError
from federated.flower.declined import NOT_NOW, Declined
from federated.flower.records import Reply
from federated.manifest import TensorLayout, TrainPlan
from federated.state import AdapterState, from_raw
from federated.uploads import unpack
from federated.wire import Expectation, Limits, admit, bad_positions

__all__ = ["Outcome", "RoundBook", "evaluation_of", "not_now", "pooled_evaluation", "refusals", "whole_round"]

_LOG = logging.getLogger(__name__)

_EVALUATION = "eval_before_"


@dataclass(frozen=True)
class Outcome:
    """What became of one client in one round."""

    client_id: str
    status: str
    reason: str | None = None
    message: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    num_examples: int = 0
    update_norm: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    counter: int = 0
    ledger_head: str = ""
    declined: Declined | None = None

    def as_event(self, round_number: int) -> dict[str, Any]:
        """The ``client`` event of the run's metrics."""
        condition = {"condition": self.declined.condition} if self.declined else {}
        return {
            "event": "client",
            "round_number": round_number,
            "client_id": self.client_id,
            "status": self.status,
            "reason": self.reason,
            "message": self.message,
            "num_examples": self.num_examples,
            "train_loss": self.metrics.get("train_loss"),
            "seconds": round(self.seconds, 3),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "update_norm": self.update_norm,
            "evaluation": evaluation_of(self.metrics),
            **condition,
        }

    def as_refusal(self) -> dict[str, Any]:
        """Who and why, for a round's list of refusals."""
        return {"client_id": self.client_id, "reason": self.reason, "message": self.message}

    @property
    def is_refusal(self) -> bool:
        """Whether something went wrong: neither a good update nor a client that takes no part now."""
        return self.status not in ("ok", NOT_NOW)


def refusals(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """Those with which something went wrong, and what."""
    return [outcome.as_refusal() for outcome in outcomes if outcome.is_refusal]


def not_now(outcomes: Iterable[Outcome]) -> dict[str, str]:
    """Clients that take no part now, by name: which condition of their owner does not hold."""
    return {outcome.client_id: outcome.declined.condition for outcome in outcomes if outcome.declined}


def evaluation_of(metrics: Mapping[str, float]) -> dict[str, float] | None:
    """The evaluation that a client made before training, or None."""
    found = {key.removeprefix(_EVALUATION): value for key, value in metrics.items() if key.startswith(_EVALUATION)}
    return found if found.get("num_examples", 0) > 0 and "loss" in found else None


def pooled_evaluation(outcomes: list[Outcome]) -> dict[str, float] | None:
    """Example-weighted mean of the good clients' evaluations, over the metrics that all of them report."""
    found = [value for outcome in outcomes if outcome.status == "ok" and (value := evaluation_of(outcome.metrics))]
    if not found:
        return None
    shared = set.intersection(*(set(value) for value in found)) - {"num_examples"}
    total = sum(value["num_examples"] for value in found)
    pooled = {key: sum(value[key] * value["num_examples"] for value in found) / total for key in sorted(shared)}
    return {**pooled, "num_examples": total}


def whole_round(phases: Sequence[RoundBook]) -> list[Outcome]:
    """What became of each client in all exchanges of a round together, by client id.

    The last exchange that it was asked in decides; bytes add up, and what it reported before stays reported.
    """
    made: dict[str, Outcome] = {}
    for book in phases:
        for outcome in book.close():
            before = made.get(outcome.client_id)
            made[outcome.client_id] = outcome if before is None else _after(before, outcome)
    return [made[client_id] for client_id in sorted(made)]


def _after(before: Outcome, outcome: Outcome) -> Outcome:
    return replace(
        outcome,
        metrics={**before.metrics, **outcome.metrics},
        num_examples=outcome.num_examples or before.num_examples,
        bytes_up=before.bytes_up + outcome.bytes_up,
        bytes_down=before.bytes_down + outcome.bytes_down,
        ledger_head=outcome.ledger_head or before.ledger_head,
    )


class RoundBook:
    """Admits replies and remembers every outcome.

    Args:
        round_number: 1-based.
        expected: what each client's envelope must say; its keys are the cohort.
        nodes: node id of each client.
        layouts: the exact tensors of each client's update.
        payloads: the adapter that each client was sent.
        plans: what each was asked to do with it.
        limits: of size and norm.
        bytes_down: size of the packet that each client was sent.
        evaluate_only: no update is expected, only metrics.
        steps: optimizer steps that so many examples take.
    """

    def __init__(
        self,
        round_number: int,
        *,
        expected: Mapping[str, Expectation],
        nodes: Mapping[str, int],
        layouts: Mapping[str, TensorLayout],
        payloads: Mapping[str, AdapterState],
        plans: Mapping[str, TrainPlan],
        limits: Limits,
        bytes_down: Mapping[str, int],
        evaluate_only: bool = False,
        steps: Callable[[int], int] = lambda _: 1,
    ) -> None:
        self.round_number = round_number
        self.outcomes: list[Outcome] = []
        self._expected = expected
        self._clients = {node: client for client, node in nodes.items()}
        self._layouts = layouts
        self._payloads = payloads
        self._plans = plans
        self._limits = limits
        self._bytes_down = bytes_down
        self._evaluate_only = evaluate_only
        self._steps = steps
        self._replies: dict[str, Reply] = {}
        self._started = time.monotonic()

    @property
    def cohort(self) -> list[str]:
        """The clients that were asked."""
        return sorted(self._expected)

    def quorum(self, share: float) -> int:
        """Good updates that make so large a share of those that were asked and did not say "not now"."""
        return math.ceil(share * (len(self._expected) - len(not_now(self.outcomes))) - 1e-9)

    @property
    def seconds(self) -> float:
        """Time since the round was opened."""
        return time.monotonic() - self._started

    def receive(self, message: Message) -> Update | None:
        """Admit one reply; returns its update, or None when there is none to take (the outcome says why)."""
        client_id = self._clients.get(message.metadata.src_node_id)
        if client_id is None or any(outcome.client_id == client_id for outcome in self.outcomes):
            _LOG.warning("round %d: dropped a reply that nobody was asked for, or a second one", self.round_number)
            return None
        if message.has_error():
            self._note(client_id, "failed", reason=f"error_{message.error.code}", message=_short(message.error.reason))
            return None
        try:
            return self._admit(client_id, message)
        except UpdateRejected as error:
            self._note(client_id, "refused", reason=error.reason, message=_short(Exception.__str__(error)))
        except WireError as error:
            self._note(client_id, "refused", reason="bad_encoding", message=_short(str(error)))
        return None

    def reject(self, client_id: str, error: Exception, *, reason: str = "not_combinable") -> None:
        """Take back an ``ok``: the update cannot be combined."""
        self.outcomes = [outcome for outcome in self.outcomes if outcome.client_id != client_id]
        self._note(client_id, "refused", reason=reason, message=_short(str(error)))

    def close(self) -> list[Outcome]:
        """Mark whoever is missing as late; returns all outcomes, by client id."""
        for client_id in sorted(set(self._expected) - {outcome.client_id for outcome in self.outcomes}):
            self._note(client_id, "late", reason="deadline", message="no reply before the round's deadline")
        return sorted(self.outcomes, key=lambda outcome: outcome.client_id)

    def _admit(self, client_id: str, message: Message) -> Update | None:
        reply = Reply.from_message(message)
        if reply.declined is not None:
            self._note(client_id, NOT_NOW, reason=NOT_NOW, message=reply.message, declined=reply.declined)
            return None
        if reply.reason is not None:
            self._note(client_id, "failed", reason=reply.reason, message=reply.message)
            return None
        self._replies[client_id] = reply
        self._check_claim(client_id, reply)
        if self._evaluate_only:
            self._check_token(client_id, reply)
            self._note(client_id, "ok", metrics=reply.metrics)
            return None
        if reply.packet is None:
            raise UpdateRejected("bad_encoding", "the reply holds no packet", client_id=client_id)
        expected, layout = self._expected[client_id], self._layouts[client_id]
        admitted = admit(reply.packet, expected, layout=layout, limits=self._limits)
        envelope, received = admitted.envelope, self._payloads[client_id]
        try:
            delta = unpack(self._plans[client_id], received, from_raw(admitted.tensors))
        except WireError as error:
            raise bad_positions(str(error), client_id) from None
        zero = "zero_update" if admitted.norm == 0 else None
        self._note(
            client_id,
            "ok",
            reason=zero,
            message="the update is zero everywhere: the client learnt nothing" if zero else None,
            metrics=reply.metrics,
            num_examples=envelope.num_examples,
            update_norm=admitted.norm,
            bytes_up=len(reply.packet),
            counter=envelope.counter,
        )
        return Update(
            client_id=client_id,
            delta=delta,
            num_examples=envelope.num_examples,
            round_number=self.round_number,
            payload_digest=envelope.payload_digest,
            metrics=reply.metrics,
            received=received,
            steps=self._steps(envelope.num_examples),
        )

    def _check_claim(self, client_id: str, reply: Reply) -> None:
        """Evaluated examples are weights of the pooled evaluation, as training examples are of the mean."""
        found, most = reply.metrics.get(f"{_EVALUATION}num_examples", 0), self._expected[client_id].max_examples
        if found > most:
            message = f"evaluated {found:.0f} examples, at most {most} are accepted"
            raise UpdateRejected("bad_num_examples", message, client_id=client_id)

    def _check_token(self, client_id: str, reply: Reply) -> None:
        if reply.task_token != self._expected[client_id].task_token:
            raise UpdateRejected("bad_token", "the reply answers another task", client_id=client_id)

    def _note(self, client_id: str, status: str, **details: Any) -> None:
        down = self._bytes_down.get(client_id, 0)
        reply = self._replies.get(client_id)
        if reply is not None:  # what was charged was charged, whether the update is taken or not
            details["ledger_head"] = reply.ledger_head
            if status == "refused" and "epsilon" in reply.metrics:
                details["metrics"] = {"epsilon": reply.metrics["epsilon"]}
        self.outcomes.append(Outcome(client_id, status, bytes_down=down, seconds=self.seconds, **details))


def _short(text: str | None, limit: int = 300) -> str:
    flat = " ".join((text or "").split())
    return flat if len(flat) <= limit else f"{flat[: limit - 3]}..."
