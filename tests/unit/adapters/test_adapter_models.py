"""Attaching: the base stays as it is, the algebra is the spec's, and state goes in and out exactly."""

import copy
import math
from dataclasses import asdict, replace

import pytest
import torch

from federated.adapters import attach, base_from_module, load_base, null_model, shell, spec_for
from federated.adapters.fingerprint import base_digest
from federated.config import AdapterConfig, ModelConfig, TaskConfig
from federated.manifest import AdapterSpec
from federated.state import AdapterState, group_of

LABELS = ("no", "yes", "perhaps")
CLASSIFY = TaskConfig(labels=LABELS)
STOCK = TaskConfig(labels=LABELS, head="stock")
LANGUAGE = TaskConfig(name="causal_lm")
SENSOR = TaskConfig(name="sensor", labels=LABELS)
CASES = [
    ("bert", CLASSIFY), ("bert", STOCK), ("gpt2", CLASSIFY), ("gpt2", STOCK), ("gpt2", LANGUAGE),
    ("llama", CLASSIFY), ("llama", STOCK), ("llama", LANGUAGE), ("sensor", SENSOR),
]  # fmt: skip


def base(name="bert", **options):
    return load_base(ModelConfig(source=f"tiny:{name}", **options))


def adapted(name="bert", task=CLASSIFY, *, seed=1, **options):
    return attach(base(name), AdapterConfig(**{"rank": 4, **options}), task, seed=seed)


def inputs(name):
    generator = torch.Generator().manual_seed(3)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    if name == "sensor":
        return {"values": torch.randn(2, 5, 3, generator=generator), "attention_mask": mask}
    return {"input_ids": torch.randint(4, 200, (2, 5), generator=generator) * mask, "attention_mask": mask}


def answers(model, name):
    with torch.no_grad():
        out = model(**inputs(name))
    return getattr(out, "logits", out)


def random_state(model, *, seed=5):
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(t.shape, generator=generator) for name, t in model.masters().items()}
    return AdapterState(model.spec, tensors).cast(model.spec.dtype)


@pytest.mark.parametrize(("name", "task"), CASES)
def test_a_fresh_adapter_answers_bit_for_bit_like_the_null_model(name, task):
    null = null_model(base(name), task, seed=1)
    assert torch.equal(answers(adapted(name, task).model, name), answers(null, name))


def test_the_null_model_of_a_language_model_is_the_base_itself():
    assert null_model(base("llama"), LANGUAGE, seed=0) is base("llama").model


@pytest.mark.parametrize(("name", "task"), CASES)
def test_the_base_is_not_touched(name, task):
    modules = [type(module) for module in base(name).model.modules()]
    model = adapted(name, task, target_modules="all-linear")
    model.write(random_state(model))
    assert base_digest(base(name).model, base(name).tokenizer) == base(name).base_digest
    assert [type(module) for module in base(name).model.modules()] == modules


@pytest.mark.parametrize(("name", "task"), CASES)
def test_every_tensor_of_the_base_is_shared_except_the_pooler_of_a_stock_head(name, task):
    mine = {id(tensor) for tensor in adapted(name, task).model.parameters()}
    apart = {path for path, tensor in base(name).model.named_parameters() if id(tensor) not in mine}
    own = {"pooler.dense.weight", "pooler.dense.bias"} if (name, task) == ("bert", STOCK) else set()
    unused = {"lm_head.weight"} - {path for path, _ in base(name).model.named_parameters()}
    assert apart - unused == own


@pytest.mark.parametrize(("name", "task"), CASES)
def test_only_the_adapter_can_train(name, task):
    model = adapted(name, task, target_modules="all-linear")
    free = {id(tensor) for tensor in model.model.parameters() if tensor.requires_grad}
    assert free == {id(tensor) for tensor in model.trainable().values()}


@pytest.mark.parametrize(("name", "task"), CASES)
def test_state_goes_in_and_out_exactly(name, task):
    model = adapted(name, task)
    state = random_state(model)
    model.write(state)
    read = model.read()
    assert read.spec == state.spec
    assert read.tensors.keys() == state.tensors.keys()
    assert all(torch.equal(read.tensors[key], state.tensors[key]) for key in state.tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_adapters_of_every_dtype_round_trip(dtype):
    model = adapted(dtype=dtype)
    state = random_state(model)
    model.write(state)
    read = model.read().tensors
    assert all(read[key].dtype == getattr(torch, dtype) and torch.equal(read[key], state.tensors[key]) for key in read)
    assert all(tensor.dtype == torch.float32 for tensor in model.trainable().values())


def test_what_is_read_is_a_copy():
    model = adapted()
    before = model.read()
    with torch.no_grad():
        next(iter(model.trainable().values())).add_(1.0)
    name = next(iter(before.tensors))
    assert not torch.equal(before.tensors[name], model.read().tensors[name])


def test_two_adapters_over_one_base_do_not_disturb_each_other():
    first, second = adapted(), adapted()
    expected = answers(second.model, "bert")
    first.write(random_state(first))
    assert torch.equal(answers(second.model, "bert"), expected)
    assert not torch.equal(answers(first.model, "bert"), expected)


def dense_update(spec: AdapterSpec, state: AdapterState, module):
    """The definition, in float64: scaling * B @ A."""
    factor_a, factor_b = (state.tensors[f"{module.name}.{part}"].double() for part in ("factor_a", "factor_b"))
    scaling = module.alpha / (math.sqrt(module.rank) if spec.use_rslora else module.rank)
    return scaling * factor_b @ factor_a


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    ("name", "task", "path"),
    [
        ("bert", CLASSIFY, "encoder.layer.0.intermediate.dense"),
        ("gpt2", LANGUAGE, "transformer.h.0.attn.c_attn"),
        ("llama", LANGUAGE, "model.layers.1.mlp.down_proj"),
    ],
)
def test_a_layer_computes_base_plus_the_spec_s_dense_update(name, task, path, use_rslora):
    model = adapted(name, task, target_modules=(path,), use_rslora=use_rslora, alpha=7.0, rank=3)
    state = random_state(model)
    model.write(state)
    (module,) = model.spec.modules
    x = torch.randn(4, module.d_in, generator=torch.Generator().manual_seed(0))
    tree = model.model if name != "bert" else model.model.backbone
    with torch.no_grad():
        found = tree.get_submodule(path)(x).double()
        plain = base(name).model.get_submodule(path)(x).double()
    torch.testing.assert_close(
        found - plain, x.double() @ dense_update(model.spec, state, module).T, atol=2e-4, rtol=1e-4
    )


@pytest.mark.parametrize(("name", "task"), [("bert", CLASSIFY), ("gpt2", LANGUAGE), ("sensor", SENSOR)])
def test_answers_are_those_of_a_base_with_the_dense_updates_merged_in(name, task):
    model = adapted(name, task, alpha=1.0)
    initial, drawn = model.read(), random_state(model)
    factors = {key: drawn.tensors[key] if "factor" in key else initial.tensors[key] for key in drawn.tensors}
    model.write(AdapterState(model.spec, factors))
    merged = copy.deepcopy(base(name).model)
    for module in model.spec.modules:
        weight = merged.get_submodule(module.name).weight
        update = dense_update(model.spec, drawn, module)
        weight.data = (weight.double() + (update.T if module.fan_in_fan_out else update)).float()
    null = null_model(base_from_module(merged, base(name).tokenizer), task, seed=1)
    torch.testing.assert_close(answers(model.model, name), answers(null, name), atol=1e-4, rtol=1e-4)


def test_canonical_names_are_paths_in_the_base():
    names = adapted("llama", CLASSIFY).read().tensors
    assert "model.layers.0.self_attn.q_proj.factor_a" in names
    assert {name for name in names if "factor" not in name} == {"classifier.weight", "classifier.bias"}


def test_the_same_layers_have_the_same_names_under_every_task():
    modules = {task.name: adapted("gpt2", task).spec.modules for task in (CLASSIFY, LANGUAGE)}
    assert modules["sequence_classification"] == modules["causal_lm"]


def test_a_trained_stock_head_takes_the_pooler_with_it():
    tensors = adapted("bert", STOCK).read().tensors
    assert torch.equal(tensors["pooler.dense.weight"], base().model.pooler.dense.weight)
    assert {"classifier.weight", "classifier.bias", "pooler.dense.bias"} < tensors.keys()


@pytest.mark.parametrize("task", [CLASSIFY, STOCK])
def test_a_frozen_head_does_not_travel_and_is_rebuilt_from_its_seed(task):
    model = adapted("bert", task, train_head=False, seed=11)
    assert all("factor" in name for name in model.read().tensors)
    other = shell(base(), model.spec, seed=99)
    other.write(model.read())
    assert torch.equal(answers(other.model, "bert"), answers(model.model, "bert"))


@pytest.mark.parametrize("task", [CLASSIFY, STOCK])
def test_first_weights_come_from_the_seed_alone(task):
    torch.manual_seed(0)
    first = adapted("bert", task, seed=1).read().tensors
    torch.manual_seed(1)
    second = adapted("bert", task, seed=1).read().tensors
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("task", [CLASSIFY, STOCK])
def test_another_seed_gives_other_factors_and_another_head(task):
    first, second = (adapted("bert", task, seed=seed).read().tensors for seed in (1, 2))
    same = {name for name in first if torch.equal(first[name], second[name])}
    assert not any(name.endswith("factor_a") or name == "classifier.weight" for name in same)


def test_attaching_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    adapted("bert", STOCK, dropout=0.5)
    assert torch.equal(before, torch.random.get_rng_state())


def test_first_factors_are_kaiming_uniform_and_zero():
    tensors = adapted(rank=8).read().tensors
    bound = 1 / math.sqrt(32)
    for name, tensor in tensors.items():
        if name.endswith("factor_a"):
            assert tensor.abs().max() <= bound
            assert tensor.std() > bound / 3
        if name.endswith("factor_b"):
            assert not tensor.any()


@pytest.mark.parametrize("name", ["bert", "gpt2", "sensor"])
def test_the_spec_describes_the_factors(name):
    model = adapted(name, SENSOR if name == "sensor" else CLASSIFY)
    for pair in model.read().pairs():
        assert pair.factor_a.shape == (pair.module.rank, pair.module.d_in)
        assert pair.factor_b.shape == (pair.module.d_out, pair.module.rank)
        assert pair.module.fan_in_fan_out == (name == "gpt2")


def test_the_spec_survives_plain_data():
    spec = adapted().spec
    assert AdapterSpec.from_dict(asdict(spec)) == spec


def test_modules_may_differ_in_rank_and_alpha():
    spec = adapted(rank=4).spec
    small = tuple(replace(module, rank=2, alpha=3.0) if "layer.0" in module.name else module for module in spec.modules)
    mixed = shell(base(), replace(spec, modules=small))
    state = random_state(mixed)
    mixed.write(state)
    path = "encoder.layer.0.attention.self.query"
    assert state.tensors[f"{path}.factor_a"].shape[0] == 2
    assert mixed.model.backbone.get_submodule(path).scaling == {"default": 1.5}


@pytest.mark.parametrize(
    ("groups", "expected"), [(("factor_b",), {"factor_b"}), (("factor_b", "dense"), {"factor_b", "dense"})]
)
def test_only_the_chosen_groups_train(groups, expected):
    model = adapted()
    model.set_trainable(groups)
    assert {group_of(name) for name, tensor in model.trainable().items() if tensor.requires_grad} == expected


def test_dropout_of_the_base_stays_off():
    model = adapted(dropout=0.5)
    model.set_dropout(True)
    on = {name for name, module in model.model.named_modules() if module.training}
    assert on
    assert all("lora_dropout" in name for name in on)
    model.set_dropout(False)
    assert not any(module.training for module in model.model.modules())


def test_moving_a_model_leaves_the_base_where_it_is():
    model = adapted("llama", LANGUAGE)
    assert model.to("cpu") is model
    model.to("meta")
    assert {tensor.device.type for tensor in model.model.parameters()} == {"meta"}
    assert {tensor.device.type for tensor in model.model.buffers()} == {"meta"}
    assert {tensor.device.type for tensor in model.trainable().values()} == {"meta"}
    assert {tensor.device.type for tensor in base("llama").model.parameters()} == {"cpu"}
    assert model.model.lm_head.weight is model.model.model.embed_tokens.weight


def test_a_bfloat16_base_has_float32_factors():
    model = attach(base(dtype="bfloat16"), AdapterConfig(rank=2), CLASSIFY, seed=0)
    assert {tensor.dtype for tensor in model.trainable().values()} == {torch.float32}
    assert answers(model.model, "bert").dtype == torch.float32


def test_the_spec_is_known_before_anything_is_built():
    assert spec_for(base(), AdapterConfig(rank=4), CLASSIFY, seed=1) == adapted().spec


def test_attaching_is_silent(recwarn, capfd):
    adapted("gpt2", LANGUAGE, target_modules="all-linear")
    assert not recwarn.list
    assert capfd.readouterr().err == ""


def test_a_stock_head_finds_the_last_token_by_the_tokenizer_s_padding():
    model = copy.deepcopy(base("gpt2").model)
    model.config.pad_token_id = None
    null = null_model(base_from_module(model, base("gpt2").tokenizer), STOCK, seed=1)
    assert torch.equal(answers(null, "gpt2"), answers(null_model(base("gpt2"), STOCK, seed=1), "gpt2"))


@pytest.mark.parametrize("task", [CLASSIFY, STOCK])
def test_a_classifier_on_a_decoder_keeps_no_keys_and_values(task):
    cached = []
    tree = adapted("llama", task).model
    backbone = tree.backbone if task is CLASSIFY else tree.stock.model
    backbone.register_forward_hook(lambda module, inputs, output: cached.append(output.past_key_values))
    answers(tree, "llama")
    assert cached == [None]
