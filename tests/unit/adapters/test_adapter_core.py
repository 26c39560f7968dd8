"""Adapters with a core: the plain definition, its gradients, how the factors start, and what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from federated.adapters import AdapterModel, attach, check_spec, load_base, null_model, shell
from federated.adapters.core import start_factors
from federated.config import AdapterConfig, ModelConfig, TaskConfig
from federated.errors import ModelError
from federated.manifest import AdapterSpec
from federated.residual import folded
from federated.state import AdapterState, group_of

LABELS = ("no", "yes", "perhaps")
CLASSIFY = TaskConfig(labels=LABELS)
LANGUAGE = TaskConfig(name="causal_lm")
SENSOR = TaskConfig(name="sensor", labels=LABELS)
CASES = [("bert", CLASSIFY), ("gpt2", CLASSIFY), ("gpt2", LANGUAGE), ("llama", LANGUAGE), ("sensor", SENSOR)]
LAYERS = [
    ("bert", CLASSIFY, "encoder.layer.0.intermediate.dense"),
    ("gpt2", LANGUAGE, "transformer.h.0.attn.c_attn"),
    ("llama", LANGUAGE, "model.layers.1.mlp.down_proj"),
]
every_case = pytest.mark.parametrize(("name", "task"), CASES)
every_layer = pytest.mark.parametrize(("name", "task", "path"), LAYERS)


def base(name="bert", **options):
    return load_base(ModelConfig(source=f"tiny:{name}", **options))


def adapted(name="bert", task=CLASSIFY, *, seed=1, **options) -> AdapterModel:
    return attach(base(name), AdapterConfig(**{"kind": "lora_xs", "rank": 3, **options}), task, seed=seed)


def drawn(model: AdapterModel, *, seed=5) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(one.shape, generator=generator) for name, one in model.masters().items()}
    return AdapterState(model.spec, tensors).cast(model.spec.dtype)


def answers(model, name):
    generator = torch.Generator().manual_seed(3)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    inputs = {"input_ids": torch.randint(4, 200, (2, 5), generator=generator) * mask, "attention_mask": mask}
    if name == "sensor":
        inputs = {"values": torch.randn(2, 5, 3, generator=generator), "attention_mask": mask}
    with torch.no_grad():
        out = model(**inputs)
    return getattr(out, "logits", out)


@every_case
def test_a_fresh_adapter_answers_bit_for_bit_like_the_null_model(name, task):
    null = null_model(base(name), task, seed=1)
    assert torch.equal(answers(adapted(name, task).model, name), answers(null, name))


@every_case
def test_names_shapes_and_round_trip(name, task):
    model = adapted(name, task, target_modules="all-linear")
    state = drawn(model)
    model.write(state)
    read = model.read()
    assert read.spec.peft_type == "lora_xs"
    assert all(torch.equal(read.tensors[key], tensor) for key, tensor in state.tensors.items())
    cores = {key: tuple(one.shape) for key, one in read.tensors.items() if group_of(key) == "core"}
    assert cores == {f"{module.name}.core": (3, 3) for module in model.spec.modules}
    assert not any(".core." in key for key in read.tensors)


def dense_update(spec: AdapterSpec, state: AdapterState, path: str) -> torch.Tensor:
    """The definition, in float64: scaling * B @ R @ A."""
    (module,) = (one for one in spec.modules if one.name == path)
    a, r, b = (state.tensors[f"{path}.{part}"].double() for part in ("factor_a", "core", "factor_b"))
    scaling = module.alpha / (math.sqrt(module.rank) if spec.use_rslora else module.rank)
    return scaling * b @ r @ a


@every_layer
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_layer_computes_base_plus_the_dense_update(name, task, path, use_rslora):
    model = adapted(name, task, target_modules=(path,), use_rslora=use_rslora, alpha=7.0)
    state = drawn(model)
    model.write(state)
    tree = model.model if name != "bert" else model.model.backbone
    x = torch.randn(4, model.spec.modules[0].d_in, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = tree.get_submodule(path)(x).double() - base(name).model.get_submodule(path)(x).double()
    expected = x.double() @ dense_update(model.spec, state, path).T
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


@every_layer
def test_the_core_s_gradient_is_that_of_the_plain_definition(name, task, path):
    """And nothing else has one."""
    model = adapted(name, task, target_modules=(path,), alpha=7.0)
    state = drawn(model)
    model.write(state)
    model.set_trainable(("core",))
    tree = model.model if name != "bert" else model.model.backbone
    layer, (module,) = tree.get_submodule(path), model.spec.modules
    generator = torch.Generator().manual_seed(0)
    x, pull = (torch.randn(4, size, generator=generator) for size in (module.d_in, module.d_out))
    (layer(x) * pull).sum().backward()
    found = {key: tensor.grad for key, tensor in model.trainable().items() if tensor.grad is not None}
    a, b = (state.tensors[f"{path}.{part}"].double() for part in ("factor_a", "factor_b"))
    core = state.tensors[f"{path}.core"].double().requires_grad_()
    frozen = base(name).model.get_submodule(path)
    weight = frozen.weight.double().T if module.fan_in_fan_out else frozen.weight.double()
    plain = functional.linear(x.double(), weight + model.spec.scaling(module) * b @ core @ a)
    (plain * pull.double()).sum().backward()
    assert set(found) == {f"{path}.core"}
    expected = core.grad
    torch.testing.assert_close(
        found[f"{path}.core"].double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
    )


@every_case
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_device_s_plain_adapter_answers_as_the_cored_one(name, task, dtype):
    model = adapted(name, task, alpha=1.0)
    state = model.read()
    generator = torch.Generator().manual_seed(9)
    cores = {key: torch.randn(3, 3, generator=generator) for key in state.tensors if group_of(key) == "core"}
    state = replace(state, tensors={**state.tensors, **cores})
    model.write(state)
    plain = folded(state).cast({"float32": "F32", "bfloat16": "BF16"}[dtype])
    plain = replace(plain, spec=replace(plain.spec, dtype={"float32": "F32", "bfloat16": "BF16"}[dtype]))
    served = shell(base(name), plain.spec)
    served.write(plain)
    tolerance = 1e-4 if dtype == "float32" else 0.05
    torch.testing.assert_close(answers(served.model, name), answers(model.model, name), rtol=tolerance, atol=tolerance)
    assert plain.spec.peft_type == "lora"
    assert not any(group_of(key) == "core" for key in plain.tensors)


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (6, 6)])
@pytest.mark.parametrize("init", ["svd", "random"])
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_the_factors_start_orthonormal(shape, init, rank):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    a, b = start_factors(weight, rank, init=init, generator=torch.Generator().manual_seed(2))
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((rank, shape[1]), (shape[0], rank), torch.float32, torch.float32)
    torch.testing.assert_close(a @ a.T, torch.eye(rank), rtol=0, atol=1e-5)
    torch.testing.assert_close(b.T @ b, torch.eye(rank), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(200, 60), (60, 200), (200, 200)])
def test_svd_finds_the_layer_s_leading_directions(shape):
    """Also where the search space is smaller than the layer: the best rank-4 part of a falling spectrum."""
    generator = torch.Generator().manual_seed(1)
    count = min(shape)
    left, right = (torch.linalg.qr(torch.randn(size, count, generator=generator)).Q for size in shape)
    weight = left @ torch.diag(0.8 ** torch.arange(float(count))) @ right.T
    a, b = start_factors(weight, 4, init="svd", generator=torch.Generator().manual_seed(2))
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(b @ b.T @ weight @ a.T @ a, u[:, :4] * s[:4] @ vh[:4], rtol=0, atol=1e-3)


def test_the_model_s_own_layers_give_the_start_transposed_ones_too():
    for name, task in (("bert", CLASSIFY), ("gpt2", LANGUAGE)):
        model = adapted(name, task)
        for module in model.spec.modules:
            frozen = base(name).model.get_submodule(module.name).weight
            weight = frozen.T if module.fan_in_fan_out else frozen
            s = torch.linalg.svdvals(weight.detach())
            a, b = (model.read().tensors[f"{module.name}.{part}"] for part in ("factor_a", "factor_b"))
            captured = torch.linalg.svdvals(b.T @ weight @ a.T).square().sum()
            assert captured >= 0.97 * s[:3].square().sum(), module.name


def test_first_factors_come_from_seed_and_choice_alone():
    first = adapted(seed=1, core_init="random").read().tensors
    torch.manual_seed(0)
    again = adapted(seed=1, core_init="random").read().tensors
    assert all(torch.equal(again[key], tensor) for key, tensor in first.items())
    for other in (adapted(seed=2, core_init="random"), adapted(seed=1)):
        moved = {group_of(key) for key, one in other.read().tensors.items() if not torch.equal(one, first[key])}
        assert moved >= {"factor_a", "factor_b"}
    assert not any(one.any() for key, one in first.items() if group_of(key) == "core")


@pytest.mark.parametrize("core_init", ["svd", "random"])
def test_attaching_leaves_the_global_random_state_alone(core_init):
    before = torch.random.get_rng_state()
    adapted("gpt2", LANGUAGE, core_init=core_init).write(drawn(adapted("gpt2", LANGUAGE, rank=2)))
    assert torch.equal(before, torch.random.get_rng_state())


def test_cores_and_head_train_unless_somebody_says_otherwise():
    model = adapted()
    free = {group_of(key) for key, tensor in model.trainable().items() if tensor.requires_grad}
    assert free == {"core", "dense"}
    assert {id(one) for one in model.model.parameters() if one.requires_grad} == {
        id(one) for one in model.trainable(("core", "dense")).values()
    }


def test_a_plain_adapter_has_no_core_to_train():
    with pytest.raises(ModelError, match=r"nothing to train in groups \['core'\]"):
        attach(base(), AdapterConfig(rank=2), CLASSIFY, seed=0).set_trainable(("core",))


def test_other_ranks_and_moved_models():
    model = adapted()
    spec = model.spec.with_rank(2)
    other = shell(base(), spec)
    state = drawn(other)
    model.write(state)
    assert all(torch.equal(model.read().tensors[key], one) for key, one in state.tensors.items())
    assert torch.equal(answers(model.model, "bert"), answers(_filled(other, state).model, "bert"))
    model.to("meta")
    assert {tensor.device.type for tensor in model.model.parameters()} == {"meta"}


def _filled(model: AdapterModel, state: AdapterState) -> AdapterModel:
    model.write(state)
    return model


def test_what_does_not_fit_is_refused_whole():
    model = adapted()
    before = model.read().tensors
    plain = attach(base(), AdapterConfig(rank=3), CLASSIFY, seed=0).read()
    without = {key: one for key, one in model.read().tensors.items() if not key.endswith("query.core")}
    wide = {key: torch.ones(4, 4) if group_of(key) == "core" else one for key, one in model.read().tensors.items()}
    faults = [
        (plain, "spec differs in peft_type"),
        (AdapterState(model.spec, without), "missing .*query.core"),
        (AdapterState(model.spec, wide), r"core: found torch.float32 \(4, 4\), expected torch.float32 \(3, 3\)"),
        (AdapterState(replace(model.spec, peft_type="lora"), without), "spec differs in peft_type"),
    ]
    for state, message in faults:
        with pytest.raises(ModelError, match=message):
            model.write(state)
    assert all(torch.equal(model.read().tensors[key], tensor) for key, tensor in before.items())


def test_an_unknown_type_is_named_with_what_there_is():
    with pytest.raises(ModelError, match=r"adapter type 'core' is unknown; expected one of .*lora, lora_xs"):
        check_spec(base(), replace(adapted().spec, peft_type="core"))
