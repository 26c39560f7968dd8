"""A frozen residual beside the adapter, and an adapter of another rank, in the model that trains and answers."""

import math
from dataclasses import replace

import pytest
import torch

from federated.adapters import attach, load_base, shell
from federated.adapters.fingerprint import base_digest
from federated.config import AdapterConfig, ModelConfig, TaskConfig, TrainConfig
from federated.manifest import AdapterSpec, TrainPlan
from federated.residual import at_rank, merged
from federated.state import AdapterState
from federated.tasks import make_task
from federated.testing import effective_of
from federated.training import LocalData, LocalTrainer

torch.set_num_threads(1)
CLASSIFY = TaskConfig(labels=("no", "yes"))
LANGUAGE = TaskConfig(name="causal_lm")
SENSOR = TaskConfig(name="sensor", labels=("no", "yes"))
CASES = [("bert", CLASSIFY), ("gpt2", LANGUAGE), ("llama", LANGUAGE), ("sensor", SENSOR)]
every_case = pytest.mark.parametrize(("name", "task"), CASES)


def adapted(name="bert", task=CLASSIFY, **options):
    config = AdapterConfig(**{"rank": 3, "alpha": 7.0, "target_modules": "all-linear", **options})
    return attach(load_base(ModelConfig(source=f"tiny:{name}")), config, task, seed=1)


def drawn(spec, *, seed, others=None) -> AdapterState:
    """Random factors; ``others`` are the tensors that are none."""
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(others or {})
    for one in spec.modules:
        tensors[f"{one.name}.factor_a"] = torch.randn(one.rank, one.d_in, generator=generator)
        tensors[f"{one.name}.factor_b"] = 0.3 * torch.randn(one.d_out, one.rank, generator=generator)
    return AdapterState(spec, tensors)


def residual_for(spec, *, rank=2, seed=7, every=1) -> AdapterState:
    """Of every n-th layer; ranks and scaling of its own."""
    modules = tuple(replace(one, rank=min(rank, one.d_in, one.d_out), alpha=5.0) for one in spec.modules[::every])
    return drawn(AdapterSpec("lora", rank, 5.0, use_rslora=False, modules=modules), seed=seed)


def state_for(model, **changes) -> AdapterState:
    return replace(drawn(model.spec, seed=5, others=model.read().dense()), residual=residual_for(model.spec, **changes))


def inputs(name):
    generator = torch.Generator().manual_seed(3)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    if name == "sensor":
        return {"values": torch.randn(2, 5, 3, generator=generator), "attention_mask": mask}
    return {"input_ids": torch.randint(4, 200, (2, 5), generator=generator) * mask, "attention_mask": mask}


def answers(model, name):
    with torch.no_grad():
        out = model.model(**inputs(name))
    return getattr(out, "logits", out)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    ("name", "task", "path"),
    [
        ("bert", CLASSIFY, "encoder.layer.0.intermediate.dense"),
        ("gpt2", LANGUAGE, "transformer.h.0.attn.c_attn"),
        ("llama", LANGUAGE, "model.layers.1.mlp.down_proj"),
    ],
)
def test_a_layer_computes_base_plus_adapter_plus_residual(name, task, path, use_rslora):
    """W x + s B A x + R x, by the dense definition in float64; linear and Conv1D, neither square."""
    model = adapted(name, task, target_modules=(path,), use_rslora=use_rslora)
    state = state_for(model)
    model.write(state)
    (module,) = model.spec.modules
    scaling = 7.0 / (math.sqrt(3) if use_rslora else 3)
    own, beside = (
        one.tensors[f"{path}.factor_b"].double() @ one.tensors[f"{path}.factor_a"].double()
        for one in (state, state.residual)
    )
    weight = model.base.model.get_submodule(path).weight.double()
    whole = (weight.T if module.fan_in_fan_out else weight) + scaling * own + 5.0 / 2 * beside
    x = torch.randn(4, module.d_in, generator=torch.Generator().manual_seed(0))
    tree = model.model if name != "bert" else model.model.backbone
    bias = model.base.model.get_submodule(path).bias
    with torch.no_grad():
        found = tree.get_submodule(path)(x).double()
    expected = x.double() @ whole.T + (0.0 if bias is None else bias.double())
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@every_case
def test_answers_are_those_of_both_merged_into_one_adapter(name, task):
    model = adapted(name, task)
    state = state_for(model, every=2)
    model.write(state)
    found = answers(model, name)
    other = shell(model.base, merged(state).spec)
    other.write(merged(state))
    torch.testing.assert_close(found, answers(other, name), atol=1e-4, rtol=1e-4)
    model.write(replace(state, residual=None))
    assert float((answers(model, name) - found).abs().max()) > 1e-3


@every_case
def test_written_without_one_it_is_as_if_it_had_never_been(name, task):
    model = adapted(name, task)
    state = state_for(model)
    bare = replace(state, residual=None)
    model.write(bare)
    expected, modules = answers(model, name), [path for path, _ in model.model.named_modules()]
    model.write(state)
    assert not torch.equal(answers(model, name), expected)
    model.write(bare)
    assert torch.equal(answers(model, name), expected)
    assert [path for path, _ in model.model.named_modules()] == modules
    assert model.read().residual is None


def test_another_takes_its_place_in_layers_of_its_own():
    model = adapted()
    one, two = residual_for(model.spec, seed=1), residual_for(model.spec, seed=2, rank=4, every=3)
    bare = replace(state_for(model), residual=None)
    model.write(replace(bare, residual=one))
    model.write(replace(bare, residual=two))
    found = answers(model, "bert")
    other = adapted()
    other.write(replace(bare, residual=two))
    assert torch.equal(found, answers(other, "bert"))
    assert model.read().residual is two


@every_case
def test_the_base_is_not_touched_bit_for_bit(name, task):
    model = adapted(name, task)
    before = {key: tensor.clone() for key, tensor in model.base.model.state_dict().items()}
    model.write(state_for(model))
    answers(model, name)
    model.write(at_rank(model.read(), 1))
    assert base_digest(model.base.model, model.base.tokenizer) == model.base.base_digest
    assert all(torch.equal(model.base.model.state_dict()[key], tensor) for key, tensor in before.items())


def test_it_is_read_and_not_copied_and_never_trains():
    model = adapted()
    state = state_for(model)
    model.write(state)
    assert model.read().residual is state.residual
    free = {id(tensor) for tensor in model.model.parameters() if tensor.requires_grad}
    assert free == {id(tensor) for tensor in model.trainable().values()}
    assert not any("residual" in name for name in model.masters())
    model.set_trainable(("factor_b",))
    assert not any(tensor.requires_grad for name, tensor in model.model.named_parameters() if "residual" in name)


def test_dropout_is_the_adapter_s_alone():
    """The residual is part of the frozen model: its input is never thinned out."""
    model = adapted(dropout=0.5)
    state = state_for(model)
    zeros = {name: torch.zeros_like(t) for name, t in state.tensors.items() if name.endswith("factor_b")}
    model.write(replace(state, tensors={**state.tensors, **zeros}))
    expected = answers(model, "bert")
    model.set_dropout(True)
    assert torch.equal(answers(model, "bert"), expected)
    assert all("default" in name for name, module in model.model.named_modules() if module.training)


def test_a_residual_moves_with_the_model_and_the_next_one_goes_where_it_is():
    model = adapted()
    state = state_for(model)
    model.write(state)
    model.to("meta")
    held = [tensor for name, tensor in model.model.named_parameters() if "residual" in name]
    assert held
    assert {tensor.device.type for tensor in model.model.parameters()} == {"meta"}
    model.write(replace(state, residual=residual_for(model.spec, seed=9)))
    assert {tensor.device.type for tensor in model.model.parameters()} == {"meta"}
    assert {tensor.device.type for tensor in state.residual.tensors.values()} == {"cpu"}
    assert {tensor.device.type for tensor in model.base.model.parameters()} == {"cpu"}


class TestRank:
    @every_case
    def test_a_smaller_adapter_answers_by_its_own_scaling(self, name, task):
        model = adapted(name, task)
        small = at_rank(replace(state_for(model), residual=None), 2)
        model.write(small)
        assert model.spec == small.spec
        read = model.read()
        assert all(torch.equal(read.tensors[key], tensor) for key, tensor in small.tensors.items())
        fresh = adapted(name, task, rank=2)
        fresh.write(replace(small, spec=fresh.spec))
        assert fresh.spec == small.spec
        assert torch.equal(answers(model, name), answers(fresh, name))

    def test_up_again(self):
        model = adapted()
        state = state_for(model)
        model.write(state)
        expected = answers(model, "bert")
        model.write(at_rank(state, 1))
        model.write(state)
        assert torch.equal(answers(model, "bert"), expected)
        assert model.spec == state.spec

    def test_what_was_frozen_stays_frozen(self):
        model = adapted()
        model.set_trainable(("factor_b",))
        model.write(at_rank(state_for(model), 1))
        free = {name.rpartition(".")[2] for name, tensor in model.trainable().items() if tensor.requires_grad}
        assert free == {"factor_b"}

    def test_ranks_may_differ_from_layer_to_layer(self):
        model = adapted()
        modules = tuple(replace(one, rank=1 + number % 3) for number, one in enumerate(model.spec.modules))
        state = drawn(replace(model.spec, modules=modules), seed=4, others=model.read().dense())
        model.write(state)
        for layer, matrix in effective_of(model.read()).items():
            assert torch.equal(matrix, effective_of(state)[layer])
        other = shell(model.base, state.spec)
        other.write(state)
        assert torch.equal(answers(model, "bert"), answers(other, "bert"))

    @pytest.mark.parametrize("groups", [("factor_a", "factor_b", "dense"), ("factor_b",)])
    def test_what_was_chosen_to_train_trains(self, groups):
        """New parameters stand in for the old ones; gradients must reach these and no others."""
        model = adapted(name="bert")
        task = make_task(CLASSIFY, model.base.tokenizer)
        rows = task.encode([{"text": f"word {number} here", "label": number % 2} for number in range(8)])
        config = TrainConfig(steps=2, batch_size=4, learning_rate=0.05, precision="float32", device="cpu")
        trainer = LocalTrainer(model, task, config)
        whole = state_for(model)
        for rank in (1, 3, 2):
            sent = at_rank(whole, rank)
            result = trainer.run(sent, TrainPlan(rank=rank, trainable=groups), LocalData(rows), seed=3)
            assert {name.rpartition(".")[2] for name in result.delta} == {
                group for group in ("factor_a", "factor_b") if group in groups
            } | ({"weight", "bias"} if "dense" in groups else set())
            for name, moved in result.delta.items():
                assert moved.shape == sent.tensors[name].shape
            assert all(one.any() for name, one in result.delta.items() if name.endswith("factor_b"))
            assert model.read().residual is whole.residual

    def test_training_beside_a_residual_is_training_on_a_base_that_holds_it(self):
        """The same steps, to float32: the gradient of the adapter does not know where the frozen weights are."""
        model, other = adapted(), adapted()
        state = state_for(model)
        tree = other.model.backbone
        for layer, matrix in effective_of(replace(_still(state), residual=state.residual)).items():
            own = tree.get_submodule(layer).base_layer
            own.weight = torch.nn.Parameter((own.weight.double() + matrix).float(), requires_grad=False)
        task = make_task(CLASSIFY, model.base.tokenizer)
        rows = task.encode([{"text": f"word {number} here", "label": number % 2} for number in range(8)])
        config = TrainConfig(
            steps=3, batch_size=4, learning_rate=0.05, precision="float32", device="cpu", optimizer="sgd"
        )
        plan = TrainPlan(rank=3)
        one = LocalTrainer(model, task, config).run(state, plan, LocalData(rows), seed=3).delta
        two = LocalTrainer(other, task, config).run(replace(state, residual=None), plan, LocalData(rows), seed=3).delta
        for name, moved in one.items():
            torch.testing.assert_close(moved, two[name], rtol=1e-3, atol=1e-6)
        assert any(moved.abs().max() > 1e-4 for name, moved in one.items() if name.endswith("factor_b"))


def _still(state: AdapterState) -> AdapterState:
    return replace(state, tensors={name: torch.zeros_like(tensor) for name, tensor in state.tensors.items()})
