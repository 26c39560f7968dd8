"""Which layers an adapter goes on, and what is said when there are none."""

import pytest
from torch import nn

from federated.adapters import load_base
from federated.adapters.targets import adaptable, layer_sizes, resolve_targets, stores_transposed
from federated.config import ModelConfig
from federated.errors import ModelError


def model(name):
    return load_base(ModelConfig(source=f"tiny:{name}")).model


@pytest.mark.parametrize(
    ("name", "endings"),
    [
        ("bert", {"query", "value"}),
        ("gpt2", {"c_attn"}),
        ("llama", {"q_proj", "v_proj"}),
        ("sensor", {"embed", "mix", "out"}),
    ],
)
def test_auto_means_query_and_value_or_everything(name, endings):
    assert {path.rsplit(".", 1)[-1] for path in resolve_targets(model(name), "auto")} == endings


def test_all_linear_takes_every_layer_of_a_block():
    found = resolve_targets(model("llama"), "all-linear")
    endings = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(found) == 2 * len(endings)
    assert {path.rsplit(".", 1)[-1] for path in found} == endings


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_all_linear_leaves_output_embeddings_and_pooler_alone(name):
    assert not any("lm_head" in path or "pooler" in path for path in resolve_targets(model(name), "all-linear"))


def test_a_name_is_a_suffix_of_whole_parts():
    found = resolve_targets(model("bert"), ("output.dense",))
    assert len(found) == 4
    assert all(path.endswith(".output.dense") for path in found)


def test_a_whole_path_is_one_layer():
    path = "encoder.layer.0.attention.self.query"
    assert resolve_targets(model("bert"), (path,)) == (path,)


def test_the_result_is_sorted_and_without_repeats():
    found = resolve_targets(model("bert"), ("value", "query", "self.query"))
    assert list(found) == sorted(set(found))


def test_a_name_that_matches_nothing_lists_what_there_is():
    with pytest.raises(ModelError, match=r"'quary' matches nothing .* available: dense, key, query, value"):
        resolve_targets(model("bert"), ("query", "quary"))


def test_a_pattern_is_only_a_name():
    with pytest.raises(ModelError, match="matches nothing"):
        resolve_targets(model("bert"), ("([a-z._0-9]+)+X", ".*query"))


@pytest.mark.parametrize("name", ["LayerNorm", "word_embeddings", "encoder"])
def test_a_module_of_another_kind_is_named(name):
    with pytest.raises(ModelError, match=rf"target module {name} is .*; LoRA goes on Linear and Conv1D"):
        resolve_targets(model("bert"), (name,))


@pytest.mark.parametrize("targets", ["auto", "all-linear", ()])
def test_a_model_without_layers_is_refused(targets):
    with pytest.raises(ModelError, match="matches no layer"):
        resolve_targets(nn.Sequential(nn.ReLU()), targets)


def test_many_available_names_are_cut_short():
    many = nn.ModuleDict({f"layer{index:02}": nn.Linear(2, 2) for index in range(20)})
    with pytest.raises(ModelError, match=r"layer11 \.\.\.$"):
        resolve_targets(many, ("nothing",))


def test_conv1d_sizes_are_read_the_right_way_round():
    layer = adaptable(model("gpt2"))["transformer.h.0.attn.c_attn"]
    assert stores_transposed(layer)
    assert layer_sizes(layer) == (32, 96)


def test_linear_sizes_are_read_the_right_way_round():
    layer = nn.Linear(3, 5)
    assert not stores_transposed(layer)
    assert layer_sizes(layer) == (3, 5)
