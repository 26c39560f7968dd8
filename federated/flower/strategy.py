"""DeltaStrategy: federated rounds over deltas, as a Flower Strategy, by composition.

A round: sample a cohort, send each client the global adapter and its plan in one message, admit replies one by one
as they arrive, let the rule combine them, let the server optimizer move the adapter, publish a version. It runs in
any Flower ServerApp: in-process, Ray or a deployment, through the Grid that it is given. Under ``round.mode=buffered``
`federated.flower.buffered` fills the rounds in place of cohorts.

It knows no rule by name, and of model and data only `DeltaStrategy.from_config` does.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result as FlowerResult
from flwr.serverapp.strategy import Strategy

from federated.aggregation import Accumulator, NextPhase, Result, Rule, check_combination, clients_needed, make_rule
from federated.config import ExperimentConfig
from federated.delta import Update
from federated.errors import AggregationError, BudgetExhausted, NotEnoughUpdates, RunInterrupted
from federated.flower.buffered import BufferedRounds, name_lost
from federated.flower.directory import Directory
from federated.flower.exchange import exchange
from federated.flower.gate import Gate
from federated.flower.messages import TaskWriter
from federated.flower.publisher import Publisher, RegistryPublisher, TrainingState
from federated.flower.records import metric_record
from federated.flower.round_book import Outcome, RoundBook, not_now, whole_round
from federated.flower.round_closer import RoundCloser
from federated.flower.round_report import final_event
from federated.flower.selection import select_cohort
from federated.flower.server_privacy import ServerPrivacy, choose_cohort
from federated.flower.server_state import ServerState
from federated.flower.starting import start_of
from federated.flower.whole_replies import whole_replies
from federated.global_state import GlobalState
from federated.registry import Registry
from federated.state import AdapterState
from federated.tracking import MultiTracker, Tracker

__all__ = ["DeltaStrategy"]

_LOG = logging.getLogger(__name__)
_MOST_PHASES = 8
"""Exchanges in one round: a rule that starts over again and again has lost too many clients."""
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class DeltaStrategy(Strategy):
    """Selection, rule, server optimizer and publisher, composed.

    Args:
        config: the experiment; its `strategy`, `selection`, `round`, `rounds` and `seed` steer this class.
        initial: the adapter before round 1 (any dtype; a float32 master copy is kept).
        base_digest: the base model that it belongs to.
        parent: id of the version that `initial` is, the parent of the first version; None for a fresh adapter.
        rule: aggregation rule; default: the one that the config names.
        publisher: makes versions; default: one that stores them in ``registry``, or nowhere when that is None.
        registry: open registry of the default publisher, and of the gate.
        tracker: takes the run's events.
        run_id: names the run; default: random.
        resume: state to go on from, as saved with a version, and that version's id.
        secret: key of the task tokens; default: random.
        privacy: client-level privacy; default: what the config asks for, with its ledger in memory.

    Attributes:
        stopped: why it ended before its last round, although nothing failed; empty otherwise.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        *,
        initial: AdapterState,
        base_digest: str,
        parent: str | None = None,
        rule: Rule | None = None,
        publisher: Publisher | None = None,
        registry: Registry | None = None,
        tracker: Tracker | None = None,
        run_id: str | None = None,
        resume: tuple[TrainingState, str] | None = None,
        secret: bytes | None = None,
        privacy: ServerPrivacy | None = None,
    ) -> None:
        self.config = config
        self.rule = rule or make_rule(config.strategy.rule, config.strategy.options)
        check_combination(self.rule, config)
        self.run_id = run_id or f"{config.name}-{secrets.token_hex(4)}"
        self.server = ServerState(initial, rule=self.rule, optimizer=config.strategy.server_optimizer, parent=parent)
        if resume is not None:
            self.server.take_up(*resume)
        names: Any = {"run_id": self.run_id, "base_digest": base_digest}
        publisher = publisher or RegistryPublisher(registry, config, **names, method=self.method)
        self._tracker = tracker or MultiTracker([])
        self._privacy = privacy or ServerPrivacy.of(config, self.rule)
        self.stopped = ""
        gate = Gate.of(registry, config, run_id=self.run_id, tracker=self._tracker)
        self._closer = RoundCloser(
            self.server, publisher, self._tracker, privacy=self._privacy, promised=config.privacy, gate=gate
        )
        least = clients_needed(self.rule, config.selection.fraction)
        self._directory = Directory(config, least=least, tell=self._tracker.emit)
        names |= {"secret": secret or secrets.token_bytes(32), "update_key": self._directory.update_key}
        self._writer = TaskWriter(config, rule=self.rule, **names)
        self._book: RoundBook | None = None
        self._grid: Grid | None = None

    @classmethod
    def from_config(
        cls, config: ExperimentConfig, *, registry: Registry | None = None, tracker: Tracker | None = None
    ) -> Self:
        """The strategy of an experiment, with the base model and first adapter that its config names.

        `registry` takes each round's version (None stores none), `tracker` the run's events.

        Raises:
            FederatedError: whatever is wrong with model, data or adapter.
        """
        return cls(config, **start_of(config, registry).arguments, registry=registry, tracker=tracker)

    @property
    def method(self) -> str:
        """Rule and server optimizer in words, such as ``"fedit + sgd"``."""
        return f"{self.rule.name} + {self.config.strategy.server_optimizer.name}"

    @property
    def version_id(self) -> str | None:
        """Id of the version that holds the global adapter; None before the first is published."""
        return self.server.version_id

    def initial_arrays(self) -> ArrayRecord:
        """The global adapter as named float32 arrays, for `start`."""
        return self.server.arrays()

    def close(self) -> None:
        """Let others open the privacy ledger, where there is one."""
        if self._privacy is not None:
            self._privacy.close()

    def summary(self) -> None:
        """Log what this strategy is made of."""
        _LOG.info("DeltaStrategy: %s, %d rounds, run %s", self.method, self.config.rounds, self.run_id)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> FlowerResult:
        """Run all rounds and a last evaluation.

        Args:
            grid: any Flower Grid.
            initial_arrays: replaces the global adapter, under the same names; default: as given at construction.
            num_rounds: default: ``config.rounds``.
            timeout: seconds per round; default: ``config.round.deadline``.
            train_config: not used: the plan travels in our own record.
            evaluate_config: not used.
            evaluate_fn: called with the round number (first 0, or a resumed run's last) and the global adapter, as in
                Flower.

        Returns:
            Flower's Result: final arrays, and metrics by round.

        Raises:
            NotEnoughUpdates: if too few clients connect.
            RunInterrupted: on Ctrl-C; finished rounds are published.
        """
        del train_config, evaluate_config
        if timeout is not None:
            self.config = replace(self.config, round=replace(self.config.round, deadline=timeout))
        rounds = self.config.rounds if num_rounds is None else num_rounds
        if initial_arrays is not None:
            self.server.adopt(initial_arrays)
        result = FlowerResult()
        try:
            self._all_rounds(whole_replies(grid), rounds, result=result, evaluate_fn=evaluate_fn)
        except KeyboardInterrupt:
            number = min(self.server.finished + 1, rounds)
            raise RunInterrupted(f"stopped in round {number} of {rounds}; finished rounds are published") from None
        result.arrays = self.server.arrays()
        return result

    def _all_rounds(self, grid: Grid, rounds: int, *, result: FlowerResult, evaluate_fn: EvaluateFn | None) -> None:
        self._directory.gather(grid)
        if self.version_id is None:
            self._closer.publish([], 0, servable=True)
        name_lost(self.server, self._tracker)
        self._evaluate_here(result, self.server.finished, evaluate_fn)
        with self._filling(grid) as fill:
            for number in range(self.server.finished + 1, rounds + 1):
                try:
                    metrics = fill(number)
                except BudgetExhausted as error:
                    self._stop(number, rounds, error)
                    break
                if metrics is not None:
                    result.train_metrics_clientapp[number] = metrics
                self._evaluate_here(result, number, evaluate_fn)
        messages = self.configure_evaluate(rounds, self.server.arrays(), ConfigRecord(), grid)
        evaluation = self.aggregate_evaluate(rounds, self._exchange(grid, messages))
        if evaluation is not None:
            result.evaluate_metrics_clientapp[rounds] = evaluation

    def _stop(self, number: int, rounds: int, error: BudgetExhausted) -> None:
        self.stopped = f"budget spent before round {number} of {rounds}: {error}"
        self._tracker.emit({"event": "warning", "message": self.stopped})

    @contextmanager
    def _filling(self, grid: Grid) -> Iterator[Callable[[int], MetricRecord | None]]:
        """What runs the round of a number, in the mode that the config names, and gives its metrics."""
        if self.config.round.mode == "sync":
            yield lambda number: self._cohort(grid, number)
            return
        with BufferedRounds(
            grid,
            self.config,
            rule=self.rule,
            server=self.server,
            writer=self._writer,
            directory=self._directory,
            closer=self._closer,
            tracker=self._tracker,
        ) as rounds:
            yield lambda number: self._buffer(rounds, grid, number)

    def _cohort(self, grid: Grid, number: int) -> MetricRecord | None:
        messages = self.configure_train(number, self.server.arrays(), ConfigRecord(), grid)
        return self.aggregate_train(number, self._exchange(grid, messages))[1]

    def _buffer(self, rounds: BufferedRounds, grid: Grid, number: int) -> MetricRecord | None:
        self._directory.gather(grid)
        return rounds.run(number)

    def _evaluate_here(self, result: FlowerResult, number: int, evaluate_fn: EvaluateFn | None) -> None:
        metrics = evaluate_fn(number, self.server.arrays()) if evaluate_fn else None
        if metrics is not None:
            result.evaluate_metrics_serverapp[number] = metrics

    def _exchange(self, grid: Grid, messages: Iterable[Message]) -> Iterable[Message]:
        policy = self.config.round
        return exchange(grid, messages, deadline=policy.deadline, poll_interval=policy.poll_interval)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample the cohort and write one message per client.

        Raises:
            BudgetExhausted: if the round does not fit the privacy budget.
        """
        del config
        self.server.adopt(arrays)
        self._directory.gather(grid)
        self._grid = grid
        known: Any = {"standings": self.server.standings, "privacy": self._privacy, "tracker": self._tracker}
        known["resting"] = self._directory.resting
        cohort = choose_cohort(self.config, server_round, self._directory.nodes, **known)
        event = {"event": "round_start", "round_number": server_round, "cohort": list(cohort)}
        self._tracker.emit({**event, "version_id": self.version_id})
        return self._write(server_round, cohort, mode="train")

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask connected clients, a share by chance, to evaluate the global adapter without training."""
        del config
        self.server.adopt(arrays)
        self._directory.refresh(grid)
        share, seed = self.config.selection.fraction_evaluate, self.config.seed
        cohort = select_cohort(self._directory.nodes, fraction=share, seed=seed, round_number=server_round + 1)
        return self._write(server_round, cohort, mode="evaluate")

    def _write(self, number: int, cohort: Iterable[str], *, mode: str) -> list[Message]:
        nodes = {client_id: self._directory.nodes[client_id] for client_id in cohort}
        return self._write_phase(self.server.global_state, nodes, number=number, mode=mode, phase=1)

    def _write_phase(
        self, state: GlobalState, nodes: Mapping[str, int], *, number: int, mode: str, phase: int
    ) -> list[Message]:
        messages, self._book = self._writer.write(
            state,
            nodes,
            round_number=number,
            mode=mode,
            version_id=self.version_id or "",
            counters=self.server.counters,
            ranks=self._directory.ranks,
            heads=self.server.ledger_heads,
            phase=phase,
        )
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Admit, combine, step and publish; the arrays are None when the global adapter stays as it was.

        Raises:
            AggregationError: if the round was not configured.
        """
        phases = [self._taken(server_round)]
        found: Result | AggregationError
        try:
            found = self._combine(phases, replies)
        except AggregationError as error:
            found = error
        metrics = self._closer.close(found, whole_round(phases), number=server_round, seconds=phases[0].seconds)
        return (None, None) if metrics is None else (self.server.arrays(), metric_record(metrics))

    def _combine(self, phases: list[RoundBook], replies: Iterable[Message]) -> Result:
        """All exchanges of one round; each one's book goes into ``phases``.

        Raises:
            NotEnoughUpdates: if too few good updates are left in any of them.
            AggregationError: if the rule cannot combine them, or never comes to an end.
        """
        state, phase = self.server.global_state, 1
        while True:
            book = phases[-1]
            accumulator: Accumulator = self.rule.start(state, phase)
            if self._privacy is not None:
                accumulator = self._privacy.accumulator(accumulator, state, book.round_number)
            found = self._one_phase(phases, replies, accumulator)
            if isinstance(found, Result):
                return found
            if not phase < found.phase <= _MOST_PHASES or self._grid is None:
                raise AggregationError(f"{self.rule.name} asks for phase {found.phase} after phase {phase}")
            state, phase = found.state, found.phase
            nodes = {one.client_id: self._directory.nodes[one.client_id] for one in book.close() if one.status == "ok"}
            messages = self._write_phase(state, nodes, number=book.round_number, mode="train", phase=phase)
            phases.append(self._taken(book.round_number))
            replies = self._exchange(self._grid, messages)

    def _one_phase(
        self, phases: list[RoundBook], replies: Iterable[Message], accumulator: Accumulator
    ) -> NextPhase | Result:
        book = phases[-1]
        for message in replies:
            known = len(book.outcomes)
            update = book.receive(message)
            if update is not None:
                self._add(accumulator.add, update, book)
            for outcome in book.outcomes[known:]:
                self._tracker.emit(outcome.as_event(book.round_number))
        good = self._close(book)
        least = 1 if self._privacy is None else 0  # an empty cohort's round is noise, and charged
        quorum = max(least, phases[0].quorum(self.config.round.quorum))
        if len(good) < quorum:
            away = f", {len(declined)} said not now" if (declined := not_now(book.outcomes)) else ""
            raise NotEnoughUpdates(f"{len(good)} good updates of {len(book.cohort)}{away}, the quorum is {quorum}")
        return accumulator.finish()

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Pool the clients' evaluations of the global adapter."""
        book = self._taken(server_round)
        for message in replies:
            book.receive(message)
        event = final_event(book.close(), version_id=self.version_id, selection=self.config.selection)
        self._tracker.emit(event)
        evaluation = event["evaluation"]
        self._closer.measured({**evaluation, "version_id": self.version_id} if evaluation else None)
        return None if evaluation is None else metric_record(evaluation)

    def _taken(self, number: int) -> RoundBook:
        book, self._book = self._book, None
        if book is None or book.round_number != number:
            raise AggregationError(f"round {number} was not configured by this strategy: call configure_* first")
        return book

    def _add(self, add: Callable[[Update, float], None], update: Update, book: RoundBook) -> None:
        weight = float(update.num_examples) if self.config.strategy.weighted else 1.0
        try:
            add(update, weight)
        except AggregationError as error:
            book.reject(update.client_id, error)

    def _close(self, book: RoundBook) -> list[Outcome]:
        seen = {outcome.client_id for outcome in book.outcomes}
        outcomes = book.close()
        for outcome in outcomes:
            if outcome.client_id not in seen:
                self._tracker.emit(outcome.as_event(book.round_number))
        self._directory.heard(outcomes)
        good = [outcome for outcome in outcomes if outcome.status == "ok"]
        self.server.counters |= {outcome.client_id: outcome.counter for outcome in good}
        return good
