"""The server's state: a float32 master, what it takes over, how it moves, and going on from a saved one."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord

from federated.aggregation import FedIT, Result
from federated.config import ServerOptimizerConfig
from federated.errors import AggregationError
from federated.flower.publisher import TrainingState
from federated.flower.server_state import ServerState
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, ModuleSpec
from federated.state import AdapterState, RuleState

Make = Callable[..., Any]
NAMES = ("q.factor_a", "q.factor_b")


@pytest.fixture
def server(adapter: Make) -> Make:
    def make(initial: AdapterState | None = None, **optimizer: Any) -> ServerState:
        return ServerState(initial or adapter(), rule=FedIT(), optimizer=ServerOptimizerConfig(**optimizer))

    return make


def arrays(**changes: torch.Tensor) -> ArrayRecord:
    tensors = {"q.factor_a": torch.full((2, 3), 0.5), "q.factor_b": torch.full((2, 2), 0.5), **changes}
    return ArrayRecord(torch_state_dict=OrderedDict(tensors))


def test_the_master_copy_is_float32_whatever_the_devices_use(server: Make, adapter: Make) -> None:
    state = server(adapter(0.1, "BF16"))
    assert {tensor.dtype for tensor in state.adapter.tensors.values()} == {torch.float32}
    assert state.global_state.materialise().tensors["q.factor_a"].dtype == torch.bfloat16


def test_arrays_are_copies(server: Make) -> None:
    state = server()
    taken = state.arrays().to_torch_state_dict()
    for tensor in taken.values():
        tensor.add_(1.0)
    assert state.adapter.tensors["q.factor_a"].unique().tolist() == [0.25]


RESIDUAL = AdapterState(
    AdapterSpec("lora", 1, 1.0, use_rslora=False, modules=(ModuleSpec("q", 3, 2, 1, 1.0),)),
    {"q.factor_a": torch.full((1, 3), 1 / 3), "q.factor_b": torch.full((2, 1), 3.0)},
)


class TestResidual:
    @pytest.fixture
    def state(self, server: Make, adapter: Make) -> ServerState:
        state: ServerState = server()
        state.apply(Result(state=GlobalState(adapter(0.5), RESIDUAL)))
        return state

    def test_its_arrays_stand_beside_the_adapter_s(self, state: ServerState):
        taken = state.arrays().to_torch_state_dict()
        assert sorted(taken) == ["q.factor_a", "q.factor_b", "residual:q.factor_a", "residual:q.factor_b"]
        assert torch.equal(taken["residual:q.factor_a"], RESIDUAL.tensors["q.factor_a"])
        taken["residual:q.factor_a"].add_(1.0)
        assert RESIDUAL.tensors["q.factor_a"].unique().tolist() == pytest.approx([1 / 3])

    def test_its_own_arrays_change_nothing(self, state: ServerState):
        before = state.global_state
        state.adopt(state.arrays())
        assert state.global_state is before

    def test_other_arrays_replace_the_adapter_alone(self, state: ServerState):
        own = state.arrays().to_torch_state_dict()
        for beside in ({}, {name: tensor for name, tensor in own.items() if name.startswith("residual:")}):
            state.adopt(arrays(**{"q.factor_a": torch.full((2, 3), 0.75), **beside}))
            assert state.adapter.tensors["q.factor_a"].unique().tolist() == [0.75]
            assert state.global_state.residual is RESIDUAL

    @pytest.mark.parametrize(
        "beside",
        [
            {"residual:q.factor_a": torch.full((1, 3), 1 / 3)},
            {"residual:q.factor_a": torch.zeros(1, 3), "residual:q.factor_b": torch.full((2, 1), 3.0)},
            {"residual:q.factor_a": torch.zeros(4, 3), "residual:q.factor_b": torch.full((2, 4), 3.0)},
        ],
        ids=["half of it", "values", "rank"],
    )
    def test_another_residual_is_refused_and_changes_nothing(
        self, state: ServerState, server: Make, beside: dict[str, torch.Tensor]
    ):
        """Left out in silence, it would take a run's whole work with it."""
        for one in (state, server()):
            before = one.global_state
            with pytest.raises(
                AggregationError, match="another residual than this run's: go on from the saved version"
            ):
                one.adopt(arrays(**beside))
            assert one.global_state is before

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_one_that_is_not_finite_is_refused_and_changes_nothing(
        self, state: ServerState, adapter: Make, value: float
    ):
        before = state.training_state(0).to_bytes()
        odd = AdapterState(RESIDUAL.spec, {**RESIDUAL.tensors, "q.factor_b": torch.full((2, 1), value)})
        with pytest.raises(AggregationError, match="beyond F32"):
            state.apply(Result(state=GlobalState(adapter(0.5), odd)))
        assert state.training_state(0).to_bytes() == before

    def test_going_on_from_a_saved_state_has_it(self, state: ServerState, server: Make):
        saved = TrainingState.from_bytes(state.training_state(1).to_bytes())
        resumed: ServerState = server()
        resumed.take_up(saved, "v" * 64)
        assert resumed.global_state.residual is not None
        assert resumed.global_state.residual.spec == RESIDUAL.spec
        found, expected = resumed.arrays().to_torch_state_dict(), state.arrays().to_torch_state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_arrays_handed_in_are_taken_over(server: Make) -> None:
    state = server()
    state.adopt(arrays())
    assert state.adapter.tensors["q.factor_b"].unique().tolist() == [0.5]


def test_its_own_arrays_change_nothing(server: Make) -> None:
    state = server()
    before = state.global_state
    state.adopt(state.arrays())
    assert state.global_state is before


def test_float64_arrays_become_float32(server: Make) -> None:
    state = server()
    state.adopt(arrays(**{"q.factor_a": torch.full((2, 3), 0.75, dtype=torch.float64)}))
    assert state.adapter.tensors["q.factor_a"].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stranger": torch.zeros(1)}, "tensor names differ"),
        ({"q.factor_a": torch.zeros(3)}, r"q\.factor_a: found shape"),
        ({"q.factor_a": torch.full((2, 3), torch.nan)}, "not finite"),
        ({"q.factor_b": torch.full((2, 2), torch.inf)}, "not finite"),
    ],
    ids=["name", "shape", "nan", "inf"],
)
def test_arrays_that_do_not_fit_are_refused_and_change_nothing(
    server: Make, change: dict[str, torch.Tensor], message: str
) -> None:
    state = server()
    with pytest.raises(AggregationError, match=message):
        state.adopt(arrays(**change))
    assert state.adapter.tensors["q.factor_a"].unique().tolist() == [0.25]


def mean_delta(value: float) -> dict[str, torch.Tensor]:
    return {
        "q.factor_a": torch.full((2, 3), value, dtype=torch.float64),
        "q.factor_b": torch.zeros(2, 2, dtype=torch.float64),
    }


def test_a_mean_delta_moves_it_by_the_optimizer(server: Make) -> None:
    state = server()
    assert state.apply(Result(mean_delta=mean_delta(1.0))) == pytest.approx(6**0.5)
    assert state.adapter.tensors["q.factor_a"].unique().tolist() == [1.25]
    slow = server(name="sgd", learning_rate=0.5)
    slow.apply(Result(mean_delta=mean_delta(1.0)))
    assert slow.adapter.tensors["q.factor_a"].unique().tolist() == [0.75]


def test_a_rule_s_own_state_replaces_it(server: Make, adapter: Make) -> None:
    state = server()
    moved = state.apply(Result(state=GlobalState(adapter(1.25), rule_state=RuleState({"step": 1}))))
    assert moved == pytest.approx((6 + 4 * 1.0) ** 0.5)
    assert state.adapter.tensors["q.factor_a"].unique().tolist() == [1.25]
    assert state.global_state.rule_state.scalars == {"step": 1}


def test_a_rule_s_memory_is_kept_unless_there_is_a_new_one(server: Make) -> None:
    state = server()
    state.apply(Result(mean_delta=mean_delta(0.0), rule_state=RuleState({"step": 1})))
    state.apply(Result(mean_delta=mean_delta(0.0)))
    assert state.global_state.rule_state.scalars == {"step": 1}


@pytest.mark.parametrize(("dtype", "value"), [("F32", 1e39), ("F16", 1e5), ("F32", float("nan"))])
def test_a_move_beyond_what_a_device_holds_is_refused_and_changes_nothing(
    server: Make, adapter: Make, dtype: str, value: float
) -> None:
    state = server(adapter(0.25, dtype), name="momentum")
    before = state.training_state(0).to_bytes()
    with pytest.raises(AggregationError, match=rf"beyond {dtype}: bound what one client may send with round\.max_norm"):
        state.apply(Result(mean_delta=mean_delta(value)))
    assert state.training_state(0).to_bytes() == before


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "yogi", "adagrad"])
def test_going_on_from_a_saved_state_is_never_having_stopped(server: Make, name: str) -> None:
    whole, first = server(name=name), server(name=name)
    whole.apply(Result(mean_delta=mean_delta(1.0)))
    first.apply(Result(mean_delta=mean_delta(1.0)))
    first.counters["client-000"] = 5
    saved = type(first.training_state(1)).from_bytes(first.training_state(1).to_bytes())
    resumed = server(name=name)
    resumed.take_up(saved, "v" * 64)
    assert (resumed.finished, resumed.version_id, resumed.counters) == (1, "v" * 64, {"client-000": 5})
    for state in (whole, resumed):
        state.apply(Result(mean_delta=mean_delta(-0.3)))
    assert all(torch.equal(whole.adapter.tensors[key], resumed.adapter.tensors[key]) for key in NAMES)
