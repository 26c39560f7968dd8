"""One buffer of updates on its way to a version: admits what arrives for it, weighs it by its age, and combines it.

    mean_delta = sum_i p_i s(tau_i) delta_i,    p_i = weight_i / sum_j weight_j,    s(tau) = 1 / (1 + tau)^a

``tau_i`` is how many versions were published between the one that client i was sent and the buffer's. It talks to no
client and knows no clock: `federated.flower.buffered` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from flwr.app import Message

from federated.aggregation import Accumulator, Result
from federated.config import RoundConfig
from federated.delta import Update
from federated.errors import AggregationError, NotEnoughUpdates
from federated.flower.round_book import Outcome, RoundBook

__all__ = ["Buffer", "Task", "staleness_weight"]


def staleness_weight(policy: RoundConfig, tau: int) -> float:
    """``s(tau)``: 1 when constant, else ``1 / (1 + tau)^a``; exactly 1 for a fresh update.

    >>> staleness_weight(RoundConfig(staleness_exponent=0.5), 3)
    0.5
    """
    return 1.0 if policy.staleness == "constant" else 1.0 / (1.0 + tau) ** policy.staleness_exponent


@dataclass(frozen=True)
class Task:
    """What one client was asked to train.

    Args:
        client_id: who.
        book: what its reply must say; holds this client alone.
        version: versions published before the one that it was sent.
        basis: of the version that it was sent (`federated.aggregation.basis`).
        end: when it is late, on the caller's clock.
    """

    client_id: str
    book: RoundBook
    version: int
    basis: str
    end: float


class Buffer:
    """The updates of one round.

    Args:
        number: of the round, 1-based.
        policy: its size, and how stale an update may be.
        accumulator: of the rule, for the version that the round starts from.
        version: versions published before that one.
        basis: of that version.
        weighted: updates weigh by their examples, or 1 each.

    Attributes:
        number: of the round.
        basis: of the version that it starts from.
        outcomes: client id to what became of its task; a client has one in a round.
    """

    def __init__(
        self,
        number: int,
        policy: RoundConfig,
        accumulator: Accumulator,
        *,
        version: int,
        basis: str,
        weighted: bool,
    ) -> None:
        self.number = number
        self.basis = basis
        self.outcomes: dict[str, Outcome] = {}
        self._policy = policy
        self._accumulator = accumulator
        self._version = version
        self._weighted = weighted
        self._fresh: set[str] = set()
        self._staleness: list[int] = []
        self._weights: list[tuple[float, float]] = []  # before and after the discount

    @property
    def is_full(self) -> bool:
        """Whether enough good updates are in it."""
        return len(self._staleness) >= self._policy.buffer

    @property
    def closed(self) -> list[Outcome]:
        """All outcomes, by client id."""
        return [self.outcomes[client_id] for client_id in sorted(self.outcomes)]

    @property
    def measured(self) -> list[Outcome]:
        """Of those clients that were sent the version that the round starts from, by client id."""
        return [outcome for outcome in self.closed if outcome.client_id in self._fresh]

    def staleness_of(self, task: Task) -> int:
        """``tau`` of a task's update in this buffer."""
        return self._version - task.version

    def receive(self, task: Task, message: Message) -> Outcome:
        """Admit a client's reply and put its update in, unless it came too late for that."""
        update = task.book.receive(message)
        if update is not None:
            self._take(task, update)
        return self.settle(task)

    def settle(self, task: Task) -> Outcome:
        """Close a client's turn in this round: what became of its task, late when it gave no answer."""
        (outcome,) = task.book.close()
        self.outcomes[task.client_id] = outcome
        if self.staleness_of(task) == 0:
            self._fresh.add(task.client_id)
        return outcome

    def result(self) -> Result | AggregationError:
        """The rule's result, its mean divided by the undiscounted weights; or why there is none."""
        if not self._staleness:
            return NotEnoughUpdates("no good update")
        try:
            found = self._accumulator.finish()
        except AggregationError as error:
            return error
        if not isinstance(found, Result):
            return AggregationError(f"the rule asks for phase {found.phase}, and a buffer has one phase")
        full, discounted = (math.fsum(column) for column in zip(*self._weights, strict=True))
        mean, share = found.mean_delta, discounted / full
        if mean is not None and share != 1.0:
            mean = {name: tensor * share for name, tensor in mean.items()}
        mean_age, most = sum(self._staleness) / len(self._staleness), max(self._staleness)
        ages = {"staleness_mean": mean_age, "staleness_max": float(most)}
        return replace(found, mean_delta=mean, metrics={**found.metrics, **ages})

    def _take(self, task: Task, update: Update) -> None:
        tau = self.staleness_of(task)
        fault = self._too_old(task, tau)
        if fault is not None:
            reason, why = fault
            error = AggregationError(f"trained from a version {tau} versions back: {why}")
            task.book.reject(task.client_id, error, reason=reason)
            return
        weight = float(update.num_examples) if self._weighted else 1.0
        discounted = weight * staleness_weight(self._policy, tau)
        try:
            self._accumulator.add(update, discounted)
        except AggregationError as error:
            task.book.reject(task.client_id, error)
            return
        self._staleness.append(tau)
        self._weights.append((weight, discounted))

    def _too_old(self, task: Task, tau: int) -> tuple[str, str] | None:
        """Reason code and text, where an update belongs to a version that the buffer's has left behind."""
        if task.basis != self.basis:
            return "stale_basis", "what that version held still, or let train, is no longer the same"
        if tau > self._policy.max_staleness:
            return "too_stale", f"at most {self._policy.max_staleness} are accepted (round.max_staleness)"
        return None
