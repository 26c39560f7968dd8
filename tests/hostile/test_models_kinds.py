"""Specs of adapters without factors that come from afar: refused in one line, before anything is allocated."""

from dataclasses import replace

import pytest
import torch

from federated.adapters import attach, ia3, load_base, prefix, shell
from federated.config import AdapterConfig, ModelConfig, TaskConfig
from federated.errors import ModelError
from federated.manifest import AdapterSpec, ModuleSpec
from federated.state import AdapterState

CLASSIFY = TaskConfig(labels=("no", "yes"))
KINDS = ("ia3", "layernorm", "head", "full", "prompt", "prefix")
LAYER = ModuleSpec("encoder.layer.0.attention.self.query", 32, 32, 2, 4.0)


def base(name="bert"):
    return load_base(ModelConfig(source=f"tiny:{name}"))


def spec_of(kind, **options):
    return attach(base(), AdapterConfig(kind=kind, **options), CLASSIFY, seed=1).spec


def refused(spec, match, name="bert"):
    with pytest.raises(ModelError, match=match) as caught:
        shell(base(name), spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [{"modules": (LAYER,)}, {"rank": 2}, {"alpha": 1.0}, {"use_rslora": True}])
def test_factors_where_there_are_none(kind, change):
    refused(replace(spec_of(kind), **change), rf"kind {kind} has no {next(iter(change))}")


@pytest.mark.parametrize("kind", ["head", "full", "prompt", "prefix", "lora"])
def test_names_where_none_are_chosen(kind):
    refused(replace(spec_of(kind), trained=("encoder.layer.0.output.LayerNorm.weight",)), f"kind {kind} has no trained")


@pytest.mark.parametrize("kind", ["head", "full", "ia3", "layernorm", "lora"])
@pytest.mark.parametrize("tokens", [1, 10**9, -1, "many", [1]])
def test_virtual_tokens_where_there_is_no_prompt(kind, tokens):
    refused(replace(spec_of(kind), virtual_tokens=tokens), f"kind {kind} has no virtual_tokens")


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("tokens", [0, -1, 512, 1025, 10**12, 2.0, True, "8", None, float("nan")])
def test_an_impossible_prompt_or_prefix(kind, tokens):
    refused(replace(spec_of(kind), virtual_tokens=tokens), r"virtual_tokens is .*; expected 1 to 511 for tiny:bert")


def test_a_prefix_of_more_numbers_than_fit_a_packet(monkeypatch):
    monkeypatch.setattr("federated.adapters.prefix._MOST_VALUES", 40 * 2 * 2 * 32 + 1)
    refused(replace(spec_of("prefix"), virtual_tokens=41), r"virtual_tokens is 41; expected 1 to 40 for tiny:bert")
    assert shell(base(), replace(spec_of("prefix"), virtual_tokens=40)).spec.virtual_tokens == 40


@pytest.mark.parametrize("tokens", [1025, 10**12])
def test_an_impossible_prefix_costs_one_token(monkeypatch, tokens):
    read, kept = [], prefix._kept
    monkeypatch.setattr(prefix, "_kept", lambda base, ids: read.append(tuple(ids.shape)) or kept(base, ids))
    spec = replace(spec_of("prompt"), peft_type="prefix", virtual_tokens=tokens)
    refused(spec, "expected 1 to 511")
    assert read == [(1, 1)]


def test_a_prompt_on_a_stock_head():
    spec = spec_of("prompt")
    refused(replace(spec, head=replace(spec.head, kind="stock")), r"task\.head=mean_pool")


def test_a_prompt_on_a_sensor_model():
    refused(spec_of("prompt"), "takes no embeddings", name="sensor")


def test_a_prefix_on_a_sensor_model():
    refused(spec_of("prefix"), r"\(TinySensor\) takes no past_key_values; use adapter=lora", name="sensor")


def test_a_prefix_of_another_base():
    model = attach(base("gpt2"), AdapterConfig(kind="prefix"), CLASSIFY, seed=1)
    state = attach(base("llama"), AdapterConfig(kind="prefix"), CLASSIFY, seed=1).read()
    with pytest.raises(ModelError, match=r"prefix\.0\.key: found .*\(1, 16, 16\), expected .*\(2, 16, 16\)"):
        model.write(state)


@pytest.mark.parametrize(
    "name",
    [
        "encoder.layer.0.output.dense.weight", "encoder.layer.0.output.dense.scale", "scale_in", ".scale_in", "",
        "encoder.layer.9.output.dense.scale_in", "pooler.dense.scale_out", "encoder.layer.0.output.LayerNorm.scale_out",
        "(a+)+$.scale_in", "encoder.layer.0.output.scale_in",
    ],
)  # fmt: skip
def test_what_ia3_cannot_scale(name):
    refused(replace(spec_of("ia3"), trained=(name,)), "is no scale_in or scale_out of a layer")


def test_a_layer_that_ia3_scales_twice():
    path = "encoder.layer.0.output.dense"
    refused(replace(spec_of("ia3"), trained=(f"{path}.scale_in", f"{path}.scale_out")), f"names layer {path} twice")


@pytest.mark.parametrize("kind", ["ia3", "layernorm"])
def test_nothing_at_all(kind):
    refused(replace(spec_of(kind), trained=()), "scales no layer|trains 0 names")


@pytest.mark.parametrize(
    "name", ["encoder.layer.0.output.dense.weight", "encoder.layer.0.output.LayerNorm", "pooler.LayerNorm.weight", ""]
)
def test_what_is_no_norm(name):
    spec = spec_of("layernorm")
    refused(replace(spec, trained=(*spec.trained, name)), "expected weights and biases of norms")


def test_a_norm_that_is_named_twice():
    spec = spec_of("layernorm")
    refused(replace(spec, trained=spec.trained * 2), "trains 20 names")


def test_norms_of_another_base():
    refused(spec_of("layernorm"), "expected weights and biases of norms, such as", name="gpt2")


@pytest.mark.parametrize("kind", ["layernorm", "full"])
def test_copies_in_fewer_bits(kind):
    refused(replace(spec_of(kind), dtype="BF16"), "which fewer bits would change")


@pytest.mark.parametrize("change", [{"head": None}, {"trained": False}])
def test_a_head_that_is_not_there(change):
    spec = spec_of("head")
    head = None if "head" in change else replace(spec.head, **change)
    refused(replace(spec, head=head), "trains the task's head alone")


@pytest.mark.parametrize("names", [[1, 2], [None], "abc", [["a"]]])
def test_names_that_are_no_strings(names):
    plain = {**spec_of("ia3").plain, "trained": names}
    refused(AdapterSpec.from_dict(plain), "is no scale_in or scale_out")


@pytest.mark.parametrize("names", [5, None, True])
def test_names_that_are_no_list(names):
    with pytest.raises(TypeError):
        AdapterSpec.from_dict({**spec_of("ia3").plain, "trained": names})


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_another_kind_is_not_written(kind):
    model = attach(base(), AdapterConfig(kind=kind), CLASSIFY, seed=1)
    before = model.masters()
    for other in ("lora", *KINDS):
        if other != kind:
            state = attach(base(), AdapterConfig(kind=other), CLASSIFY, seed=2).read()
            with pytest.raises(ModelError, match=rf"peft_type \(found {other}, expected {kind}\)"):
                model.write(state)
    assert all(torch.equal(tensor, model.masters()[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("kind", "field"),
    [("ia3", "trained"), ("layernorm", "trained"), ("prompt", "virtual_tokens"), ("prefix", "virtual_tokens")],
)
def test_a_state_of_another_size_is_not_written(kind, field):
    model = attach(base(), AdapterConfig(kind=kind), CLASSIFY, seed=1)
    other = model.spec.virtual_tokens + 1 if field == "virtual_tokens" else model.spec.trained[:-1]
    with pytest.raises(ModelError, match=f"differs in {field}"):
        model.write(AdapterState(replace(model.spec, **{field: other}), model.read().tensors))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_from_afar_is_not_taken_over(kind):
    model = attach(base(), AdapterConfig(kind=kind), CLASSIFY, seed=1)
    with pytest.raises(ModelError, match=f"kind {kind} has no rank"):
        model.write(AdapterState(replace(model.spec, rank=7), model.read().tensors))


def test_a_residual_of_another_kind_is_refused():
    model = attach(base(), AdapterConfig(rank=2), CLASSIFY, seed=1)
    head = attach(base(), AdapterConfig(kind="head"), CLASSIFY, seed=1)
    state = AdapterState(model.spec, model.read().tensors, residual=AdapterState(head.spec, {}))
    with pytest.raises(ModelError, match="found one of kind head"):
        model.write(state)


def test_layers_that_peft_scales_besides_are_caught():
    spec = spec_of("ia3")
    renamed = replace(spec, trained=tuple(name.replace("encoder.layer.0.", "") for name in spec.trained))
    with pytest.raises(ModelError, match="peft scaled other layers than asked for"):
        ia3.inject_ia3(attach(base(), AdapterConfig(kind="head"), CLASSIFY, seed=0).model.backbone, renamed)
