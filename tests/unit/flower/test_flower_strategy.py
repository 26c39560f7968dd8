"""DeltaStrategy on the in-process Grid with fake clients: rounds, quorum, adoption, resumption, Flower's Result."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result

from federated.aggregation import FedIT, NextPhase
from federated.errors import AggregationError, NotEnoughUpdates, RegistryError, RunInterrupted
from federated.flower import DeltaStrategy, InProcessGrid
from federated.flower.publisher import RegistryPublisher, TrainingState
from federated.flower.records import Assignment
from federated.flower.selection import Standing
from federated.registry import Registry

Make = Callable[..., Any]


def useless(message: Message, task: Any) -> Message:
    """An answer that no round takes."""
    return Message(RecordDict(), reply_to=message)


@pytest.fixture
def useless_in(honest: Make) -> Make:
    """Answers that are useless in some rounds and honest in the others."""

    def make(*rounds: int) -> Callable[[Message, Any], Message]:
        return lambda message, task: (useless if task.round_number in rounds else honest)(message, task)

    return make


def digests(made: Any) -> list[str | None]:
    return [event["weights_digest"] for event in made.events("round")]


def near(made: Any, name: str, value: float) -> bool:
    return bool(torch.allclose(torch.tensor(made.tensors[name]), torch.tensor(value), rtol=1e-6))


class TestRounds:
    def test_each_round_moves_by_the_weighted_mean(self, federation: Make):
        """Clients weigh 10, 20, 30 and move by 1/7, 2/7, 3/7: the mean is 14/42 = 1/3 per round."""
        made = federation(rounds=2)
        result = made.run()
        assert near(made, "q.factor_a", 0.25 + 2 / 3)
        assert near(made, "q.factor_b", -0.25 + 2 / 9)
        assert result.arrays.to_torch_state_dict()["q.factor_a"].tolist() == made.tensors["q.factor_a"]

    def test_clients_may_count_once_each(self, federation: Make):
        made = federation(rounds=1, strategy={"weighted": False})
        made.run()
        assert near(made, "q.factor_a", 0.25 + 2 / 7)

    def test_the_server_optimizer_moves_it(self, federation: Make):
        made = federation(rounds=1, strategy={"server_optimizer": {"name": "sgd", "learning_rate": 0.5}})
        made.run()
        assert near(made, "q.factor_a", 0.25 + 1 / 6)

    def test_flower_gets_its_result(self, federation: Make):
        result = federation(rounds=2).run()
        assert isinstance(result, Result)
        assert {name: tuple(array.shape) for name, array in result.arrays.items()} == {
            "q.factor_a": (2, 3),
            "q.factor_b": (2, 2),
        }
        assert list(result.train_metrics_clientapp) == [1, 2]
        assert result.train_metrics_clientapp[1] == MetricRecord({"num_examples": 60.0, "train_loss": 140 / 60})
        assert list(result.evaluate_metrics_clientapp) == [2]
        assert result.evaluate_metrics_clientapp[2]["loss"] == pytest.approx((2 * 4 + 3 * 5 + 4 * 6) / 15)
        assert result.evaluate_metrics_serverapp == {}

    def test_events_tell_the_story_in_order(self, federation: Make):
        made = federation(rounds=2)
        made.run()
        one_round = ["round_start", "client", "client", "client", "round"]
        assert [event["event"] for event in made.tracker.events] == ["joined"] * 3 + [*one_round, *one_round, "final"]

    def test_each_version_is_the_next_one_s_parent(self, federation: Make):
        made = federation(rounds=3)
        made.run()
        rounds, starts = made.events("round"), made.events("round_start")
        assert [event["parent"] for event in rounds] == [event["version_id"] for event in starts]
        assert [event["version_id"] for event in rounds[:2]] == [event["version_id"] for event in starts[1:]]
        assert made.events("final")[0]["version_id"] == rounds[-1]["version_id"] == made.strategy.version_id

    def test_a_round_s_evaluation_is_of_the_version_that_it_started_from(self, federation: Make):
        made = federation(rounds=1)
        made.run()
        (event,) = made.events("round")
        assert event["evaluation"]["version_id"] == event["parent"] != event["version_id"]

    def test_bytes_and_examples_are_counted(self, federation: Make):
        made = federation(rounds=1)
        made.run()
        (event,), clients = made.events("round"), made.events("client")
        assert event["bytes_up"] == sum(client["bytes_up"] for client in clients) > 300
        assert event["bytes_down"] == sum(client["bytes_down"] for client in clients) > 300
        assert {client["client_id"]: client["num_examples"] for client in clients} == {
            "client-000": 10,
            "client-001": 20,
            "client-002": 30,
        }

    def test_only_the_cohort_is_asked(self, federation: Make):
        made = federation(rounds=4, selection={"fraction": 0.5})
        made.run(clients=4)
        asked: dict[int, list[str]] = {}
        for event in made.events("client"):
            asked.setdefault(event["round_number"], []).append(event["client_id"])
        cohorts = {event["round_number"]: event["cohort"] for event in made.events("round_start")}
        assert {number: sorted(names) for number, names in asked.items()} == cohorts
        assert {len(cohort) for cohort in cohorts.values()} == {2}
        assert len({tuple(cohort) for cohort in cohorts.values()}) > 1

    @pytest.mark.parametrize(("share", "asked"), [(1.0, 4), (0.5, 2), (0.01, 1)])
    def test_a_share_measures_the_last_adapter(
        self, federation: Make, fake_app: Make, *, share: float, asked: int
    ) -> None:
        made = federation(selection={"fraction_evaluate": share})
        with InProcessGrid(fake_app(), 4) as grid:
            messages = [
                made.strategy.configure_evaluate(number, made.strategy.initial_arrays(), ConfigRecord(), grid)
                for number in (1, 1, 2, 3, 4)
            ]
        nodes = [tuple(sorted(message.metadata.dst_node_id for message in sent)) for sent in messages]
        assert [len(one) for one in nodes] == 5 * [asked]
        assert nodes[0] == nodes[1]
        assert (len(set(nodes)) > 1) == (share < 1)

    def test_who_answered_and_with_how_much_is_remembered(self, federation: Make, useless_in: Make):
        made = federation(rounds=3, round={"quorum": 0.6})
        made.run(script={"client-001": useless_in(2), "client-002": useless_in(1, 2)})
        assert [event["published"] for event in made.events("round")] == [True, False, True]
        assert made.strategy.server.standings == {
            "client-000": Standing(10, (True, True, True)),
            "client-001": Standing(20, (True, False, True)),
            "client-002": Standing(30, (False, False, True)),
        }

    def test_the_policy_decides_who_is_asked(self, federation: Make):
        """Clients hold 10 to 80 examples; under round_robin all come equally often, under by_examples they do not."""
        asked = {}
        for policy in ("round_robin", "by_examples"):
            made = federation(rounds=16, selection={"policy": policy, "fraction": 0.25})
            made.run(clients=8)
            names = [name for event in made.events("round_start") for name in event["cohort"]]
            asked[policy] = [names.count(f"client-{number:03d}") for number in range(8)]
        assert asked["round_robin"] == [4] * 8
        assert sum(asked["by_examples"][4:]) > sum(asked["by_examples"][:4])

    def test_counters_are_remembered(self, federation: Make):
        made = federation(rounds=3)
        made.run()
        assert made.strategy.server.counters == {f"client-{number:03d}": 3 for number in range(3)}

    def test_no_round_at_all_still_evaluates(self, federation: Make):
        made = federation()
        result = made.run(num_rounds=0)
        assert made.events("round") == []
        assert list(result.evaluate_metrics_clientapp) == [0]
        assert near(made, "q.factor_b", -0.25)

    def test_the_caller_s_number_of_rounds_wins(self, federation: Make):
        made = federation(rounds=1)
        made.run(num_rounds=3)
        assert len(made.events("round")) == 3

    @pytest.mark.parametrize("shuffle", [0, 1, 2])
    def test_the_order_of_arrival_leaves_no_trace(self, federation: Make, shuffle: int):
        plain, shuffled = federation(rounds=3), federation(rounds=3)
        plain.run(clients=6)
        shuffled.run(clients=6, grid={"shuffle": shuffle})
        assert digests(shuffled) == digests(plain)
        orders = [[event["client_id"] for event in made.events("client")] for made in (plain, shuffled)]
        assert orders[0] != orders[1]

    def test_a_run_without_a_name_gets_one_of_its_own(self, federation: Make):
        names = {federation({"run_id": None}, name="story").strategy.run_id for _ in range(3)}
        assert len(names) == 3
        assert all(name.startswith("story-") for name in names)

    def test_from_a_config_it_starts_at_that_model_s_first_adapter(self, real_config: Any, real_session: Any):
        made = DeltaStrategy.from_config(real_config)
        first = real_session.initial.tensors
        assert all(torch.equal(made.server.adapter.tensors[name], tensor) for name, tensor in first.items())
        assert made.version_id is None

    def test_the_method_is_said_in_words(self, federation: Make, caplog: pytest.LogCaptureFixture):
        made = federation(strategy={"server_optimizer": {"name": "adam", "learning_rate": 0.01}})
        assert made.strategy.method == "fedit + adam"
        with caplog.at_level("INFO"):
            made.strategy.summary()
        assert "DeltaStrategy: fedit + adam, 2 rounds, run run" in caplog.text


class TestQuorum:
    def test_too_few_good_replies_leave_the_version_and_the_run_goes_on(self, federation: Make, useless_in: Make):
        made = federation(rounds=3, round={"quorum": 0.6})
        result = made.run(script={"client-000": useless_in(2), "client-001": useless_in(2)})
        first, second, third = made.events("round")
        assert [event["published"] for event in (first, second, third)] == [True, False, True]
        assert second["version_id"] == second["parent"] == first["version_id"] == third["parent"]
        assert second["message"] == ("1 good updates of 3, the quorum is 2: the global adapter stays as it was")
        assert first["message"] is None
        assert (second["weights_digest"], second["participants"], second["update_norm"]) == (None, 1, 0.0)
        assert list(result.train_metrics_clientapp) == [1, 3]
        assert near(made, "q.factor_a", 0.25 + 2 / 3)

    @pytest.mark.parametrize(
        ("quorum", "bad", "published"), [(1.0, 0, True), (1.0, 1, False), (0.5, 2, True), (0.51, 2, False)]
    )
    def test_the_quorum_is_a_share_of_the_cohort_rounded_up(
        self, federation: Make, quorum: float, bad: int, published: bool
    ):
        made = federation(rounds=1, round={"quorum": quorum})
        made.run(clients=4, script={f"client-{number:03d}": useless for number in range(bad)})
        assert made.events("round")[0]["published"] is published

    def test_when_all_fail_nothing_is_published_and_nothing_raises(self, federation: Make, tmp_path: Path):
        with Registry.open(tmp_path / "registry") as registry:
            registry.require_base("b" * 64)
            made = federation({"publisher": publisher(registry, federation().strategy.config)}, rounds=2)
            result = made.run(script={f"client-{number:03d}": useless for number in range(3)})
            assert [record.manifest.round_number for record in registry.versions("run")] == [0]
        assert near(made, "q.factor_a", 0.25)
        assert result.arrays.to_torch_state_dict()["q.factor_a"].tolist() == made.tensors["q.factor_a"]
        assert result.train_metrics_clientapp == {}
        assert result.evaluate_metrics_clientapp == {}
        assert [len(event["refused"]) for event in made.events("round")] == [3, 3]
        assert made.events("final")[0]["evaluation"] is None

    def test_what_the_rule_refuses_is_a_refusal(self, federation: Make):
        class Picky(FedIT):
            def start(self, state: Any, phase: int) -> Any:
                inner = super().start(state, phase)
                accept = inner.add

                def add(update: Any, weight: float) -> None:
                    if update.client_id == "client-001":
                        raise AggregationError("not this one")
                    accept(update, weight)

                inner.add = add  # type: ignore[method-assign]
                return inner

        made = federation({"rule": Picky()}, rounds=1)
        made.run()
        (event,) = made.events("round")
        assert event["refused"] == [{"client_id": "client-001", "reason": "not_combinable", "message": "not this one"}]
        assert [e["status"] for e in made.events("client") if e["client_id"] == "client-001"] == ["refused"]
        assert near(made, "q.factor_a", 0.25 + (10 / 7 + 90 / 7) / 40)

    def test_a_second_phase_is_an_exchange_with_those_who_answered_well(self, federation: Make, honest: Make):
        class TwoPhases(FedIT):
            def start(self, state: Any, phase: int) -> Any:
                inner = super().start(state, 1)
                if phase == 1:
                    inner.finish = lambda: NextPhase(state, 2)  # type: ignore[method-assign,assignment]
                return inner

            def plan(self, state: Any, client: Any, phase: int) -> Any:
                plan, payload = super().plan(state, client, 1)
                return replace(plan, phase=phase), payload

        asked: list[tuple[str, int]] = []

        def answer(message: Message, task: Assignment) -> Message:
            asked.append((task.client_id, task.plan.phase))
            if task.client_id == "client-001":
                raise RuntimeError("gone")
            return honest(message, task, counter=task.plan.phase)

        made = federation({"rule": TwoPhases()}, rounds=1)
        made.run(script=dict.fromkeys(("client-000", "client-001", "client-002"), answer))
        phases = [(name, phase) for name, phase in asked if phase <= 2][:5]
        assert sorted(phases) == [("client-000", 1), ("client-000", 2), ("client-001", 1), ("client-002", 1),
                                  ("client-002", 2)]  # fmt: skip
        (event,) = made.events("round")
        assert (event["participants"], event["cohort"], event["published"]) == (2, 3, True)
        assert [refusal["client_id"] for refusal in event["refused"]] == ["client-001"]
        sizes = [e["bytes_up"] for e in made.events("client") if e["client_id"] == "client-000"]
        assert event["bytes_up"] == 2 * sum(sizes)

    def test_a_rule_that_never_ends_misses_the_round(self, federation: Make):
        class Endless(FedIT):
            def start(self, state: Any, phase: int) -> Any:
                inner = super().start(state, 1)
                inner.finish = lambda: NextPhase(state, phase)  # type: ignore[method-assign,assignment]
                return inner

        made = federation({"rule": Endless()}, rounds=1)
        made.run()
        (event,) = made.events("round")
        assert not event["published"]
        assert "fedit asks for phase 1 after phase 1" in event["message"]


def publisher(registry: Registry | None, config: Any) -> RegistryPublisher:
    return RegistryPublisher(registry, config, run_id="run", base_digest="b" * 64, method="fedit + sgd")


def arrays(value: float, **changes: torch.Tensor) -> ArrayRecord:
    tensors = {"q.factor_a": torch.full((2, 3), value), "q.factor_b": torch.full((2, 2), value), **changes}
    return ArrayRecord(torch_state_dict=OrderedDict(tensors))


class TestFlower:
    def test_arrays_handed_in_are_where_the_first_round_starts(self, federation: Make):
        made = federation(rounds=1)
        made.run(initial_arrays=arrays(10.0))
        assert near(made, "q.factor_a", 10.0 + 1 / 3)

    def test_its_own_arrays_handed_in_change_nothing(self, federation: Make):
        plain, handed = federation(rounds=1), federation(rounds=1)
        plain.run()
        handed.run(initial_arrays=handed.strategy.initial_arrays())
        assert digests(handed) == digests(plain)

    @pytest.mark.parametrize(
        "change",
        [{"stranger": torch.zeros(1)}, {"q.factor_a": torch.zeros(3)}, {"q.factor_a": torch.full((2, 3), torch.nan)}],
    )
    def test_arrays_that_do_not_fit_end_it_before_anybody_is_asked(self, federation: Make, change: dict[str, Any]):
        made = federation(rounds=1)
        with pytest.raises(AggregationError):
            made.run(initial_arrays=arrays(1.0, **change))
        assert made.tracker.events == []

    def test_evaluate_fn_sees_every_global_adapter(self, federation: Make):
        seen = {}

        def evaluate(number: int, given: ArrayRecord) -> MetricRecord | None:
            seen[number] = given.to_torch_state_dict()["q.factor_a"][0, 0].item()
            return None if number == 1 else MetricRecord({"loss": float(number)})

        result = federation(rounds=2).run(evaluate_fn=evaluate)
        assert seen == {0: 0.25, 1: pytest.approx(0.25 + 1 / 3), 2: pytest.approx(0.25 + 2 / 3)}
        assert result.evaluate_metrics_serverapp == {0: MetricRecord({"loss": 0.0}), 2: MetricRecord({"loss": 2.0})}

    def test_what_evaluate_fn_does_to_the_arrays_stays_with_it(self, federation: Make):
        def spoil(number: int, given: ArrayRecord) -> None:
            for name in list(given):
                del given[name]

        made = federation(rounds=2)
        made.run(evaluate_fn=spoil)
        assert near(made, "q.factor_a", 0.25 + 2 / 3)

    def test_flower_s_timeout_is_the_deadline(self, federation: Make):
        made = federation(rounds=1)
        made.run(timeout=12.5)
        assert made.strategy.config.round.deadline == 12.5

    def test_an_aggregation_that_was_not_configured_is_refused(self, federation: Make):
        made = federation()
        with pytest.raises(AggregationError, match="round 1 was not configured"):
            made.strategy.aggregate_train(1, [])
        with pytest.raises(AggregationError, match="round 3 was not configured"):
            made.strategy.aggregate_evaluate(3, [])

    def test_a_round_is_aggregated_once(self, federation: Make, fake_app: Make):
        made = federation()
        with InProcessGrid(fake_app(), 2) as grid:
            sent = made.strategy.configure_train(1, made.strategy.initial_arrays(), ConfigRecord(), grid)
            made.strategy.aggregate_train(1, grid.send_and_receive(sent))
            with pytest.raises(AggregationError, match="round 1 was not configured"):
                made.strategy.aggregate_train(1, [])

    def test_each_step_can_be_driven_by_hand(self, federation: Make, fake_app: Make):
        """As Flower's own loop does, with its batch of replies."""
        made, plain = federation(), federation(rounds=1)
        plain.run()
        with InProcessGrid(fake_app(), 3) as grid:
            sent = made.strategy.configure_train(1, made.strategy.initial_arrays(), ConfigRecord(), grid)
            moved, metrics = made.strategy.aggregate_train(1, list(grid.send_and_receive(sent)))
            assert moved is not None
            assert metrics == MetricRecord({"num_examples": 60.0, "train_loss": 140 / 60})
            sent = made.strategy.configure_evaluate(1, moved, ConfigRecord(), grid)
            assert made.strategy.aggregate_evaluate(1, grid.send_and_receive(sent))["accuracy"] == 0.5
        assert made.tensors == plain.tensors

    def test_no_client_at_all_is_said(self, federation: Make):
        made = federation(selection={"min_clients": 2, "wait": 0.02})
        with pytest.raises(NotEnoughUpdates, match=r"1 clients answered within 0\.02 s, expected 2"):
            made.run(clients=1)

    def test_a_node_without_a_name_takes_no_part_and_is_reported(self, federation: Make, fake_app: Make):
        app = fake_app()
        named = app._registered_funcs["query.default"]

        def query(message: Message, context: Any) -> Message:
            if context.node_config["partition-id"] == 1:
                raise ValueError("no name")
            return named(message, context)

        app._registered_funcs["query.default"] = query
        made = federation(rounds=1)
        with InProcessGrid(app, 3) as grid:
            made.strategy.start(grid)
        (problem,) = made.events("node_problem")
        assert (problem["node_id"], problem["message"]) == ("2", "ValueError: no name")
        assert made.events("round_start")[0]["cohort"] == ["client-000", "client-002"]


class TestStopping:
    def test_ctrl_c_names_the_round_and_keeps_what_is_finished(self, federation: Make, honest: Make):
        def interrupts(message: Message, task: Any) -> Message:
            if task.round_number == 2:
                raise KeyboardInterrupt
            return honest(message, task)

        made = federation(rounds=3)
        with pytest.raises(RunInterrupted, match="stopped in round 2 of 3; finished rounds are published"):
            made.run(script={"client-001": interrupts})
        assert len(made.events("round")) == 1
        assert near(made, "q.factor_a", 0.25 + 1 / 3)

    def test_a_registry_that_refuses_ends_the_run(self, federation: Make):
        class Full:
            def publish(self, training: TrainingState, **_: Any) -> Any:
                raise RegistryError("no space")

        with pytest.raises(RegistryError, match="no space"):
            federation({"publisher": Full()}, rounds=1).run()

    @pytest.mark.parametrize("optimizer", ["sgd", "adam"])
    def test_a_resumed_run_is_the_run_that_was_never_stopped(self, federation: Make, tmp_path: Path, optimizer: str):
        changes: dict[str, Any] = {
            "strategy": {"server_optimizer": {"name": optimizer, "learning_rate": 0.5}},
            "selection": {"fraction": 0.5},
        }
        whole = federation(rounds=4, **changes)
        whole.run(clients=4)
        with Registry.open(tmp_path / "registry") as registry:
            registry.require_base("b" * 64)
            first = federation({"publisher": publisher(registry, whole.strategy.config)}, rounds=2, **changes)
            first.run(clients=4)
            version = first.strategy.version_id
            saved = TrainingState.from_bytes(registry.training_state(version) or b"")
        resumed = federation({"resume": (saved, version)}, rounds=4, **changes)
        seen: list[int] = []
        resumed.run(clients=4, evaluate_fn=lambda number, _: seen.append(number))
        assert digests(first) + digests(resumed) == digests(whole)
        assert [event["cohort"] for event in resumed.events("round_start")] == [
            event["cohort"] for event in whole.events("round_start")[2:]
        ]
        assert resumed.strategy.server.counters == whole.strategy.server.counters
        assert resumed.events("round")[0]["parent"] == version
        assert seen == [2, 3, 4]

    @pytest.mark.parametrize("policy", ["uniform", "by_examples", "round_robin", "availability"])
    @pytest.mark.parametrize("stop", [1, 3, 5])
    def test_a_resumed_run_asks_the_clients_that_it_would_have_asked(
        self, federation: Make, useless_in: Make, policy: str, stop: int
    ):
        """Of eight clients two fail now and then; what is known of all is saved with each version."""
        changes: dict[str, Any] = {"selection": {"policy": policy, "fraction": 0.5}, "round": {"quorum": 0.1}}
        script = {"client-003": useless_in(1, 2, 3, 4), "client-005": useless_in(2, 4, 5)}
        whole, first = federation(rounds=7, **changes), federation(rounds=stop, **changes)
        whole.run(clients=8, script=script)
        first.run(clients=8, script=script)
        saved = TrainingState.from_bytes(first.strategy.server.training_state(stop).to_bytes())
        resumed = federation({"resume": (saved, first.strategy.version_id)}, rounds=7, **changes)
        resumed.run(clients=8, script=script)
        cohorts, again = ([event["cohort"] for event in made.events("round_start")] for made in (whole, resumed))
        assert again == cohorts[stop:]
        assert resumed.strategy.server.standings == whole.strategy.server.standings
        assert digests(resumed) == digests(whole)[stop:]

    def test_a_run_that_is_finished_resumes_to_its_evaluation(self, federation: Make):
        first = federation(rounds=1)
        first.run()
        state = first.strategy.server.training_state(1)
        resumed = federation({"resume": (state, first.strategy.version_id)}, rounds=1)
        result = resumed.run()
        assert resumed.events("round") == []
        assert list(result.evaluate_metrics_clientapp) == [1]
        assert resumed.tensors == first.tensors
