"""Robust rules in whole rounds: hostile and missing clients by real messages, waiting for enough, what is served."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from federated.adapters import shell
from federated.aggregation import RULES, make_rule
from federated.config import ExperimentConfig
from federated.errors import ConfigError, NotEnoughUpdates
from federated.flower import DeltaStrategy, InProcessGrid, handle_query, handle_train, open_session
from federated.flower.adapter_packets import parse_adapter_packet
from federated.flower.records import Assignment, packet_of
from federated.state import AdapterState
from federated.testing import ADVERSARIES, Scene, effective_of
from federated.tracking import MemoryTracker

Make = Callable[..., Any]
ROBUST = sorted(name for name in RULES if make_rule(name).properties.robust)
every_rule = pytest.mark.parametrize("name", ROBUST)


def strategy_of(name: str, **options: Any) -> dict[str, Any]:
    return {"rule": name, "weighted": False, "options": options}


def own(client_id: str) -> dict[str, torch.Tensor]:
    """An honest client's delta: what all learn, and a little of its own."""
    number = int(client_id.rpartition("-")[2])
    common, mine = torch.Generator().manual_seed(7), torch.Generator().manual_seed(100 + number)
    shapes = {"q.factor_a": (2, 3), "q.factor_b": (2, 2)}
    return {
        name: 0.5 * torch.randn(shape, generator=common) + 0.01 * torch.randn(shape, generator=mine)
        for name, shape in shapes.items()
    }


@pytest.fixture
def honest_answer(honest: Make) -> Make:
    return lambda message, task: honest(message, task, delta=own(task.client_id), num_examples=10)


@pytest.fixture
def hostile_answer(honest: Make) -> Make:
    """Answers like one of the adversaries, and claims as many examples as it may."""

    def make(adversary: str, count: int) -> Callable[[Message, Assignment], Message]:
        def answer(message: Message, task: Assignment) -> Message:
            received = parse_adapter_packet(packet_of(message.content))
            others = {f"client-{number:03d}": own(f"client-{number:03d}") for number in range(5)}
            scene = Scene(received, others, count, torch.Generator().manual_seed(0))
            return honest(message, task, delta=ADVERSARIES[adversary](scene), num_examples=1_000_000)

        return answer

    return make


def product(adapter: AdapterState) -> torch.Tensor:
    return effective_of(adapter)["q"]


def gap(adapter: AdapterState, other: AdapterState) -> float:
    return float((product(adapter) - product(other)).norm() / product(other).norm())


class Field:
    """A federation of fake clients, of which some are hostile."""

    def __init__(self, federation: Make, honest: Make, hostile: Make, clients: int) -> None:
        self._federation, self._honest, self._hostile, self.clients = federation, honest, hostile, clients

    def run(self, strategy: Mapping[str, Any], adversary: str | None = None, count: int = 0, **parts: Any) -> Any:
        made = self._federation(rounds=1, strategy=dict(strategy), **parts)
        script = {f"client-{number:03d}": self._honest for number in range(self.clients)}
        if adversary is not None:
            script |= dict.fromkeys(sorted(script)[-count:], self._hostile(adversary, count))
        made.run(self.clients, script)
        return made


@pytest.fixture
def field(federation: Make, honest_answer: Make, hostile_answer: Make) -> Field:
    return Field(federation, honest_answer, hostile_answer, 7)


@every_rule
@pytest.mark.parametrize("adversary", ["scaled", "gauge_scale", "gaussian"])
def test_a_hostile_client_s_message_moves_the_adapter_little(field: Field, name: str, adversary: str) -> None:
    """It passes admission: names, shapes and envelope are right, and claims of examples are within bounds."""
    calm = field.run(strategy_of(name)).strategy.server.adapter
    found = field.run(strategy_of(name), adversary, 1)
    assert [event["status"] for event in found.events("client")] == ["ok"] * 7
    assert gap(found.strategy.server.adapter, calm) < (0.4 if name == "norm_bound" else 0.05)
    told = found.events("round")[0]["rule"]
    assert told["updates"] == 7.0
    assert all(isinstance(value, float) for value in told.values())


@pytest.mark.parametrize("adversary", ["scaled", "gauge_scale"])
def test_the_same_message_spoils_a_plain_mean(field: Field, adversary: str) -> None:
    plain = {"rule": "fedit", "weighted": False}
    calm = field.run(plain).strategy.server.adapter
    assert gap(field.run(plain, adversary, 1).strategy.server.adapter, calm) > 0.5


@every_rule
def test_clients_that_are_missing_make_a_round_of_fewer(field: Field, name: str) -> None:
    """As long as enough are left; else the round is missed, says why, and the adapter stays."""
    needed = make_rule(name).properties.min_updates
    field.clients = needed + 1
    made = field._federation(rounds=2, strategy=strategy_of(name))

    def silent(first: int) -> Callable[[Message, Assignment], Message]:
        def answer(message: Message, task: Assignment) -> Message:
            if task.round_number >= first and task.plan.mode == "train":
                return Message(RecordDict(), reply_to=message)
            return field._honest(message, task)

        return answer

    script = dict.fromkeys((f"client-{number:03d}" for number in range(field.clients)), field._honest)
    made.run(field.clients, {**script, "client-000": silent(1), "client-001": silent(2)})
    first, second = made.events("round")
    assert (first["published"], first["participants"]) == (True, needed)
    assert (second["published"], second["participants"]) == (False, needed - 1)
    assert f"{needed - 1} good updates: {name} needs at least {needed} (n >= " in second["message"]
    assert first["weights_digest"] is not None
    assert second["version_id"] == first["version_id"]


def test_a_run_waits_for_as_many_clients_as_the_rule_needs(federation: Make) -> None:
    made = federation(strategy=strategy_of("krum"), selection={"wait": 0.05})
    with pytest.raises(
        NotEnoughUpdates, match=r"4 clients answered within 0.05 s, expected 5 \(the rule needs so many"
    ):
        made.run(4)
    half = federation(strategy=strategy_of("krum"), selection={"wait": 0.05, "fraction": 0.5})
    with pytest.raises(NotEnoughUpdates, match="expected 9"):
        half.run(8)


def test_a_promise_that_is_too_small_is_refused_at_once(federation: Make) -> None:
    with pytest.raises(ConfigError, match=r"selection\.min_clients = 4 .* krum needs at least 5 updates"):
        federation(strategy=strategy_of("krum"), selection={"min_clients": 4})


def test_options_reach_the_rule(field: Field) -> None:
    told = field.run(strategy_of("multi_krum", byzantine=2, keep=2, space="factor")).events("round")[0]["rule"]
    assert told["filtered_out"] == 5.0


def client_app() -> ClientApp:
    app = ClientApp()
    app.query()(handle_query)
    app.train()(handle_train)
    return app


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["geometric_median", "bulyan"])
def test_a_device_serves_what_the_round_made(real_config: ExperimentConfig, name: str, dtype: str) -> None:
    """Real clients with a trained head, one rule of each space; the export in a fresh tree on the same base."""
    count = make_rule(name).properties.min_updates
    config = replace(
        real_config,
        strategy=replace(real_config.strategy, rule=name, weighted=False),
        adapter=replace(real_config.adapter, dtype=dtype),
        data=replace(real_config.data, partition=replace(real_config.data.partition, num_clients=count)),
        train=replace(real_config.train, learning_rate=0.05, steps=2),
    )
    session = open_session(config)
    base = session.adapter.base
    strategy = DeltaStrategy(
        config, initial=session.initial, base_digest=base.base_digest, tracker=MemoryTracker(clock=lambda: 0.0)
    )
    with InProcessGrid(client_app(), count) as grid:
        strategy.start(grid)
    exported = strategy.server.global_state.export()
    device = shell(base, exported.spec, seed=99)
    device.write(exported)
    served, master = effective_of(device.read()), effective_of(strategy.server.adapter)
    for layer, matrix in master.items():
        assert float((served[layer] - matrix).norm() / matrix.norm()) < (2**-6 if dtype == "bfloat16" else 1e-6)
        assert float((matrix - effective_of(session.initial)[layer]).norm()) > 0
    texts = [{"text": "rain today"}, {"text": "bread again"}]
    session.adapter.write(strategy.server.global_state.materialise())
    assert session.task.predict(device.model, texts) == session.task.predict(session.adapter.model, texts)
