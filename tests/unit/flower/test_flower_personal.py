"""Rules whose clients keep a part of the model: whole rounds against a plain loop, resume, and what goes wrong."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.clientapp import ClientApp

from federated.aggregation import Accumulator, FedSALoRA, make_rule
from federated.config import ExperimentConfig
from federated.delta import apply
from federated.device.intake import verify
from federated.errors import AggregationError, DeviceError, RunInterrupted
from federated.flower import (
    DeltaStrategy,
    InProcessGrid,
    Session,
    TrainingState,
    handle_query,
    handle_train,
    open_session,
    simulate,
)
from federated.flower.client_memory import recalled
from federated.flower.client_store import ClientStore
from federated.flower.publisher import RegistryPublisher
from federated.global_state import GlobalState
from federated.manifest import TrainPlan, VersionManifest
from federated.registry import Registry
from federated.state import AdapterState, Tensors, group_of
from federated.testing import dense_mean, effective_of
from federated.tracking import MemoryTracker, read_events
from federated.training import client_seed

PLAN = TrainPlan(rank=2, kept=("factor_b", "dense"))
Run = tuple[DeltaStrategy, MemoryTracker]


@pytest.fixture
def experiment(real_config: ExperimentConfig) -> ExperimentConfig:
    """Two of three clients a round: who is left out changes."""
    return replace(
        real_config,
        rounds=5,
        strategy=replace(real_config.strategy, rule="fedsa"),
        selection=replace(real_config.selection, fraction=0.6),
        train=replace(real_config.train, learning_rate=0.05, steps=2),
    )


def client_app() -> ClientApp:
    app = ClientApp()
    app.query()(handle_query)
    app.train()(handle_train)
    return app


@pytest.fixture
def session(experiment: ExperimentConfig, real_session: Session) -> Session:
    """The clients' working parts; the initial adapter is `real_session`'s."""
    found = open_session(experiment)
    assert found.initial.spec == real_session.initial.spec
    return found


@pytest.fixture
def go(real_session: Session) -> Callable[..., Run]:
    """Run an experiment; every ``parts`` of the strategy can be replaced."""

    def run(config: ExperimentConfig, **parts: Any) -> Run:
        tracker = MemoryTracker(clock=lambda: 0.0)
        base = real_session.adapter.base.base_digest
        common = {"initial": real_session.initial, "base_digest": base, "run_id": "run", "tracker": tracker}
        strategy = DeltaStrategy(config, **{**common, "rule": make_rule("fedsa"), **parts})
        with InProcessGrid(client_app(), 3) as grid:
            strategy.start(grid)
        return strategy, tracker

    return run


def with_own(shared: AdapterState, own: Tensors) -> AdapterState:
    return replace(shared, tensors={**shared.tensors, **own})


class ByHand:
    """FedSA-LoRA as a plain loop over the same trainer: no messages, no store, no rule."""

    def __init__(self, session: Session, config: ExperimentConfig) -> None:
        self._session, self._config = session, config
        self.shared = session.initial
        self.own: dict[str, Tensors] = {}
        self.evaluations: list[dict[str, float]] = []

    def start(self, client: str) -> AdapterState:
        return with_own(self.shared, self.own.get(client, {}))

    def measure(self, clients: Iterable[str]) -> None:
        """The pooled loss of each client's own adapter."""
        found = []
        for client in clients:
            data = self._session.local_data(client)
            found.append(self._session.trainer.evaluate(self.start(client), data.test).to_dict())
        total = sum(one["num_examples"] for one in found)
        self.evaluations.append({"loss": sum(one["loss"] * one["num_examples"] for one in found) / total})

    def round(self, number: int, cohort: Iterable[str]) -> None:
        self.measure(sorted(cohort))
        deltas, weights, own = {}, {}, {}
        for client in sorted(cohort):
            data, start = self._session.local_data(client), self.start(client)
            seed = client_seed(self._config.seed, number, client)
            result = self._session.trainer.run(start, PLAN, data, seed=seed)
            after = apply(start, result.delta)
            own[client] = {name: one for name, one in after.tensors.items() if group_of(name) != "factor_a"}
            deltas[client], weights[client] = result.delta, len(data.train)
        self.own |= own
        self.shared = with_own(self.shared, self._mean(deltas, weights))

    def _mean(self, deltas: dict[str, Tensors], weights: dict[str, int]) -> dict[str, torch.Tensor]:
        total = sum(weights.values())
        return {
            name: (before.double() + sum(weights[one] / total * deltas[one][name].double() for one in deltas)).float()
            for name, before in self.shared.tensors.items()
            if group_of(name) == "factor_a"
        }


def by_hand(session: Session, config: ExperimentConfig, tracker: MemoryTracker) -> ByHand:
    loop = ByHand(session, config)
    for event in tracker.of("round_start"):
        loop.round(event["round_number"], event["cohort"])
    loop.measure(session.source.client_ids)
    return loop


def own_of(folder: Path, session: Session, client: str) -> Tensors:
    store = ClientStore(folder, run_id="run", client_id=client)
    held = recalled(store, PLAN, session.initial, version_id="the next")
    return {name: tensor for name, tensor in held.tensors.items() if group_of(name) != "factor_a"}


def assert_equal(found: Tensors, expected: Tensors, atol: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=0, atol=atol)


def test_a_run_is_what_a_plain_loop_gives_also_for_clients_left_out(
    go: Callable[..., Run], experiment: ExperimentConfig, session: Session, tmp_path: Path
) -> None:
    strategy, tracker = go(experiment)
    cohorts = [set(event["cohort"]) for event in tracker.of("round_start")]
    missed = [[client not in cohort for cohort in cohorts] for client in session.source.client_ids]
    assert any(any(row[1:-1]) and not row[0] and not row[-1] for row in missed), "nobody was left out and came back"
    loop = by_hand(session, experiment, tracker)
    assert_equal(strategy.server.adapter.tensors, loop.shared.tensors)
    assert any(tensor.any() for tensor in loop.own["client-000"].values())
    for client, own in loop.own.items():
        assert_equal(own_of(tmp_path / "clients", session, client), own)


def test_every_evaluation_is_of_each_client_s_own_adapter(
    go: Callable[..., Run], experiment: ExperimentConfig, session: Session
) -> None:
    """The last, evaluate-only exchange too; a client that never trained is measured as it is."""
    _, tracker = go(experiment)
    loop = by_hand(session, experiment, tracker)
    found = [event["evaluation"]["loss"] for event in (*tracker.of("round"), *tracker.of("final"))]
    assert found == pytest.approx([one["loss"] for one in loop.evaluations], abs=1e-5)
    shared = ByHand(session, experiment)
    shared.shared = loop.shared
    shared.measure(session.source.client_ids)
    assert found[-1] != pytest.approx(shared.evaluations[0]["loss"], abs=1e-3)


def test_each_client_s_next_effective_weight_is_its_own_b_times_the_mean_a(
    go: Callable[..., Run], experiment: ExperimentConfig, real_session: Session, tmp_path: Path
) -> None:
    class Watched(FedSALoRA):
        before: dict[str, AdapterState]

        def start(self, state: GlobalState, phase: int) -> Accumulator:
            rounds.append({})
            weights.append({})
            inner = super().start(state, phase)

            class Watching:
                finish = inner.finish

                def add(self, update: Any, weight: float) -> None:
                    own = own_of(tmp_path / "clients", real_session, update.client_id)
                    sent = {name: state.adapter.tensors[name] + move for name, move in update.delta.items()}
                    rounds[-1][update.client_id] = with_own(state.adapter, {**own, **sent})
                    weights[-1][update.client_id] = weight
                    inner.add(update, weight)

            return Watching()

    rounds: list[dict[str, AdapterState]] = []
    weights: list[dict[str, float]] = []
    made = []
    for number in (1, 2, 3):
        rounds.clear()
        weights.clear()
        for path in sorted((tmp_path / "clients").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        strategy, _ = go(replace(experiment, rounds=number), rule=Watched())
        made.append(strategy.server.adapter)
        after, shares = rounds[-1], weights[-1]
        for client in after:
            own = own_of(tmp_path / "clients", real_session, client)
            truth = dense_mean({one: with_own(adapter, own) for one, adapter in after.items()}, shares)
            found = effective_of(with_own(made[-1], own))
            size = float(torch.stack([matrix.norm() for matrix in truth.values()]).norm())
            assert size > 0
            assert all(float((found[name] - truth[name]).norm()) <= 1e-6 * size for name in truth)


def test_b_and_the_head_never_travel_up_and_the_server_s_stay(
    go: Callable[..., Run], experiment: ExperimentConfig, real_session: Session
) -> None:
    strategy, _ = go(experiment)
    for name, tensor in strategy.server.adapter.tensors.items():
        moved = not torch.equal(tensor, real_session.initial.tensors[name])
        assert moved == (group_of(name) == "factor_a"), name


class Killed(RegistryPublisher):
    """A server that dies when it wants to publish a round, after all clients answered."""

    at = 3

    def publish(self, training: TrainingState, **details: Any) -> VersionManifest:
        if training.round_number == self.at:
            raise KeyboardInterrupt
        return super().publish(training, **details)


def killed(config: ExperimentConfig, session: Session, registry: Registry) -> Killed:
    return Killed(
        registry, config, run_id="run", base_digest=session.adapter.base.base_digest, method="fedsa + sgd"
    )  # fmt: skip


def saved(registry: Registry) -> tuple[TrainingState, str]:
    last = max(registry.versions("run"), key=lambda record: record.manifest.round_number)
    return TrainingState.from_bytes(registry.training_state(last.version_id) or b""), last.version_id


def test_a_run_killed_after_the_clients_answered_goes_on_as_if_it_was_not(
    go: Callable[..., Run],
    experiment: ExperimentConfig,
    real_session: Session,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clients have trained round 3 already; the resumed run asks them for it once more."""
    whole, before = go(experiment)
    monkeypatch.setenv("FEDPEFT_CLIENT_STORE", str(tmp_path / "killed"))
    with Registry.open(tmp_path / "registry") as registry:
        with pytest.raises(RunInterrupted):
            go(experiment, publisher=killed(experiment, real_session, registry))
        again, after = go(experiment, resume=saved(registry))
    assert all(torch.equal(again.server.adapter.tensors[n], t) for n, t in whole.server.adapter.tensors.items())
    for client in real_session.source.client_ids:
        own, other = (own_of(tmp_path / name, real_session, client) for name in ("killed", "clients"))
        assert all(torch.equal(own[name], tensor) for name, tensor in other.items())
    assert after.of("final")[0]["evaluation"] == before.of("final")[0]["evaluation"]


class Unlucky(FedSALoRA):
    """Some of its rounds cannot be combined: the global adapter stays as it was."""

    def __init__(self, missed: Iterable[int]) -> None:
        self._missed, self._number = set(missed), 0

    def start(self, state: GlobalState, phase: int) -> Accumulator:
        self._number += 1
        inner, lost = super().start(state, phase), self._number in self._missed

        class Losing:
            add = inner.add

            def finish(self) -> Any:
                if lost:
                    raise AggregationError("lost")
                return inner.finish()

        return Losing()


def test_a_missed_round_is_done_again_from_where_it_began(
    go: Callable[..., Run],
    experiment: ExperimentConfig,
    real_session: Session,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rounds 2 to 4 are lost, then the server is killed: it resumes after round 1, three rounds back."""
    experiment = replace(experiment, selection=replace(experiment.selection, fraction=1.0))
    whole, _ = go(experiment)
    monkeypatch.setenv("FEDPEFT_CLIENT_STORE", str(tmp_path / "unlucky"))
    with Registry.open(tmp_path / "registry") as registry:
        go(replace(experiment, rounds=4), rule=Unlucky((2, 3, 4)), registry=registry)
        again, _ = go(experiment, resume=saved(registry))
    assert all(torch.equal(again.server.adapter.tensors[n], t) for n, t in whole.server.adapter.tensors.items())
    for client in real_session.source.client_ids:
        own, other = (own_of(tmp_path / name, real_session, client) for name in ("unlucky", "clients"))
        assert all(torch.equal(own[name], tensor) for name, tensor in other.items())


def test_a_damaged_store_is_one_client_s_clear_refusal(
    go: Callable[..., Run], experiment: ExperimentConfig, real_session: Session, tmp_path: Path
) -> None:
    everybody = replace(experiment, rounds=1, selection=replace(experiment.selection, fraction=1.0))
    first, _ = go(everybody)
    state = first.server.training_state(1)
    store = ClientStore(tmp_path / "clients", run_id="run", client_id="client-001")
    (store.folder / "1" / "kept").write_bytes(b"\0" * 100)
    _, tracker = go(replace(everybody, rounds=2), resume=(state, first.version_id))
    outcomes = {event["client_id"]: event for event in tracker.of("client")}
    assert {name: event["status"] for name, event in outcomes.items()} == {
        "client-000": "ok", "client-001": "failed", "client-002": "ok",
    }  # fmt: skip
    assert outcomes["client-001"]["reason"] == "DataError"
    assert (
        "is damaged: its bytes are not those that were written; set that folder aside"
        in outcomes["client-001"]["message"]
    )
    assert str(tmp_path) not in outcomes["client-001"]["message"]
    assert [event["client_id"] for event in tracker.of("final")[0]["refused"]] == ["client-001"]


def test_versions_are_stored_but_no_channel_moves_to_them(
    go: Callable[..., Run], experiment: ExperimentConfig, tmp_path: Path
) -> None:
    with Registry.open(tmp_path / "registry") as registry:
        go(replace(experiment, rounds=2), registry=registry)
        records = registry.versions("run")
        assert [record.manifest.servable for record in records] == [True, False, False]
        assert registry.channels() == {}


@pytest.mark.parametrize(("rule", "personal"), [("fedsa", True), ("fedit", False)])
def test_a_run_says_whether_its_clients_keep_a_part(
    experiment: ExperimentConfig, tmp_path: Path, rule: str, personal: bool
) -> None:
    strategy = replace(experiment.strategy, rule=rule)
    summary = simulate(replace(experiment, rounds=1, strategy=strategy, run_dir=str(tmp_path / "run")), client_app())
    (event,) = [one for one in read_events(summary.run_dir / "metrics.jsonl") if one["event"] == "run"]
    assert event["personal"] == personal
    assert any("no version of this run can be served" in note for note in event["notes"]) == personal
    with Registry.open(summary.registry) as registry:
        record = registry.get(summary.version_id)
        assert record.manifest.servable != personal
        if personal:
            with pytest.raises(DeviceError, match=r"^version \w{12} cannot be served: its clients hold the rest"):
                verify(
                    record.manifest,
                    registry.weights(record.version_id),
                    version_id=record.version_id,
                    base_digest=record.manifest.base_digest,
                )
