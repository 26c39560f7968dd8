"""Every rule in whole rounds: real clients with a trained head, changing cohorts, real messages, resume and export."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from flwr.clientapp import ClientApp

from federated.aggregation import RULES, Accumulator, ClientView, Result, Rule, make_rule
from federated.config import ExperimentConfig
from federated.delta import Update, apply
from federated.flower import DeltaStrategy, InProcessGrid, Session, TrainingState, handle_query, handle_train
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, TrainPlan
from federated.state import AdapterState, RuleState
from federated.testing import dense_mean, effective_of
from federated.tracking import MemoryTracker

every_rule = pytest.mark.parametrize("name", sorted(RULES))
FEDIT = "fedit"


@dataclass
class Round:
    """What a rule was given in one round, and what the next round started from."""

    before: AdapterState
    trainable: tuple[str, ...]
    after: dict[str, AdapterState] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)


class Recorded:
    """A rule, with everything that passes through it written down."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self.name = rule.name
        self.properties = rule.properties
        self.rounds: list[Round] = []

    def init(self, spec: AdapterSpec) -> RuleState:
        return self._rule.init(spec)

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        self._planned = self._rule.plan(state, client, phase)
        return self._planned

    def start(self, state: GlobalState, phase: int) -> Accumulator:
        plan, payload = self._planned
        book, inner = Round(payload, plan.trainable), self._rule.start(state, phase)
        self.rounds.append(book)

        class Recording:
            finish = inner.finish

            def add(self, update: Update, weight: float) -> None:
                still = {name: torch.zeros_like(tensor) for name, tensor in payload.tensors.items()}
                book.after[update.client_id] = apply(payload, {**still, **update.delta})
                book.weights[update.client_id] = weight
                inner.add(update, weight)

        return Recording()


def client_app() -> ClientApp:
    app = ClientApp()
    app.query()(handle_query)
    app.train()(handle_train)
    return app


def run(config: ExperimentConfig, session: Session, rule: Rule, **parts: Any) -> tuple[DeltaStrategy, MemoryTracker]:
    tracker = MemoryTracker(clock=lambda: 0.0)
    strategy = DeltaStrategy(
        config,
        **{
            "initial": session.initial,
            "base_digest": session.adapter.base.base_digest,
            "rule": rule,
            "tracker": tracker,
            "run_id": "run",
            **parts,
        },
    )
    with InProcessGrid(client_app(), 3) as grid:
        strategy.start(grid)
    return strategy, tracker


@pytest.fixture
def three_rounds(real_config: ExperimentConfig, name: str) -> ExperimentConfig:
    """Two of three clients a round, and enough of a learning rate to move everything."""
    return replace(
        real_config,
        rounds=3,
        strategy=replace(real_config.strategy, rule=name),
        selection=replace(real_config.selection, fraction=0.6),
        train=replace(real_config.train, learning_rate=0.05, steps=2),
    )


@every_rule
def test_what_the_next_round_starts_from_is_what_the_rule_claims(
    three_rounds: ExperimentConfig, real_session: Session, name: str
) -> None:
    rule = Recorded(make_rule(name))
    strategy, tracker = run(three_rounds, real_session, rule)
    starts = [book.before for book in rule.rounds[1:]] + [strategy.server.global_state.export()]
    assert len({tuple(event["cohort"]) for event in tracker.of("round_start")}) > 1
    for book, made in zip(rule.rounds, starts, strict=True):
        truth, found = dense_mean(book.after, book.weights), effective_of(made)
        ranks = {module.name: module.rank for module in made.spec.modules}
        missed = {layer: torch.linalg.svdvals(matrix)[ranks[layer] :].norm() for layer, matrix in truth.items()}
        errors = {layer: float((found[layer] - matrix).norm()) for layer, matrix in truth.items()}
        size = float(torch.stack([matrix.norm() for matrix in truth.values()]).norm())
        assert size > 0
        if rule.properties.exactness != "approximate":
            allowed = dict.fromkeys(errors, 1e-06 * size)
            if rule.properties.exactness == "truncation":
                allowed = {layer: float(missed[layer]) + 1e-6 * size for layer in errors}
            assert all(errors[layer] <= allowed[layer] for layer in errors), (errors, allowed)
        total = sum(book.weights.values())
        assert made.dense()
        for tensor, value in made.dense().items():
            mean = sum(
                weight / total * book.after[one].tensors[tensor].double() for one, weight in book.weights.items()
            )
            torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6)


@every_rule
def test_what_is_not_trained_does_not_move(three_rounds: ExperimentConfig, real_session: Session, name: str) -> None:
    rule = Recorded(make_rule(name))
    run(three_rounds, real_session, rule)
    for book in rule.rounds:
        for after in book.after.values():
            moved = {
                tensor.rsplit(".", 1)[-1]
                for tensor in after.tensors
                if not torch.equal(after.tensors[tensor], book.before.tensors[tensor])
            }
            frozen = {"factor_a", "factor_b"} - set(book.trainable)
            assert not moved & frozen
            assert moved & set(book.trainable)


@every_rule
def test_only_what_is_trained_goes_up(three_rounds: ExperimentConfig, real_session: Session, name: str) -> None:
    _, tracker = run(three_rounds, real_session, make_rule(name))
    whole = max(
        event["bytes_up"]
        for event in run(
            replace(three_rounds, strategy=replace(three_rounds.strategy, rule=FEDIT)), real_session, make_rule(FEDIT)
        )[1].of("client")
    )
    for event in tracker.of("client"):
        assert event["status"] == "ok"
        if name in ("fedsvd", "ffa", "rolora"):
            assert event["bytes_up"] < 0.8 * whole
        else:
            assert event["bytes_up"] == pytest.approx(whole, abs=64)


@every_rule
def test_a_run_stopped_after_any_round_goes_on_as_if_it_was_not(
    three_rounds: ExperimentConfig, real_session: Session, name: str
) -> None:
    whole, _ = run(three_rounds, real_session, make_rule(name))
    for stop in (1, 2):
        first, _ = run(replace(three_rounds, rounds=stop), real_session, make_rule(name))
        saved = TrainingState.from_bytes(first.server.training_state(stop).to_bytes())
        again, _ = run(three_rounds, real_session, make_rule(name), resume=(saved, first.version_id))
        for tensor, value in whole.server.adapter.tensors.items():
            assert torch.equal(again.server.adapter.tensors[tensor], value)
        assert again.server.global_state.rule_state.scalars == whole.server.global_state.rule_state.scalars


def buffered(config: ExperimentConfig, **policy: Any) -> ExperimentConfig:
    everybody = replace(config.selection, fraction=1.0)
    return replace(config, selection=everybody, round=replace(config.round, mode="buffered", **policy))


takes_buffers = pytest.mark.parametrize(
    "name", [name for name in sorted(RULES) if make_rule(name).properties.asynchronous != "no"]
)


@takes_buffers
def test_with_one_client_at_a_time_buffered_rounds_are_the_synchronous_ones(
    three_rounds: ExperimentConfig, real_session: Session, name: str
) -> None:
    sync, _ = run(three_rounds, real_session, make_rule(name))
    one_by_one = buffered(three_rounds, buffer=2, concurrency=1)
    found, tracker = run(one_by_one, real_session, make_rule(name))
    assert [event["participants"] for event in tracker.of("round")] == [2, 2, 2]
    for tensor, value in sync.server.adapter.tensors.items():
        assert torch.equal(found.server.adapter.tensors[tensor], value)
    assert found.version_id == sync.version_id


@takes_buffers
def test_a_buffer_takes_stale_updates_where_the_basis_is_the_same_and_names_the_others(
    three_rounds: ExperimentConfig, real_session: Session, name: str
) -> None:
    """Two at work for a buffer of two: one of three clients is in training whenever a version is made."""
    rule, rounds = make_rule(name), replace(three_rounds, rounds=4)
    strategy, tracker = run(buffered(rounds, buffer=2, concurrency=2), real_session, rule)
    assert all(event["published"] for event in tracker.of("round"))
    stale = [event for event in tracker.of("client") if event["staleness"] > 0]
    assert stale
    expected = "ok" if rule.properties.asynchronous == "any" else "refused"
    assert {event["status"] for event in stale} == {expected}
    assert {event["reason"] for event in stale} <= {None, "stale_basis"}
    assert all(event["status"] == "ok" for event in tracker.of("client") if event["staleness"] == 0)
    if name == "rolora":
        assert strategy.server.global_state.rule_state.scalars["turn"] == "factor_b"  # four turns were taken


def test_a_rule_that_factorises_reports_what_the_rank_could_keep(
    real_config: ExperimentConfig, real_session: Session
) -> None:
    config = replace(real_config, strategy=replace(real_config.strategy, rule="flexlora"))
    _, tracker = run(config, real_session, make_rule("flexlora"))
    assert all(0.5 < event["rule"]["energy_kept"] <= 1.0 for event in tracker.of("round"))


def test_the_recorder_is_a_rule() -> None:
    assert isinstance(Recorded(make_rule(FEDIT)), Rule)
    assert Result().mean_delta is None
