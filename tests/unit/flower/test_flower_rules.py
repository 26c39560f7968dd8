"""Every rule in whole rounds: real clients with a trained head, changing cohorts, real messages, resume and export."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.clientapp import ClientApp

from federated.adapters import shell
from federated.aggregation import RULES, Accumulator, ClientView, Result, Rule, make_rule
from federated.config import ExperimentConfig
from federated.delta import Update, apply
from federated.flower import (
    DeltaStrategy,
    InProcessGrid,
    Session,
    TrainingState,
    handle_query,
    handle_train,
    open_session,
)
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, TrainPlan
from federated.state import AdapterState, RuleState, Tensors
from federated.testing import dense_mean, effective_of
from federated.tracking import MemoryTracker

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "flora, warm": ("flora", {"start": "warm"}),
    "fedex, truncated": ("fedex", {"residual": "truncated", "residual_rank": 1}),
    "florist, all": ("florist", {"threshold": 1.0}),
    "lora_a2, one rank": ("lora_a2", {"rank": 1}),
    "hetlora, pruning": ("hetlora", {"prune_gamma": 0.5, "tail_penalty": 0.5}),
    "lora_fair, ridge": ("lora_fair", {"objective": "ridge"}),
}
"""Rules under other options than their own."""
NAMES = [*sorted(RULES), *VARIANTS]


def make(name: str) -> Rule:
    return make_rule(*VARIANTS.get(name, (name, {})))


every_rule = pytest.mark.parametrize("name", NAMES)
ONE_PHASE = [name for name in NAMES if make(name).properties.phases == 1]
"""What clients hold is in their updates; of the others see their own tests."""
every_rule_of_one_phase = pytest.mark.parametrize("name", ONE_PHASE)
mixing_rule = pytest.mark.parametrize("name", [name for name in ONE_PHASE if make(name).properties.mixed_ranks])
every_shared_rule = pytest.mark.parametrize("name", [name for name in ONE_PHASE if not make(name).properties.personal])
"""Rules with one adapter for all; of the others see `test_flower_personal`."""
FEDIT = "fedit"
UP = dict.fromkeys(["fedsa", "fedsb", "fedsvd", "ffa", "rolora", "lora_a2"], 0.8)
UP |= {"lora_a2, one rank": 0.5, "flasc": 0.5}
"""At most this share of a whole update, envelope and head included; all others send it whole."""


@dataclass
class Round:
    """What a rule was given in one round, and what the next round started from."""

    before: AdapterState
    trainable: tuple[str, ...]
    whole: AdapterState
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
        book, inner = Round(payload, plan.trainable, state.materialise()), self._rule.start(state, phase)
        self.rounds.append(book)

        class Recording:
            finish = inner.finish

            def add(self, update: Update, weight: float) -> None:
                received = update.received
                still = {name: torch.zeros_like(tensor) for name, tensor in received.tensors.items()}
                book.after[update.client_id] = apply(received, {**still, **update.delta})
                book.weights[update.client_id] = weight
                inner.add(update, weight)

        return Recording()


def residual_of(strategy: DeltaStrategy) -> Tensors:
    residual = strategy.server.global_state.residual
    return residual.tensors if residual else {}


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
    with InProcessGrid(client_app(), config.data.partition.num_clients) as grid:
        strategy.start(grid)
    return strategy, tracker


@pytest.fixture
def three_rounds(real_config: ExperimentConfig, request: pytest.FixtureRequest) -> ExperimentConfig:
    """Two of three clients a round, or as many as the rule needs of one more; a learning rate that moves everything."""
    name = request.getfixturevalue("name") if "name" in request.fixturenames else FEDIT
    properties = make(name).properties
    cohort = max(2, properties.min_updates)
    rule, options = VARIANTS.get(name, (name, {}))
    return replace(
        real_config,
        rounds=3,
        adapter=replace(real_config.adapter, kind=properties.adapter),
        strategy=replace(real_config.strategy, rule=rule, options=options, weighted=not properties.robust),
        selection=replace(real_config.selection, fraction=(cohort - 0.2) / (cohort + 1)),
        data=replace(real_config.data, partition=replace(real_config.data.partition, num_clients=cohort + 1)),
        train=replace(
            real_config.train, learning_rate=0.05, steps=2, optimizer="sgd" if properties.plain_sgd else "adamw"
        ),
    )


@pytest.fixture
def real_session(real_session: Session, request: pytest.FixtureRequest) -> Session:
    """With the adapter that the rule works on."""
    if "three_rounds" not in request.fixturenames:
        return real_session
    return open_session(request.getfixturevalue("three_rounds"))


@pytest.fixture
def fresh_store(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], None]:
    """Clients that were never in a run of this name."""
    return lambda: monkeypatch.setenv("FEDPEFT_CLIENT_STORE", str(tmp_path_factory.mktemp("clients")))


@every_shared_rule
def test_what_the_next_round_starts_from_is_what_the_rule_claims(
    three_rounds: ExperimentConfig, real_session: Session, name: str
) -> None:
    rule = Recorded(make(name))
    strategy, tracker = run(three_rounds, real_session, rule)
    starts = [book.before for book in rule.rounds[1:]] + [strategy.server.global_state.export()]
    assert len({tuple(event["cohort"]) for event in tracker.of("round_start")}) > 1
    keeps_its_claim(rule, starts)


@mixing_rule
def test_clients_of_different_ranks_are_combined_as_the_rule_claims(
    three_rounds: ExperimentConfig, real_session: Session, name: str
) -> None:
    rule = Recorded(make(name))
    mixed = replace(three_rounds, adapter=replace(three_rounds.adapter, client_ranks=(1, 2, 1)))
    strategy, tracker = run(mixed, real_session, rule)
    assert {event["status"] for event in tracker.of("client")} == {"ok"}
    ranks = [{after.spec.rank for after in book.after.values()} for book in rule.rounds]
    assert {1, 2} in ranks
    keeps_its_claim(rule, [book.whole for book in rule.rounds[1:]] + [strategy.server.global_state.materialise()])


def keeps_its_claim(rule: Recorded, starts: list[AdapterState]) -> None:
    """What was made of each round is what the rule's class says of the dense sum of what its clients held."""
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
        if rule.properties.robust:
            assert_among_the_clients(made, book)
            continue
        if not rule.properties.averages:
            continue
        for tensor, value in made.dense().items():
            mean = sum(
                weight / total * book.after[one].tensors[tensor].double() for one, weight in book.weights.items()
            )
            torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6)


def assert_among_the_clients(made: AdapterState, book: Round) -> None:
    """Each dense value lies between those that clients hold, or held before the round."""
    for tensor, value in made.dense().items():
        every = torch.stack([one.tensors[tensor] for one in (*book.after.values(), book.before)])
        assert (value >= every.min(dim=0).values - 1e-6).all()
        assert (value <= every.max(dim=0).values + 1e-6).all()
        assert not torch.equal(value, book.before.tensors[tensor])


@every_rule_of_one_phase
def test_what_is_not_trained_does_not_move(three_rounds: ExperimentConfig, real_session: Session, name: str) -> None:
    rule = Recorded(make(name))
    run(three_rounds, real_session, rule)
    for book in rule.rounds:
        for after in book.after.values():
            moved = {
                tensor.rsplit(".", 1)[-1]
                for tensor in after.tensors
                if not torch.equal(after.tensors[tensor], book.before.tensors[tensor])
            }
            frozen = {"factor_a", "factor_b", "core"} - set(book.trainable)
            assert not moved & frozen
            assert moved & set(book.trainable)


@every_rule
def test_only_what_is_trained_goes_up(three_rounds: ExperimentConfig, real_session: Session, name: str) -> None:
    _, tracker = run(three_rounds, real_session, make(name))
    strategy, adapter = replace(three_rounds.strategy, rule=FEDIT), replace(three_rounds.adapter, kind="lora")
    plain = replace(three_rounds, strategy=strategy, adapter=adapter)
    whole = max(event["bytes_up"] for event in run(plain, open_session(plain), make_rule(FEDIT))[1].of("client"))
    for event in tracker.of("client"):
        assert event["status"] == "ok"
        if name in UP:
            assert event["bytes_up"] < UP[name] * whole
        elif name in ONE_PHASE:
            assert event["bytes_up"] == pytest.approx(whole, abs=64)


@every_rule
def test_a_run_stopped_after_any_round_goes_on_as_if_it_was_not(
    three_rounds: ExperimentConfig, real_session: Session, name: str, fresh_store: Callable[[], None]
) -> None:
    whole, _ = run(three_rounds, real_session, make(name))
    for stop in (1, 2):
        fresh_store()
        first, _ = run(replace(three_rounds, rounds=stop), real_session, make(name))
        saved = TrainingState.from_bytes(first.server.training_state(stop).to_bytes())
        again, _ = run(three_rounds, real_session, make(name), resume=(saved, first.version_id))
        for tensor, value in whole.server.adapter.tensors.items():
            assert torch.equal(again.server.adapter.tensors[tensor], value)
        assert residual_of(again).keys() == residual_of(whole).keys()
        for tensor, value in residual_of(whole).items():
            assert torch.equal(residual_of(again)[tensor], value)
        kept, expected = again.server.global_state.rule_state, whole.server.global_state.rule_state
        assert kept.scalars == expected.scalars
        assert kept.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(kept.tensors[key], tensor) for key, tensor in expected.tensors.items())


@every_rule
def test_a_device_serves_what_clients_are_given_next(
    three_rounds: ExperimentConfig, real_session: Session, name: str
) -> None:
    """The published adapter, in a tree of its own: the same weights, and the same answers as the training model's."""
    strategy, _ = run(three_rounds, real_session, make(name))
    exported, given = strategy.server.global_state.export(), strategy.server.global_state.materialise()
    for layer, matrix in effective_of(given).items():
        torch.testing.assert_close(effective_of(exported)[layer], matrix, rtol=1e-5, atol=1e-6)
    served = shell(real_session.adapter.base, exported.spec)
    served.write(exported)
    real_session.adapter.write(given)
    inputs = real_session.task.collate(real_session.local_data(real_session.source.client_ids[0]).test)
    inputs.pop("labels")
    with torch.no_grad():
        answers = [model(**inputs) for model in (served.model, real_session.adapter.model)]
    assert float(answers[1].std()) > 0
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if make(name).properties.residual])
def test_a_residual_goes_down_whole_and_its_size_is_reported(
    three_rounds: ExperimentConfig, real_session: Session, name: str
) -> None:
    strategy, tracker = run(three_rounds, real_session, make(name))
    rounds = tracker.of("round")
    assert all(event["published"] for event in rounds)
    adapter = 4 * sum(tensor.numel() for tensor in real_session.initial.tensors.values())
    sizes = [0.0, *(event["rule"]["residual_bytes"] for event in rounds)]
    for number, event in enumerate(rounds):
        headers = event["bytes_down"] / event["cohort"] - adapter - sizes[number]
        assert 0 < headers < 4096
    assert sizes[-1] == 4 * sum(tensor.numel() for tensor in residual_of(strategy).values())
    assert (sizes[-1] > 0) == (rounds[-1]["rule"]["residual_rank"] > 0)


def test_a_residual_beyond_its_bound_costs_the_round_and_nothing_else(
    three_rounds: ExperimentConfig, real_session: Session
) -> None:
    strategy, tracker = run(three_rounds, real_session, make_rule("flora", {"max_residual_rank": 5}))
    assert [event["published"] for event in tracker.of("round")] == [True, False, False]
    assert "at most 5 is allowed" in tracker.of("round")[1]["message"]
    first, _ = run(replace(three_rounds, rounds=1), real_session, make_rule("flora"))
    assert all(torch.equal(residual_of(strategy)[key], value) for key, value in residual_of(first).items())
    cut, tracker = run(three_rounds, real_session, make_rule("flora", {"max_residual_rank": 5, "overflow": "truncate"}))
    assert [event["rule"]["residual_rank"] for event in tracker.of("round")] == [4.0, 5.0, 5.0]
    assert 0.5 < tracker.of("round")[-1]["rule"]["residual_kept"] < 1.0
    assert len(residual_of(cut)) == len(residual_of(first))


def buffered(config: ExperimentConfig, **policy: Any) -> ExperimentConfig:
    everybody = replace(config.selection, fraction=1.0)
    return replace(config, selection=everybody, round=replace(config.round, mode="buffered", **policy))


takes_buffers = pytest.mark.parametrize("name", [name for name in NAMES if make(name).properties.asynchronous != "no"])


@takes_buffers
def test_with_one_client_at_a_time_buffered_rounds_are_the_synchronous_ones(
    three_rounds: ExperimentConfig, real_session: Session, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, _ = run(three_rounds, real_session, make(name))
    monkeypatch.setenv("FEDPEFT_CLIENT_STORE", str(tmp_path / "other"))  # clients may keep factors there
    found, tracker = run(buffered(three_rounds, buffer=2, concurrency=1), real_session, make(name))
    assert [event["participants"] for event in tracker.of("round")] == [2, 2, 2]
    for tensor, value in sync.server.adapter.tensors.items():
        assert torch.equal(found.server.adapter.tensors[tensor], value)
    assert all(torch.equal(residual_of(found)[tensor], value) for tensor, value in residual_of(sync).items())
    assert found.version_id == sync.version_id


@takes_buffers
def test_a_buffer_takes_stale_updates_where_the_basis_is_the_same_and_names_the_others(
    three_rounds: ExperimentConfig, real_session: Session, name: str
) -> None:
    """Two at work for a buffer of two: one of three clients is in training whenever a version is made."""
    rule, rounds = make(name), replace(three_rounds, rounds=4)
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
