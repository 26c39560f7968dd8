"""Server optimizers against Algorithm 2 of Reddi et al. 2021, written out in float64 with numpy."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from federated.config import ServerOptimizerConfig
from federated.delta import apply
from federated.errors import AggregationError
from federated.manifest import AdapterSpec
from federated.server_optimizers import init, step
from federated.state import AdapterState

SPEC = AdapterSpec("lora", 1, 1.0, use_rslora=False, modules=())
NAMES = ("sgd", "momentum", "adam", "yogi", "adagrad")
CONFIG = ServerOptimizerConfig(learning_rate=0.3, momentum=0.8, beta1=0.7, beta2=0.95, tau=1e-2)
every = pytest.mark.parametrize("name", NAMES)


def adapter(*values: float) -> AdapterState:
    return AdapterState(SPEC, {"a": torch.tensor(values or (1.0, -2.0, 0.0)), "b": torch.full((2, 2), 0.5)})


def deltas(count: int) -> list[dict[str, torch.Tensor]]:
    """Mean deltas with large, small and zero entries; the last column never moves."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for number in range(count):
        first = torch.randn(3, generator=generator, dtype=torch.float64) * 10.0 ** (number - 2)
        first[2] = 0.0
        made.append({"a": first, "b": torch.randn(2, 2, generator=generator, dtype=torch.float64)})
    return made


def walk(config: ServerOptimizerConfig, start: AdapterState, moves: list[dict[str, torch.Tensor]]):
    state = init(config, start)
    for move in moves:
        gradient = {name: -tensor for name, tensor in move.items()}
        start, state = step(config, state, start, pseudo_gradient=gradient)
    return start, state


def reference(config: ServerOptimizerConfig, x: np.ndarray, moves: list[np.ndarray]) -> np.ndarray:
    """Algorithm 2 (lines 11 to 15) with delta_t, not its negative; FedAvgM and SGD beside it."""
    m, v = np.zeros_like(x), np.full_like(x, config.tau**2)
    velocity = np.zeros_like(x)
    for delta in moves:
        if config.name == "sgd":
            x = x + config.learning_rate * delta
        elif config.name == "momentum":
            velocity = config.momentum * velocity + delta
            x = x + config.learning_rate * velocity
        else:
            m = config.beta1 * m + (1 - config.beta1) * delta
            squared = delta**2
            if config.name == "adagrad":
                v = v + squared
            elif config.name == "yogi":
                v = v - (1 - config.beta2) * squared * np.sign(v - squared)
            else:
                v = config.beta2 * v + (1 - config.beta2) * squared
            x = x + config.learning_rate * m / (np.sqrt(v) + config.tau)
        x = x.astype(np.float32).astype(np.float64)  # the adapter is rounded once per step
    return x


@every
@pytest.mark.parametrize("count", [1, 2, 6])
def test_steps_follow_the_algorithm(name: str, count: int) -> None:
    config, start, moves = replace(CONFIG, name=name), adapter(), deltas(count)
    found, _ = walk(config, start, moves)
    for key, tensor in start.tensors.items():
        expected = reference(config, tensor.double().numpy(), [move[key].numpy() for move in moves])
        np.testing.assert_allclose(found.tensors[key].double().numpy(), expected, rtol=1e-6, atol=1e-12)


def test_sgd_at_rate_one_is_averaging() -> None:
    start, (move,) = adapter(), deltas(1)
    found, _ = walk(ServerOptimizerConfig(), start, [move])
    expected = apply(start, {name: tensor.float() for name, tensor in move.items()})
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-6, atol=0)


def test_momentum_zero_is_sgd() -> None:
    config = replace(CONFIG, momentum=0.0)
    slow, _ = walk(replace(config, name="momentum"), adapter(), deltas(4))
    plain, _ = walk(replace(config, name="sgd"), adapter(), deltas(4))
    assert all(torch.equal(slow.tensors[name], plain.tensors[name]) for name in plain.tensors)


def test_adam_without_memory_by_hand() -> None:
    """With both betas 0: m = delta, v = delta^2, so x moves by lr * delta / (|delta| + tau)."""
    config = ServerOptimizerConfig(name="adam", learning_rate=0.1, beta1=0.0, beta2=0.0, tau=1.0)
    start = AdapterState(SPEC, {"a": torch.zeros(3)})
    found, state = walk(config, start, [{"a": torch.tensor([3.0, -1.0, 0.0], dtype=torch.float64)}])
    assert found.tensors["a"].tolist() == pytest.approx([0.1 * 3 / 4, -0.1 * 1 / 2, 0.0], rel=1e-6)
    assert state.moments["v/a"].tolist() == [9.0, 1.0, 0.0]


def test_there_is_no_bias_correction() -> None:
    """The first adam step of a unit delta is (1 - b1) / (sqrt(b2 * tau^2 + 1 - b2) + tau), not about 1."""
    config = ServerOptimizerConfig(name="adam", learning_rate=1.0, beta1=0.9, beta2=0.99, tau=1e-3)
    start = AdapterState(SPEC, {"a": torch.zeros(1)})
    found, _ = walk(config, start, [{"a": torch.ones(1, dtype=torch.float64)}])
    expected = 0.1 / (math.sqrt(0.99 * 1e-6 + 0.01) + 1e-3)
    assert found.tensors["a"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["adam", "yogi", "adagrad"])
def test_second_moments_start_at_tau_squared(name: str) -> None:
    state = init(replace(CONFIG, name=name), adapter())
    assert set(state.moments) == {"m/a", "m/b", "v/a", "v/b"}
    assert state.moments["v/a"].unique().item() == CONFIG.tau**2
    assert state.moments["m/b"].abs().sum().item() == 0.0
    assert {tensor.dtype for tensor in state.moments.values()} == {torch.float64}


def test_sgd_remembers_nothing_and_momentum_a_velocity() -> None:
    assert init(replace(CONFIG, name="sgd"), adapter()).moments == {}
    velocity = init(replace(CONFIG, name="momentum"), adapter()).moments
    assert {name: tensor.abs().sum().item() for name, tensor in velocity.items()} == {"v/a": 0.0, "v/b": 0.0}


@every
def test_a_zero_pseudo_gradient_moves_nothing_at_first(name: str) -> None:
    start = adapter()
    found, state = walk(
        replace(CONFIG, name=name), start, [{key: torch.zeros_like(t).double() for key, t in start.tensors.items()}]
    )
    assert all(torch.equal(found.tensors[key], tensor) for key, tensor in start.tensors.items())
    assert state.steps == 1


@every
def test_inputs_stay_as_they_are(name: str) -> None:
    config, start, (move,) = replace(CONFIG, name=name), adapter(), deltas(1)
    state = init(config, start)
    before = {key: tensor.clone() for key, tensor in (start.tensors | dict(state.moments) | {"g": move["a"]}).items()}
    step(config, state, start, pseudo_gradient=move)
    after = start.tensors | dict(state.moments) | {"g": move["a"]}
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@every
def test_going_on_from_a_state_is_never_having_stopped(name: str) -> None:
    config, moves = replace(CONFIG, name=name), deltas(4)
    whole, end = walk(config, adapter(), moves)
    half, state = walk(config, adapter(), moves[:2])
    kept = replace(state, moments={key: tensor.clone() for key, tensor in state.moments.items()})
    for move in moves[2:]:
        half, kept = step(config, kept, half, pseudo_gradient={key: -tensor for key, tensor in move.items()})
    assert kept.steps == end.steps == 4
    assert all(torch.equal(half.tensors[key], tensor) for key, tensor in whole.tensors.items())
    assert all(torch.equal(kept.moments[key], tensor) for key, tensor in end.moments.items())


@every
def test_the_adapter_comes_back_in_float32_with_its_spec(name: str) -> None:
    found, _ = walk(replace(CONFIG, name=name), adapter(), deltas(1))
    assert found.spec is SPEC
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32}


@pytest.mark.parametrize(
    "gradient",
    [
        {},
        {"a": torch.zeros(3), "b": torch.zeros(2, 2), "c": torch.zeros(1)},
        {"a": torch.zeros(1), "b": torch.zeros(2, 2)},
        {"a": torch.zeros(3, 1), "b": torch.zeros(2, 2)},
    ],
    ids=["nothing", "extra", "broadcast", "other shape"],
)
@every
def test_a_gradient_that_does_not_fit_is_refused(name: str, gradient: dict[str, torch.Tensor]) -> None:
    config, start = replace(CONFIG, name=name), adapter()
    with pytest.raises(AggregationError, match="does not have the adapter's names and shapes"):
        step(config, init(config, start), start, pseudo_gradient=gradient)


@every
def test_what_was_not_trained_stays_with_its_moments(name: str) -> None:
    config, (first, second) = replace(CONFIG, name=name), deltas(2)
    start, state = walk(config, adapter(), [first])
    moved, after = step(config, state, start, pseudo_gradient={"a": -second["a"]})
    assert torch.equal(moved.tensors["b"], start.tensors["b"])
    assert not torch.equal(moved.tensors["a"], start.tensors["a"])
    kept = {key: tensor for key, tensor in state.moments.items() if key.endswith("/b")}
    assert all(torch.equal(after.moments[key], tensor) for key, tensor in kept.items())
    assert after.moments.keys() == state.moments.keys()


@pytest.mark.parametrize(("made_by", "used_by"), [("sgd", "adam"), ("adam", "sgd"), ("adam", "yogi")])
def test_a_state_of_another_optimizer_is_refused(made_by: str, used_by: str) -> None:
    start = adapter()
    state = init(replace(CONFIG, name=made_by), start)
    with pytest.raises(AggregationError, match=f"was made by {made_by}, not by {used_by} for this adapter"):
        step(replace(CONFIG, name=used_by), state, start, pseudo_gradient=start.tensors)


def test_a_state_of_another_adapter_is_refused() -> None:
    config = replace(CONFIG, name="adam")
    state = init(config, AdapterState(SPEC, {"a": torch.zeros(4), "b": torch.zeros(2, 2)}))
    with pytest.raises(AggregationError, match="for this adapter"):
        step(config, state, adapter(), pseudo_gradient=adapter().tensors)
