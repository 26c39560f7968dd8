"""Adapters without factors: their mean is the float64 mean, to the last bit in any order; other rules refuse them."""

import itertools
from dataclasses import replace

import pytest
import torch

from federated import server_optimizers
from federated.adapters import attach, load_base
from federated.aggregation import RULES, ClientView, FedIT, RuleProperties, check_combination, make_rule
from federated.config import (
    AdapterConfig,
    ModelConfig,
    ServerOptimizerConfig,
    StrategyConfig,
    TaskConfig,
    experiment_from,
)
from federated.delta import Update
from federated.errors import ConfigError
from federated.global_state import GlobalState

KINDS = ("ia3", "layernorm", "head", "full", "prompt", "prefix")
WEIGHTS = {"a": 3.0, "b": 11.0, "c": 0.5}


def adapter_of(kind):
    base = load_base(ModelConfig(source="tiny:bert"))
    return attach(base, AdapterConfig(kind=kind), TaskConfig(labels=("no", "yes")), seed=1).read()


def drawn(adapter, seed):
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** (seed - 2)  # sizes apart, so that the order of a plain sum would show
    return {name: scale * torch.randn(t.shape, generator=generator) for name, t in adapter.tensors.items()}


def experiment(kind, rule="fedit", **adapter):
    return experiment_from({
        "task": {"labels": ["no", "yes"]}, "adapter": {"kind": kind, **adapter}, "strategy": {"rule": rule},
        "train": {"optimizer": "sgd"},
    })  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_is_the_float64_mean_in_any_order(kind):
    adapter = adapter_of(kind)
    state = GlobalState(adapter, rule_state=FedIT().init(adapter.spec))
    deltas = {client: drawn(adapter, seed) for seed, client in enumerate(WEIGHTS)}
    plan, payload = FedIT().plan(state, ClientView("a"), 1)
    assert payload.tensors.keys() == adapter.tensors.keys()
    assert "dense" in plan.trainable
    means = []
    for order in itertools.permutations(WEIGHTS):
        accumulator = FedIT().start(state, 1)
        for client in order:
            accumulator.add(Update(client, deltas[client], num_examples=1), WEIGHTS[client])
        means.append(accumulator.finish().mean_delta)
    total = sum(WEIGHTS.values())
    for name in adapter.tensors:
        assert all(torch.equal(means[0][name], mean[name]) for mean in means)
        expected = sum(WEIGHTS[client] * deltas[client][name].double() for client in WEIGHTS) / total
        torch.testing.assert_close(means[0][name], expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "yogi", "adagrad"])
def test_server_optimizers_move_every_tensor(kind, name):
    adapter = adapter_of(kind)
    config = ServerOptimizerConfig(name=name, learning_rate=0.01)
    gradient = {key: tensor.double() for key, tensor in drawn(adapter, 2).items()}
    moments = server_optimizers.init(config, adapter)
    moved, _ = server_optimizers.step(config, moments, adapter, pseudo_gradient=gradient)
    assert all(not torch.equal(moved.tensors[key], adapter.tensors[key]) for key in adapter.tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(RULES))
def test_a_rule_for_factors_refuses_other_kinds_with_the_reason(kind, name):
    rule = make_rule(name)
    if not rule.properties.needs_lora:
        check_combination(rule, experiment(kind, name))
        return
    with pytest.raises(ConfigError, match=rf"adapter\.kind = {kind}: {name} works on LoRA's factors, .*strategy=fedit"):
        check_combination(rule, experiment(kind, name))


def test_only_plain_averaging_needs_no_factors():
    needy = {name for name in RULES if make_rule(name).properties.needs_lora}
    assert {"fedsvd", "ffa", "flexlora", "rolora"} <= needy
    assert "fedit" not in needy
    assert RuleProperties(exactness="exact", space="factor", linear=True).needs_lora


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "yogi", "adagrad"])
def test_plain_averaging_takes_its_server_optimizers_along(optimizer):
    settings = StrategyConfig(server_optimizer=ServerOptimizerConfig(optimizer, learning_rate=0.01))
    check_combination(FedIT(), replace(experiment("ia3"), strategy=settings))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"client_ranks": [2, 4]}, r"adapter: client_ranks = \[2, 4\]: only adapters of kind lora have it"),
        ({"use_rslora": True}, "adapter: use_rslora = True: only adapters of kind lora"),
        ({"dropout": 0.1}, r"adapter: dropout = 0\.1: only adapters of kind lora"),
        ({"target_modules": ["query"]}, "adapter: target_modules: head chooses what it trains"),
    ],
)
def test_settings_of_factors_are_refused(change, expected):
    with pytest.raises(ConfigError, match=expected):
        experiment("head", **change)
