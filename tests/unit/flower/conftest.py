"""A federation without a model: fake clients that answer as real ones do, on the in-process Grid."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Result
from flwr.supercore.task_identity import TaskIdentity

from federated.config import ExperimentConfig, experiment_from
from federated.flower import DeltaStrategy, InProcessGrid, open_session
from federated.flower.adapter_packets import parse_adapter_packet
from federated.flower.records import Assignment, assignment_of, packet_of, reply_content
from federated.manifest import AdapterSpec, ModuleSpec
from federated.state import AdapterState, to_raw
from federated.tracking import MemoryTracker
from federated.wire import seal_update

BASE = "b" * 64
SPEC = AdapterSpec("lora", 2, 4.0, use_rslora=False, modules=(ModuleSpec("q", 3, 2, 2, 4.0),))
Answer = Callable[[Message, Assignment], Message]
torch.set_num_threads(1)


def make_config(**changes: Any) -> ExperimentConfig:
    """A valid experiment with quick polling."""
    quick = {"poll_interval": 0.005, "deadline": 60.0}
    plain: dict[str, Any] = {"task": {"labels": ["cold", "warm"], "max_length": 12}, "rounds": 2, **changes}
    return experiment_from({**plain, "round": {**quick, **changes.get("round", {})}})


def make_adapter(value: float = 0.25, dtype: str = "F32") -> AdapterState:
    """A tiny adapter whose factors are constant."""
    spec = replace(SPEC, dtype=dtype)
    tensors = {"q.factor_a": torch.full((2, 3), value), "q.factor_b": torch.full((2, 2), -value)}
    return AdapterState(spec, tensors).cast(dtype)


def index_of(client_id: str) -> int:
    return int(client_id.rpartition("-")[2])


def honest_metrics(client_id: str) -> dict[str, float]:
    """What a client reports: a loss and a held-out evaluation, both by its number."""
    index = index_of(client_id)
    return {
        "train_loss": 1.0 + index,
        "eval_before_loss": 2.0 + index,
        "eval_before_accuracy": 0.5,
        "eval_before_num_examples": 4.0 + index,
    }


def honest_delta(client_id: str) -> dict[str, torch.Tensor]:
    """One client's update: constant, by its number, with bits in every place."""
    step = (index_of(client_id) + 1) / 7
    return {"q.factor_a": torch.full((2, 3), step), "q.factor_b": torch.full((2, 2), step / 3)}


def honest(message: Message, task: Assignment, **changes: Any) -> Message:
    """A right answer, or one with some field of the envelope, the delta or the metrics replaced."""
    metrics = changes.pop("metrics", honest_metrics(task.client_id))
    if task.plan.mode == "evaluate":
        return Message(reply_content(task.client_id, task.task_token, metrics), reply_to=message)
    delta = changes.pop("delta", honest_delta(task.client_id))
    state = parse_adapter_packet(packet_of(message.content))
    fields: dict[str, Any] = {
        "run_id": task.run_id,
        "client_id": task.client_id,
        "round_number": task.round_number,
        "phase": task.plan.phase,
        "task_token": task.task_token,
        "counter": task.round_number,
        "parent_version": task.parent_version,
        "base_digest": task.base_digest,
        "spec": state.spec,
        "plan_digest": task.plan.digest,
        "num_examples": 10 * (index_of(task.client_id) + 1),
    }
    packet = seal_update(to_raw(delta), **{**fields, **changes})
    return Message(reply_content(task.client_id, task.task_token, metrics, packet), reply_to=message)


def fake_app(script: Mapping[str, Answer] | None = None) -> ClientApp:
    """A ClientApp that knows its name and answers honestly, unless the script has something else for that client."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        name = f"client-{int(str(context.node_config['partition-id'])):03d}"
        return Message(reply_content(name, "", {}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        task = assignment_of(message)
        return (script or {}).get(task.client_id, honest)(message, task)

    return app


class Federation:
    """Fake clients, a strategy and what it told its tracker."""

    def __init__(self, config: ExperimentConfig, **strategy: Any) -> None:
        self.tracker = MemoryTracker(clock=lambda: 0.0)
        self.strategy = DeltaStrategy(
            config,
            **{"initial": make_adapter(), "base_digest": BASE, "tracker": self.tracker, "run_id": "run", **strategy},
        )

    def run(
        self,
        clients: int = 3,
        script: Mapping[str, Answer] | None = None,
        *,
        grid: dict[str, Any] | None = None,
        **start: Any,
    ) -> Result:
        with InProcessGrid(fake_app(script), clients, **(grid or {})) as made:
            return self.strategy.start(made, **start)

    def events(self, name: str) -> list[dict[str, Any]]:
        return self.tracker.of(name)

    @property
    def tensors(self) -> dict[str, list[Any]]:
        return {name: tensor.tolist() for name, tensor in self.strategy.server.adapter.tensors.items()}


@pytest.fixture(autouse=True)
def _identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Flower builds no message outside of a task, and no test writes to the user's own client store."""
    for name, value in {"_run_id": 1, "_node_id": 0, "_task_id": 1}.items():
        monkeypatch.setattr(TaskIdentity, name, value)
    monkeypatch.setenv("FEDPEFT_CLIENT_STORE", str(tmp_path / "clients"))
    monkeypatch.delenv("FEDPEFT_APP", raising=False)


@pytest.fixture
def config() -> Callable[..., ExperimentConfig]:
    return make_config


@pytest.fixture
def federation() -> Callable[..., Federation]:
    """Make a `Federation` from changes of the config; ``parts`` are arguments for the strategy itself."""

    def make(parts: dict[str, Any] | None = None, **changes: Any) -> Federation:
        return Federation(make_config(**changes), **(parts or {}))

    return make


@pytest.fixture
def adapter() -> Callable[..., AdapterState]:
    return make_adapter


@pytest.fixture(name="honest")
def _honest() -> Callable[..., Message]:
    return honest


@pytest.fixture(name="fake_app")
def _fake_app() -> Callable[..., ClientApp]:
    return fake_app


@pytest.fixture(name="honest_delta")
def _honest_delta() -> Callable[[str], dict[str, torch.Tensor]]:
    return honest_delta


REAL: dict[str, Any] = {
    "model": {"source": "tiny:bert"},
    "adapter": {"rank": 2},
    "data": {"partition": {"num_clients": 3}, "max_train_per_client": 8, "max_test_per_client": 4},
    "train": {"steps": 1, "batch_size": 4, "precision": "float32"},
}


@pytest.fixture(scope="session")
def real_config() -> ExperimentConfig:
    """A tiny real model on synthetic data: three clients, one step each."""
    return make_config(**REAL)


@pytest.fixture(scope="session")
def real_session(real_config: ExperimentConfig) -> Any:
    return open_session(real_config)
