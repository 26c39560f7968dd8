"""The arms that a federation is compared with: same start, same number of passes, measured on everybody's data."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from federated.config import ExperimentConfig
from federated.delta import apply
from federated.flower import Session
from federated.flower.baselines import Baseline, compare, evaluate_everywhere, full_session, train_on
from federated.manifest import TrainPlan
from federated.state import AdapterState
from federated.training import LocalData, client_seed


@pytest.fixture(scope="module")
def session(real_config: ExperimentConfig) -> Session:
    return full_session(real_config)


@pytest.fixture(scope="module")
def compared(real_config: ExperimentConfig) -> tuple[list[Baseline], AdapterState, list[str]]:
    done: list[str] = []
    arms, central = compare(real_config, workers=2, advance=done.append)
    return arms, central, done


def test_the_session_knows_the_whole_experiment(real_config: ExperimentConfig, session: Session) -> None:
    assert session.config == real_config
    assert session.config.rounds == 2


def test_everybody_s_held_out_data_is_measured(session: Session) -> None:
    pooled, detail = evaluate_everywhere(session, session.initial)
    assert list(detail) == ["client-000", "client-001", "client-002"]
    assert pooled["num_examples"] == sum(one["num_examples"] for one in detail.values()) == 12
    assert pooled["loss"] == pytest.approx(sum(one["loss"] * one["num_examples"] for one in detail.values()) / 12)


def test_central_training_pools_the_rows_and_takes_the_federation_s_passes(session: Session) -> None:
    state, metrics = train_on(session, session.source.client_ids, name="central")
    assert metrics["num_examples"] == 24.0
    assert metrics["steps"] == session.config.rounds * session.config.train.steps
    still = [name for name, tensor in state.tensors.items() if torch.equal(tensor, session.initial.tensors[name])]
    assert still == []


def test_passes_are_epochs_where_no_steps_are_given(session: Session) -> None:
    train = replace(session.config.train, steps=0, epochs=0.5)
    longer = replace(session, config=replace(session.config, train=train, rounds=4))
    _, metrics = train_on(longer, ["client-000"], name="client-000")
    assert metrics["steps"] == 0.5 * 4 * 8 / 4


def test_training_on_one_client_is_its_own_local_training(session: Session) -> None:
    once = replace(session, config=replace(session.config, rounds=1))
    state, _ = train_on(once, ["client-001"], name="client-001")
    data = LocalData(session.local_data("client-001").train)
    plan = TrainPlan(rank=2, evaluate_before=False)
    expected = session.trainer.run(session.initial, plan, data, seed=client_seed(session.config.seed, 0, "client-001"))
    by_hand = apply(session.initial, expected.delta)
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in by_hand.tensors.items())


class TestCompare:
    def test_three_arms_in_order(self, compared: Any):
        arms, _, done = compared
        assert [arm.name for arm in arms] == ["null", "local_only", "central"]
        assert sorted(done) == ["central", "client-000", "client-001", "client-002", "null"]

    def test_null_is_the_first_adapter(self, compared: Any, session: Session):
        pooled, _ = evaluate_everywhere(session, session.initial)
        assert compared[0][0].evaluation == pytest.approx(pooled, rel=1e-6)

    def test_central_is_what_training_here_gives(self, compared: Any, session: Session):
        arms, central, _ = compared
        expected, _ = train_on(session, session.source.client_ids, name="central", threads=1)
        assert all(torch.equal(central.tensors[name], tensor) for name, tensor in expected.tensors.items())
        assert arms[2].evaluation == pytest.approx(evaluate_everywhere(session, expected)[0], rel=1e-6)

    def test_local_only_is_the_mean_over_adapters_with_each_in_detail(self, compared: Any):
        arm = compared[0][1]
        assert set(arm.detail) == {"client-000", "client-001", "client-002"}
        assert arm.evaluation["loss"] == pytest.approx(sum(one["loss"] for one in arm.detail.values()) / 3)
        assert {one["num_examples"] for one in arm.detail.values()} == {12}
        assert arm.own["num_examples"] == 12

    def test_own_is_each_adapter_on_its_own_client(self, compared: Any, session: Session):
        losses = []
        for name in session.source.client_ids:
            state, _ = train_on(session, [name], name=name, threads=1)
            losses.append(evaluate_everywhere(session, state)[1][name]["loss"])
        assert compared[0][1].own["loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)

    def test_the_event_is_plain(self, compared: Any):
        event = compared[0][1].as_event()
        assert (event["event"], event["name"]) == ("baseline", "local_only")
        assert event["seconds"] >= 0
        assert set(event) == {"event", "name", "evaluation", "detail", "own", "seconds"}
