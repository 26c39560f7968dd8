"""The Rule protocol: how many updates become one, with explicit state and no knowledge of Flower or a clock.

A strategy calls, each round and phase: `Rule.plan` for every client of the cohort, `Rule.start`, then
`Accumulator.add` for each good update as it arrives, and `Accumulator.finish`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from federated.delta import Update
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, TrainPlan
from federated.state import AdapterState, RuleState, Tensors

__all__ = ["Accumulator", "ClientView", "NextPhase", "Result", "Rule", "RuleProperties"]


@dataclass(frozen=True)
class RuleProperties:
    """What a rule is, as data: combinations are checked from these before anything starts.

    Args:
        exactness: ``exact``, ``truncation`` (optimal), or ``approximate`` by design.
        space: ``factor`` or ``product``.
        linear: a sum of messages, which client-level DP and secure aggregation need.
        mixed_ranks: clients may hold different ranks.
        needs_individual_updates: must see updates one beside the other (robust rules).
        phases: exchanges in a round, when nobody is lost between them.
        needs_lora: works on LoRA's factors; without it adapters that have none will do as well, averaged as they are.
        own_payloads: clients of one rank may be sent different adapters.
        residual: keeps a frozen residual, which goes down whole in each round.
        adapter: the kind of LoRA that it works on.
        personal: clients keep a part of the model (`TrainPlan.kept`); no version can be served.
        fixed_space: yields a mean delta in a space that does not move, which server optimizers need.
        alternates: asks for other tensors from round to round, so that what is kept of one round (noise that the next
            one goes on from) does not fit the next.
        averages: what all clients hold alike, and one client's own result, become their weighted mean; False for a
            rule that steps beyond it (FedDyn).
        plain_sgd: clients must train by SGD without momentum, in steps of one size.
        asynchronous: whether an update may go into another version than the next after the one that it started from.
            ``any``: into later ones too, since all are relative to the same (`federated.aggregation.basis`).
            ``same_basis``: no, each version has a basis of its own, but rounds need no fixed cohort.
            ``no``: rounds need one; also for rules of which nobody showed that they do not.
        paper: where it was published.
        gauge: what another basis of the same update, ``(B Q, Q^-1 A)``, does to the result: nothing (``immune``); it
            cannot be sent, because one factor is frozen and not in the update (``refused``); or it changes it
            (``exposed``).
        robust: withstands some hostile clients. Each client counts once, whatever it claims, and dense tensors take
            the rule's own statistic in place of the mean.
        min_updates: fewest updates of one round that it can combine.
        min_updates_why: the same as a formula, for messages.
        memory: what it holds while a round runs, in words.
        mean_decides: what it makes of a round depends on the updates through their mean alone, not on who sent them,
            how many there were or what they weigh: noise on the sum then covers all of it (client-level privacy).
    """

    exactness: Literal["exact", "truncation", "approximate"]
    space: Literal["factor", "product"]
    linear: bool
    mixed_ranks: bool = False
    needs_individual_updates: bool = False
    phases: int = 1
    needs_lora: bool = True
    own_payloads: bool = False
    residual: bool = False
    adapter: Literal["lora", "lora_xs"] = "lora"
    personal: bool = False
    fixed_space: bool = True
    alternates: bool = False
    averages: bool = True
    plain_sgd: bool = False
    asynchronous: Literal["any", "same_basis", "no"] = "no"
    paper: str = ""
    gauge: Literal["immune", "refused", "exposed"] = "exposed"
    robust: bool = False
    min_updates: int = 1
    min_updates_why: str = ""
    memory: str = "one update"
    mean_decides: bool = False


@dataclass(frozen=True)
class ClientView:
    """What a rule may know of a client when it plans: its name and its declared capacity.

    Args:
        client_id: stable name.
        rank: the largest rank that it trains, at most the adapter's; None means the adapter's.
    """

    client_id: str
    rank: int | None = None


@dataclass(frozen=True)
class Result:
    """What a finished accumulation yields.

    Args:
        mean_delta: weighted mean of the deltas in float64, for the server optimizer (rules in a fixed space).
        state: the next global state, for rules that compute it themselves; exactly one of the two is set.
        rule_state: the rule's memory for the next round; None keeps it.
        participants: updates that went in.
        total_weight: sum of their weights.
        metrics: what the rule reports of itself.
        servable: False where clients hold the rest of the model.
    """

    mean_delta: Tensors | None = None
    state: GlobalState | None = None
    rule_state: RuleState | None = None
    participants: int = 0
    total_weight: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    servable: bool = True


@dataclass(frozen=True)
class NextPhase:
    """The round goes on with another exchange with the clients whose updates were good.

    Args:
        state: what the next phase plans from; its rule state may hold what clients need then.
        phase: above the one that ended. A rule that lost a client which it needs starts over with a further phase.
    """

    state: GlobalState
    phase: int


@runtime_checkable
class Accumulator(Protocol):
    """One phase's running aggregate: one update in memory at a time unless the rule says otherwise."""

    def add(self, update: Update, weight: float) -> None:
        """Take in one admitted update.

        Args:
            update: delta with exactly the global adapter's names and shapes.
            weight: > 0; number of examples, or 1 when clients count equally.

        Raises:
            AggregationError: if the update cannot be combined; the aggregate is unchanged.
        """
        ...

    def finish(self) -> NextPhase | Result:
        """Close the phase.

        Raises:
            NotEnoughUpdates: if nothing was added.
        """
        ...


@runtime_checkable
class Rule(Protocol):
    """A published aggregation method."""

    @property
    def name(self) -> str:
        """As a config names it."""
        ...

    @property
    def properties(self) -> RuleProperties:
        """What it is and what it goes with."""
        ...

    def init(self, spec: AdapterSpec) -> RuleState:
        """The rule's memory before the first round."""
        ...

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        """What this client is asked to do, and the adapter that it starts from."""
        ...

    def start(self, state: GlobalState, phase: int) -> Accumulator:
        """A fresh accumulator for one phase."""
        ...
