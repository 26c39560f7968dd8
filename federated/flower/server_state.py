"""The server between and within rounds: global state, optimizer moments, counters, and the id of the last version.

Mutable on purpose, and the only mutable thing of a strategy that a version's training state must restore.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace

import torch
from flwr.app import ArrayRecord

from federated import server_optimizers
from federated.aggregation import Result, Rule
from federated.config import ServerOptimizerConfig
from federated.delta import is_finite, norm, subtract
from federated.errors import AggregationError
from federated.flower.publisher import TrainingState
from federated.flower.round_book import Outcome
from federated.flower.selection import Standing
from federated.global_state import GlobalState
from federated.residual import folded
from federated.state import AdapterState, Tensors

__all__ = ["ServerState"]

_RESIDUAL = "residual:"


class ServerState:
    """What the server needs to go on.

    Args:
        initial: the adapter before round 1; a float32 master copy is kept.
        rule: initialises its memory.
        optimizer: server optimizer.
        parent: id of the version that ``initial`` is; None for a fresh adapter.

    Attributes:
        global_state: master copy and rule memory.
        finished: the last round that was closed.
        version_id: id of the version that holds the global adapter; None before the first is published.
        parent: of the first version.
        counters: last message counter of each client.
        standings: what earlier rounds taught about each client, for its selection.
        at_work: clients in training while the last version was made (buffered rounds).
        epsilons: what each client says that it has spent on its examples' privacy.
        ledger_heads: the last head of each client's privacy ledger, as it was told: acknowledged with the next task.
    """

    def __init__(
        self, initial: AdapterState, *, rule: Rule, optimizer: ServerOptimizerConfig, parent: str | None = None
    ) -> None:
        self.global_state = GlobalState(initial.cast("F32"), rule_state=rule.init(initial.spec))
        self.finished = 0
        self.version_id: str | None = None
        self.parent = parent
        self.counters: dict[str, int] = {}
        self.standings: dict[str, Standing] = {}
        self.at_work: tuple[str, ...] = ()
        self.epsilons: dict[str, float] = {}
        self.ledger_heads: dict[str, str] = {}
        self._optimizer = optimizer
        self._moments = server_optimizers.init(optimizer, self.adapter)

    @property
    def adapter(self) -> AdapterState:
        """The float32 master copy of the global adapter."""
        return self.global_state.adapter

    def arrays(self) -> ArrayRecord:
        """The global adapter as named float32 arrays (copies), the residual's under ``residual:<name>``."""
        named = {**self.adapter.tensors, **self._residual_arrays()}
        return ArrayRecord(torch_state_dict=OrderedDict((name, tensor.clone()) for name, tensor in named.items()))

    def adopt(self, arrays: ArrayRecord) -> None:
        """Take over the arrays that Flower hands in, when they differ from the adapter held here.

        A residual's arrays may be left out, and may not differ: without its spec nothing could be made of them.

        Raises:
            AggregationError: if names or shapes differ, a value is not finite, or a residual is not the one held here.
        """
        named = arrays.to_torch_state_dict()
        self._check_residual({name: one for name, one in named.items() if name.startswith(_RESIDUAL)})
        tensors = {name: tensor.float() for name, tensor in named.items() if not name.startswith(_RESIDUAL)}
        if not is_finite(tensors):
            raise AggregationError("the arrays handed in hold values that are not finite")
        if norm(subtract(tensors, self.adapter.tensors)) > 0:
            self.global_state = replace(self.global_state, adapter=AdapterState(self.adapter.spec, tensors))

    def _check_residual(self, found: Tensors) -> None:
        held = self._residual_arrays()
        if found and not (found.keys() == held.keys() and all(torch.equal(found[name], held[name]) for name in held)):
            raise AggregationError(
                "the arrays handed in hold another residual than this run's: go on from the saved version instead "
                "(fedpeft simulate --resume), or leave out the arrays that begin with residual:"
            )

    def _residual_arrays(self) -> Tensors:
        residual = self.global_state.residual
        return {f"{_RESIDUAL}{name}": tensor for name, tensor in residual.tensors.items()} if residual else {}

    def apply(self, result: Result) -> float:
        """Move by a rule's result; returns the L2 norm of the move.

        Raises:
            AggregationError: for a result that does not fit, or one that would not be finite on a
                device; the state is then unchanged.
        """
        before = self.adapter
        state, moments = result.state or self.global_state, self._moments
        if result.mean_delta is not None:
            gradient = {name: -tensor for name, tensor in result.mean_delta.items()}
            adapter, moments = server_optimizers.step(self._optimizer, self._moments, before, pseudo_gradient=gradient)
            state = replace(state, adapter=adapter)
        served = folded(state.materialise()).cast(state.adapter.spec.dtype)
        if not (is_finite(served.tensors) and (served.residual is None or is_finite(served.residual.tensors))):
            found = f"the round would take the adapter beyond {state.adapter.spec.dtype}"
            raise AggregationError(f"{found}: bound what one client may send with round.max_norm, or lower rates")
        self.global_state, self._moments = replace(state, rule_state=result.rule_state or state.rule_state), moments
        return norm(subtract(self.adapter.tensors, before.tensors))

    def note(self, outcomes: Iterable[Outcome]) -> None:
        """Remember of a finished round who answered, with how many examples, and from which privacy ledger.

        Who said "not now" is as available as before: its owner decides, and it is asked again when it says.
        """
        for outcome in outcomes:
            if outcome.declined:
                continue
            if outcome.ledger_head:
                self.ledger_heads[outcome.client_id] = outcome.ledger_head
            before = self.standings.get(outcome.client_id, Standing())
            good = outcome.status == "ok"
            self.standings[outcome.client_id] = before.after(good=good, examples=outcome.num_examples)

    def note_spent(self, outcomes: Iterable[Outcome]) -> None:
        """Remember what clients say that they have spent, and never less than before.

        An update counts whether a version comes of it or not: whoever sees it has it. Who sends one and names no
        epsilon has no bound; of a refused one that names none nothing is known.
        """
        for outcome in outcomes:
            if outcome.status != "ok" and "epsilon" not in outcome.metrics:
                continue
            found = outcome.metrics.get("epsilon", math.inf)
            before = self.epsilons.get(outcome.client_id, 0.0)
            self.epsilons[outcome.client_id] = max(before, found) if found >= 0 else math.inf

    def training_state(self, round_number: int) -> TrainingState:
        """What is saved with the version of that round."""
        return TrainingState(
            round_number,
            self.global_state,
            self._moments,
            counters=dict(self.counters),
            standings=dict(self.standings),
            at_work=self.at_work,
            epsilons=dict(self.epsilons),
            client_heads=dict(self.ledger_heads),
        )

    def take_up(self, training: TrainingState, version_id: str) -> None:
        """Go on from a saved state."""
        self.global_state = training.global_state
        self._moments = training.optimizer_state
        self.counters = dict(training.counters)
        self.standings = dict(training.standings)
        self.at_work = training.at_work
        self.epsilons = dict(training.epsilons)
        self.ledger_heads = dict(training.client_heads)
        self.finished = training.round_number
        self.version_id = version_id
