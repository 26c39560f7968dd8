"""Specs and states that do not fit: refused in one line, and nothing is written."""

from dataclasses import replace

import pytest
import torch

from federated.adapters import attach, load_base, lora, shell
from federated.config import AdapterConfig, ModelConfig, TaskConfig
from federated.errors import ModelError
from federated.state import AdapterState

LABELS = ("no", "yes")
CLASSIFY = TaskConfig(labels=LABELS)


def base(name="bert", **options):
    return load_base(ModelConfig(source=f"tiny:{name}", **options))


def adapted(**options):
    return attach(base(), AdapterConfig(**{"rank": 4, **options}), CLASSIFY, seed=1)


def test_a_rank_larger_than_a_layer_names_the_layer():
    expected = (
        r"rank 33 is larger than layer encoder\.layer\.0\.attention\.self\.query \(32 -> 32\) allows; set adapter\.rank"
    )
    with pytest.raises(ModelError, match=expected):
        adapted(rank=33)


def test_a_target_that_matches_nothing_names_it():
    with pytest.raises(ModelError, match="'nothing' matches nothing in the base model; available: dense"):
        adapted(target_modules=("nothing",))


@pytest.mark.parametrize(
    ("name", "task"),
    [("bert", "causal_lm"), ("sensor", "causal_lm"), ("sensor", "sequence_classification"), ("bert", "sensor")],
)
def test_a_base_of_the_wrong_kind_is_named(name, task):
    labels = () if task == "causal_lm" else LABELS
    with pytest.raises(ModelError, match=rf"task {task} needs a base model of kind .*; tiny:{name}"):
        attach(base(name), AdapterConfig(rank=2), TaskConfig(name=task, labels=labels), seed=0)


def test_a_plain_module_has_no_stock_head():
    task = TaskConfig(name="sensor", labels=LABELS, head="stock")
    with pytest.raises(ModelError, match=r"no stock head; set task\.head=mean_pool"):
        attach(base("sensor"), AdapterConfig(rank=2), task, seed=0)


def test_a_stock_head_needs_a_float32_base():
    task = TaskConfig(labels=LABELS, head="stock")
    with pytest.raises(ModelError, match=r"float32"):
        attach(base(dtype="bfloat16"), AdapterConfig(rank=2), task, seed=0)


def test_an_architecture_without_a_stock_head_is_named(monkeypatch):
    from transformers import AutoModelForSequenceClassification

    def refuse(config):
        raise ValueError("Unrecognized configuration class")

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_config", refuse)
    task = TaskConfig(labels=LABELS, head="stock")
    with pytest.raises(ModelError, match="BertModel has no stock classification head"):
        attach(base(), AdapterConfig(rank=2), task, seed=0)


class TestSpecs:
    """A spec may come from a registry or a release: it is checked against the base before anything is allocated."""

    def test_another_method(self):
        expected = "'pickle' is unknown; expected one of full, head, ia3, layernorm, lora, lora_xs, prefix, prompt"
        with pytest.raises(ModelError, match=expected):
            shell(base(), replace(adapted().spec, peft_type="pickle"))

    def test_no_modules(self):
        with pytest.raises(ModelError, match="adapts no layer"):
            shell(base(), replace(adapted().spec, modules=()))

    def test_a_layer_that_is_not_there(self):
        spec = adapted().spec
        with pytest.raises(ModelError, match=r"a layer \(a\+\)\+\$, which this base model does not have"):
            shell(base(), replace(spec, modules=(replace(spec.modules[0], name="(a+)+$"),)))

    @pytest.mark.parametrize("change", [{"d_in": 31}, {"d_out": 64}, {"fan_in_fan_out": True}])
    def test_a_layer_of_other_sizes(self, change):
        spec = adapted().spec
        with pytest.raises(ModelError, match=r"layer encoder.layer.0.attention.self.query: the adapter expects"):
            shell(base(), replace(spec, modules=(replace(spec.modules[0], **change),)))

    @pytest.mark.parametrize("rank", [0, -1, 10**7])
    def test_a_rank_that_no_layer_has(self, rank):
        spec = adapted().spec
        with pytest.raises(ModelError, match=f"rank {rank} "):
            shell(base(), replace(spec, modules=(replace(spec.modules[0], rank=rank),)))

    @pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -1.0, 0.0])
    def test_an_alpha_that_is_no_positive_number(self, alpha):
        spec = adapted().spec
        with pytest.raises(ModelError, match="alpha"):
            shell(base(), replace(spec, modules=(replace(spec.modules[0], alpha=alpha),)))

    def test_a_layer_that_is_named_twice(self):
        spec = adapted().spec
        with pytest.raises(ModelError, match="twice"):
            shell(base(), replace(spec, modules=(spec.modules[0], spec.modules[0])))

    def test_an_unknown_head(self):
        spec = adapted().spec
        with pytest.raises(ModelError, match="head kind 'evil' is unknown"):
            shell(base(), replace(spec, head=replace(spec.head, kind="evil")))

    @pytest.mark.parametrize("labels", [0, -3, 10**9])
    def test_a_head_of_impossible_size(self, labels):
        spec = adapted().spec
        with pytest.raises(ModelError, match="num_labels"):
            shell(base(), replace(spec, head=replace(spec.head, num_labels=labels)))

    def test_an_unknown_dtype(self):
        with pytest.raises(ModelError, match="dtype 'F64' is unknown"):
            shell(base(), replace(adapted().spec, dtype="F64"))


class TestStates:
    @pytest.fixture
    def model(self):
        return adapted()

    def refused(self, model, state, match):
        before = model.masters()
        with pytest.raises(ModelError, match=match):
            model.write(state)
        after = model.masters()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_a_foreign_key_never_reaches_the_base(self, model):
        name = "embeddings.word_embeddings.weight"
        state = AdapterState(model.spec, {**model.read().tensors, name: torch.zeros(260, 32)})
        self.refused(model, state, match=rf"unexpected \['{name}'\]")

    def test_a_base_layer_key_never_reaches_the_base(self, model):
        name = "encoder.layer.0.attention.self.query.base_layer.weight"
        state = AdapterState(model.spec, {**model.read().tensors, name: torch.zeros(32, 32)})
        self.refused(model, state, match="unexpected")

    def test_a_missing_tensor(self, model):
        tensors = dict(model.read().tensors)
        tensors.pop("classifier.bias")
        self.refused(model, AdapterState(model.spec, tensors), match=r"missing \['classifier.bias'\]")

    @pytest.mark.parametrize("shape", [(1, 32), (32, 2), (64,)])
    def test_another_shape(self, model, shape):
        state = AdapterState(model.spec, {**model.read().tensors, "classifier.weight": torch.zeros(shape)})
        self.refused(
            model, state, match=r"classifier\.weight: found torch\.float32 .* expected torch\.float32 \(2, 32\)"
        )

    @pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float16])
    def test_another_dtype(self, model, dtype):
        tensors = {name: tensor.to(dtype) for name, tensor in model.read().tensors.items()}
        self.refused(model, AdapterState(model.spec, tensors), match="expected torch.float32")

    @pytest.mark.parametrize(
        ("change", "field"),
        [({"alpha": 1e30}, "alpha"), ({"use_rslora": True}, "use_rslora"), ({"head": None}, "head")],
    )
    def test_another_algebra(self, model, change, field):
        state = AdapterState(replace(model.spec, **change), model.read().tensors)
        self.refused(model, state, match=f"spec differs in {field}")

    def test_other_layers(self, model):
        state = AdapterState(replace(model.spec, modules=model.spec.modules[:-1]), model.read().tensors)
        self.refused(model, state, match="spec differs in its adapted layers")


QUERY = "encoder.layer.0.attention.self.query"


class TestResiduals:
    """A residual comes from afar with every round: it is checked as the adapter is, before anything is written."""

    @pytest.fixture
    def model(self):
        return adapted()

    def residual(self, model, names=None, tensors=None, **changes) -> AdapterState:
        """A right residual of rank 2, or one with some fields of its modules or tensors changed."""
        kept = [one for one in model.spec.modules if names is None or one.name in names]
        modules = tuple(replace(one, **{"rank": 2, "alpha": 2.0, **changes}) for one in kept)
        spec = replace(model.spec, rank=2, alpha=2.0, modules=modules, head=None)
        made = {f"{one.name}.factor_a": torch.ones(2, one.d_in) for one in kept}
        made |= {f"{one.name}.factor_b": torch.ones(one.d_out, 2) for one in kept}
        return AdapterState(spec, made if tensors is None else tensors(made))

    def refused(self, model, residual, match):
        before, answer = model.read(), answers(model)
        state = replace(before, tensors={name: tensor + 1.0 for name, tensor in before.tensors.items()})
        with pytest.raises(ModelError, match=match):
            model.write(replace(state, residual=residual))
        after = model.read()
        assert all(torch.equal(before.tensors[name], tensor) for name, tensor in after.tensors.items())
        assert after.residual is before.residual
        assert torch.equal(answers(model), answer)

    def test_a_right_one_is_taken(self, model):
        before = answers(model)
        model.write(replace(model.read(), residual=self.residual(model)))
        assert not torch.equal(answers(model), before)

    def test_tensors_that_are_not_there(self, model):
        self.refused(model, self.residual(model, tensors=lambda made: {}), "do not have the names and shapes")

    def test_a_foreign_key(self, model):
        foreign = {"embeddings.word_embeddings.weight": torch.zeros(260, 32)}
        self.refused(model, self.residual(model, tensors=lambda made: made | foreign), "names and shapes")

    @pytest.mark.parametrize("shape", [(32, 2), (3, 32), (64,)])
    def test_another_shape(self, model, shape):
        odd = {f"{QUERY}.factor_a": torch.zeros(shape)}
        self.refused(model, self.residual(model, tensors=lambda made: made | odd), "names and shapes")

    @pytest.mark.parametrize("rank", [0, -1, 33, 10**9])
    def test_a_rank_that_no_layer_has(self, model, rank):
        self.refused(model, self.residual(model, rank=rank), f"rank {rank} ")

    @pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 0.0, -1.0])
    def test_an_alpha_that_is_no_positive_number(self, model, alpha):
        self.refused(model, self.residual(model, alpha=alpha), "alpha")

    @pytest.mark.parametrize("change", [{"d_in": 31}, {"fan_in_fan_out": True}])
    def test_a_layer_of_other_sizes(self, model, change):
        self.refused(model, self.residual(model, **change), "the adapter expects")

    def test_a_layer_of_the_base_that_is_not_adapted(self, model):
        name = "encoder.layer.0.intermediate.dense"
        spec = shell(base(), replace(model.spec, modules=(replace(model.spec.modules[0], name=name, d_out=64),))).spec
        tensors = {f"{name}.factor_a": torch.ones(4, 32), f"{name}.factor_b": torch.ones(64, 4)}
        self.refused(model, AdapterState(spec, tensors), rf"the residual adapts {name}, which the adapter")

    def test_a_layer_that_is_not_there(self, model):
        residual = self.residual(model)
        odd = replace(residual.spec, modules=(replace(residual.spec.modules[0], name="(a+)+$"),))
        self.refused(model, AdapterState(odd, residual.tensors), "does not have")

    def test_no_layer_and_one_twice(self, model):
        residual = self.residual(model)
        for modules, match in (((), "adapts no layer"), ((residual.spec.modules[0],) * 2, "twice")):
            self.refused(model, AdapterState(replace(residual.spec, modules=modules), {}), match)

    def test_a_second_one_that_is_wrong_leaves_the_first(self, model):
        model.write(replace(model.read(), residual=self.residual(model)))
        self.refused(model, self.residual(model, rank=33), "rank 33 ")


def answers(model):
    with torch.no_grad():
        return model.model(input_ids=torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize("groups", [(), ("factor_c",), ("everything", "dense")])
def test_groups_that_train_nothing_are_refused(groups):
    with pytest.raises(ModelError, match="nothing to train in groups"):
        adapted().set_trainable(groups)


def test_a_frozen_head_leaves_no_dense_group():
    with pytest.raises(ModelError, match=r"nothing to train in groups \['dense'\]"):
        adapted(train_head=False).set_trainable(("dense",))


def test_layers_that_peft_adapts_besides_are_caught(monkeypatch):
    inject = lora._peft_config

    def one_too_many(spec, dropout):
        config = inject(spec, dropout)
        config.target_modules = {"query", "value", "key"}
        return config

    monkeypatch.setattr(lora, "_peft_config", one_too_many)
    with pytest.raises(ModelError, match=r"peft adapted \['encoder.layer.0.attention.self.key'"):
        adapted()


def test_anything_else_that_is_left_trainable_is_caught(monkeypatch):
    inject = lora._peft_config

    def with_bias(spec, dropout):
        config = inject(spec, dropout)
        config.bias = "lora_only"
        return config

    monkeypatch.setattr(lora, "_peft_config", with_bias)
    try:
        with pytest.raises(ModelError, match="of the base model trainable; expected LoRA factors only"):
            adapted()
    finally:
        base().model.requires_grad_(False)
