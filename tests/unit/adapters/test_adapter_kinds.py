"""Adapters without factors: a fresh one answers as the base, the base is never written to, and state is exact."""

import copy
from dataclasses import asdict

import pytest
import torch
from torch import nn

from federated.adapters import attach, base_from_module, load_base, null_model, shell
from federated.adapters.fingerprint import base_digest
from federated.adapters.ia3 import ia3_tensors
from federated.adapters.kinds import FACTORLESS
from federated.config import AdapterConfig, ModelConfig, TaskConfig
from federated.config.parts import WITHOUT_FACTORS
from federated.errors import ModelError
from federated.manifest import AdapterSpec, canonical_json
from federated.state import AdapterState, group_of
from federated.tasks import make_task

LABELS = ("no", "yes", "perhaps")
CLASSIFY = TaskConfig(labels=LABELS)
STOCK = TaskConfig(labels=LABELS, head="stock")
LANGUAGE = TaskConfig(name="causal_lm")
SENSOR = TaskConfig(name="sensor", labels=LABELS)
TASKS = [
    ("bert", CLASSIFY), ("bert", STOCK), ("gpt2", CLASSIFY), ("gpt2", STOCK), ("gpt2", LANGUAGE),
    ("llama", CLASSIFY), ("llama", STOCK), ("llama", LANGUAGE), ("sensor", SENSOR),
]  # fmt: skip
KINDS = ("ia3", "layernorm", "head", "full", "prompt", "prefix")


def fits(kind, name, task):
    """Sensors have no norms and no tokens, language models no head, and a stock head no prompt (but a prefix)."""
    return not (
        (name == "sensor" and kind in ("layernorm", "prompt", "prefix"))
        or (task is LANGUAGE and kind == "head")
        or (task is STOCK and kind == "prompt")
    )


CASES = [(kind, name, task) for kind in KINDS for name, task in TASKS if fits(kind, name, task)]
every_case = pytest.mark.parametrize(
    ("kind", "name", "task"), CASES, ids=[f"{kind}-{name}-{task.name}-{task.head}" for kind, name, task in CASES]
)


def base(name="bert", **options):
    return load_base(ModelConfig(source=f"tiny:{name}", **options))


def adapted(kind, name="bert", task=CLASSIFY, *, seed=1, **options):
    return attach(base(name), AdapterConfig(kind=kind, **options), task, seed=seed)


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


@every_case
def test_a_fresh_adapter_answers_bit_for_bit_like_the_null_model(kind, name, task):
    null = null_model(base(name), task, seed=1)
    same = torch.equal(answers(adapted(kind, name, task).model, name), answers(null, name))
    assert same == (kind not in ("prompt", "prefix"))  # they start as words in front of the text


@every_case
def test_the_base_is_not_touched(kind, name, task):
    modules = [type(module) for module in base(name).model.modules()]
    model = adapted(kind, name, task)
    model.write(random_state(model))
    assert base_digest(base(name).model, base(name).tokenizer) == base(name).base_digest
    assert [type(module) for module in base(name).model.modules()] == modules
    assert not any(tensor.requires_grad for tensor in base(name).model.parameters())


@every_case
def test_what_is_not_trained_is_the_base_s_own_tensor(kind, name, task):
    model = adapted(kind, name, task)
    shared = {id(tensor) for tensor in [*base(name).model.parameters(), *base(name).model.buffers()]}
    live = {id(tensor) for tensor in model.trainable().values()}
    assert not live & shared
    strange = {id(tensor) for tensor in [*model.model.parameters(), *model.model.buffers()]} - shared - live
    assert strange == set()


@every_case
def test_only_the_adapter_can_train_and_all_of_it_averages(kind, name, task):
    model = adapted(kind, name, task)
    free = {id(tensor) for tensor in model.model.parameters() if tensor.requires_grad}
    assert free == {id(tensor) for tensor in model.trainable().values()}
    assert {group_of(tensor) for tensor in model.read().tensors} == {"dense"}
    assert list(model.read().pairs()) == []


@every_case
def test_state_goes_in_and_out_exactly(kind, name, task):
    model = adapted(kind, name, task)
    state = random_state(model)
    before = answers(model.model, name)
    model.write(state)
    read = model.read()
    assert read.spec == state.spec
    assert read.tensors.keys() == state.tensors.keys()
    assert all(torch.equal(read.tensors[key], state.tensors[key]) for key in state.tensors)
    assert not torch.equal(answers(model.model, name), before)


@every_case
def test_another_tree_with_the_state_answers_the_same(kind, name, task):
    model = adapted(kind, name, task)
    state = random_state(model)
    model.write(state)
    slot = shell(base(name), AdapterSpec.from_dict(asdict(model.spec)), seed=99)
    slot.write(state)
    assert torch.equal(answers(slot.model, name), answers(model.model, name))


@every_case
def test_the_spec_survives_plain_data(kind, name, task):
    spec = adapted(kind, name, task).spec
    assert AdapterSpec.from_dict(spec.plain) == spec
    assert spec.peft_type == kind
    assert (spec.modules, spec.rank, spec.alpha) == ((), 0, 0.0)


def test_two_adapters_over_one_base_do_not_disturb_each_other():
    null = answers(null_model(base(), CLASSIFY, seed=1), "bert")
    models = {kind: adapted(kind) for kind in KINDS}
    expected = {kind: answers(model.model, "bert") for kind, model in models.items()}
    for kind in KINDS:
        models[kind].write(random_state(models[kind]))
        assert not torch.equal(answers(models[kind].model, "bert"), expected.pop(kind))
        for other, before in expected.items():
            assert torch.equal(answers(models[other].model, "bert"), before)
    assert torch.equal(answers(null_model(base(), CLASSIFY, seed=1), "bert"), null)


def test_one_list_of_the_kinds_without_factors():
    assert sorted(FACTORLESS) == sorted(WITHOUT_FACTORS) == sorted(KINDS)


def test_a_spec_without_the_later_fields_keeps_its_form():
    spec = attach(base(), AdapterConfig(rank=2), CLASSIFY, seed=0).spec
    assert spec.plain.keys() == {"peft_type", "rank", "alpha", "use_rslora", "modules", "head", "dtype"}
    assert b'trained":[' not in canonical_json(spec.plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_moves_whole_and_leaves_the_base_where_it_is(kind):
    name, task = ("bert", CLASSIFY) if kind == "head" else ("llama", LANGUAGE)
    model = adapted(kind, name, task).to("meta")
    assert {tensor.device.type for tensor in model.model.parameters()} == {"meta"}
    assert {tensor.device.type for tensor in model.trainable().values()} == {"meta"}
    live = {id(tensor) for tensor in model.model.parameters()}
    assert all(id(tensor) in live for tensor in model.trainable().values())
    assert {tensor.device.type for tensor in base(name).model.parameters()} == {"cpu"}


@pytest.mark.parametrize("kind", ["ia3", "layernorm", "full", "prompt", "prefix"])
def test_a_frozen_head_does_not_travel(kind):
    assert not any(name.startswith("classifier") for name in adapted(kind, train_head=False).read().tensors)


class TestSizes:
    """Counted by hand on tiny:bert: hidden 32, feed-forward 64, two layers, three labels."""

    HEAD = 3 * 32 + 3
    BASE = sum(tensor.numel() for name, tensor in base().model.named_parameters() if "pooler" not in name)
    EXPECTED = {  # noqa: RUF012
        "ia3": 2 * (32 + 32 + 64), "layernorm": (1 + 2 * 2) * 2 * 32, "head": 0, "full": BASE, "prompt": 16 * 32,
        "prefix": 16 * 2 * 2 * 32,
    }  # fmt: skip

    @pytest.mark.parametrize("kind", KINDS)
    def test_of(self, kind):
        found = sum(tensor.numel() for tensor in adapted(kind).read().tensors.values())
        assert found == self.EXPECTED[kind] + self.HEAD


class TestIA3:
    @pytest.mark.parametrize(
        ("name", "task", "path", "side"),
        [
            ("bert", CLASSIFY, "encoder.layer.0.attention.self.key", "scale_out"),
            ("bert", CLASSIFY, "encoder.layer.1.output.dense", "scale_in"),
            ("gpt2", LANGUAGE, "transformer.h.0.attn.c_attn", "scale_out"),
            ("gpt2", LANGUAGE, "transformer.h.1.mlp.c_proj", "scale_in"),
            ("llama", LANGUAGE, "model.layers.0.self_attn.v_proj", "scale_out"),
            ("llama", LANGUAGE, "model.layers.1.mlp.down_proj", "scale_in"),
        ],
    )
    def test_a_layer_computes_its_equation(self, name, task, path, side):
        model = adapted("ia3", name, task)
        state = random_state(model)
        model.write(state)
        scale = state.tensors[f"{path}.{side}"].flatten().double()
        plain = copy.deepcopy(base(name).model.get_submodule(path)).double()
        x = torch.randn(4, len(scale) if side == "scale_in" else 32, generator=torch.Generator().manual_seed(0))
        tree = model.model if name != "bert" else model.model.backbone
        with torch.no_grad():
            found = tree.get_submodule(path)(x).double()
            expected = plain(scale * x.double()) if side == "scale_in" else scale * plain(x.double())
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)

    def test_auto_takes_keys_values_and_feed_forwards_alone(self):
        layer = "encoder.layer.0."
        names = [name for name in ia3_tensors(base().model, "auto") if name.startswith(layer)]
        assert [name.removeprefix(layer) for name in names] == [
            "attention.self.key.scale_out", "attention.self.value.scale_out", "output.dense.scale_in"
        ]  # fmt: skip

    def test_the_same_layers_have_the_same_names_under_every_task(self):
        assert adapted("ia3", "gpt2", CLASSIFY).spec.trained == adapted("ia3", "gpt2", LANGUAGE).spec.trained

    def test_every_layer_of_a_plain_module(self):
        assert ia3_tensors(base("sensor").model, "auto") == ("embed.scale_out", "mix.scale_out", "out.scale_out")

    def test_chosen_layers(self):
        spec = adapted("ia3", target_modules=("query", "encoder.layer.1.output.dense")).spec
        assert spec.trained == (
            "encoder.layer.0.attention.self.query.scale_out",
            "encoder.layer.1.attention.self.query.scale_out",
            "encoder.layer.1.output.dense.scale_in",
        )

    def test_all_linear(self):
        assert len(adapted("ia3", target_modules="all-linear").spec.trained) == 12

    def test_a_target_that_matches_nothing_names_it(self):
        with pytest.raises(ModelError, match="'nothing' matches nothing"):
            adapted("ia3", target_modules=("nothing",))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_fewer_bits_start_at_one_all_the_same(self, dtype):
        model = adapted("ia3", dtype=dtype, train_head=False)
        model.write(model.read())
        assert torch.equal(answers(model.model, "bert"), answers(null_model(base(), CLASSIFY, seed=1), "bert"))

    def test_a_bfloat16_base(self):
        low = load_base(ModelConfig(source="tiny:llama", dtype="bfloat16"))
        model = attach(low, AdapterConfig(kind="ia3"), LANGUAGE, seed=0)
        assert torch.equal(answers(model.model, "llama"), answers(low.model, "llama"))

    def test_attaching_is_silent(self, recwarn, capfd):
        before = torch.random.get_rng_state()
        adapted("ia3", "gpt2", LANGUAGE)
        assert not recwarn.list
        assert capfd.readouterr().err == ""
        assert torch.equal(before, torch.random.get_rng_state())


class Recurrent(nn.Module):
    """A series model whose layer keeps a second list of its weights, and a scalar of its own."""

    def __init__(self):
        super().__init__()
        self.hidden_size = 6
        self.lstm = nn.LSTM(3, 6, batch_first=True)
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, values, attention_mask):
        return self.gain * self.lstm(values)[0]


class TestCopies:
    @pytest.mark.parametrize(("name", "task"), [("bert", CLASSIFY), ("gpt2", LANGUAGE), ("llama", LANGUAGE)])
    def test_a_whole_model_answers_as_a_base_with_its_weights(self, name, task):
        model = adapted("full", name, task)
        drawn = {key: 0.3 * tensor for key, tensor in random_state(model).tensors.items()}
        model.write(AdapterState(model.spec, drawn))
        other = copy.deepcopy(base(name).model)
        for key, tensor in other.named_parameters():
            if key in drawn:
                tensor.data = drawn[key]
        null = null_model(base_from_module(other), task, seed=1)
        if task is CLASSIFY:
            for key, tensor in null.classifier.named_parameters():
                tensor.data = drawn[f"classifier.{key}"]
        assert torch.equal(answers(model.model, name), answers(null, name))

    def test_tied_weights_stay_tied(self):
        model = adapted("full", "llama", LANGUAGE)
        assert model.model.lm_head.weight is model.model.model.embed_tokens.weight
        assert "lm_head.weight" not in model.read().tensors

    def test_a_classifier_leaves_a_language_model_s_output_alone(self):
        untied = copy.deepcopy(base("llama").model)
        untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
        plain = base_from_module(untied, base("llama").tokenizer)
        spec = AdapterConfig(kind="full")
        assert "lm_head.weight" not in attach(plain, spec, CLASSIFY, seed=0).read().tensors
        assert "lm_head.weight" in attach(plain, spec, LANGUAGE, seed=0).read().tensors

    def test_a_recurrent_layer_computes_with_its_copies(self):
        plain = base_from_module(Recurrent())
        model = attach(plain, AdapterConfig(kind="full"), SENSOR, seed=0)
        assert model.read().tensors["gain"].shape == ()
        null = null_model(plain, SENSOR, seed=0)
        assert torch.equal(answers(model.model, "sensor"), answers(null, "sensor"))
        model.model(**inputs("sensor")).sum().backward()
        assert all(tensor.grad is not None and tensor.grad.any() for tensor in model.trainable().values())
        model.write(random_state(model))
        assert not torch.equal(answers(model.model, "sensor"), answers(null, "sensor"))
        assert base_digest(plain.model, None) == plain.base_digest

    def test_a_stock_head_takes_the_pooler_and_the_whole_model_the_rest(self):
        stock = adapted("full", "bert", STOCK).read().tensors
        assert {"pooler.dense.weight", "encoder.layer.0.output.dense.weight"} < stock.keys()
        assert not any("pooler" in name for name in adapted("full", "bert", CLASSIFY).read().tensors)

    def test_norms_of_every_architecture(self):
        trained = {name: adapted("layernorm", name, LANGUAGE).spec.trained for name in ("gpt2", "llama")}
        assert {"transformer.ln_f.bias", "transformer.h.0.ln_1.weight"} < set(trained["gpt2"])
        assert {"model.norm.weight", "model.layers.1.input_layernorm.weight"} < set(trained["llama"])
        assert len(trained["llama"]) == 5

    def test_a_model_without_norms_is_named(self):
        with pytest.raises(ModelError, match="tiny:sensor has no LayerNorm or RMSNorm"):
            adapted("layernorm", "sensor", SENSOR)

    def test_a_large_model_is_refused_and_may_be_allowed(self):
        expected = r"all 26,912 parameters of tiny:llama, more than adapter\.max_params = 26,911; .*adapter=lora"
        with pytest.raises(ModelError, match=expected) as caught:
            adapted("full", "llama", LANGUAGE, max_params=26_911)
        assert "\n" not in str(caught.value)
        assert adapted("full", "llama", LANGUAGE, max_params=26_912).spec.peft_type == "full"

    def test_the_limit_is_for_whole_models_alone(self):
        assert adapted("layernorm", max_params=0).spec.peft_type == "layernorm"

    @pytest.mark.parametrize("kind", ["layernorm", "full"])
    def test_copies_are_float32(self, kind):
        with pytest.raises(ModelError, match=r"set adapter\.dtype=float32"):
            adapted(kind, dtype="bfloat16")
        low = load_base(ModelConfig(source="tiny:llama", dtype="bfloat16"))
        with pytest.raises(ModelError, match=r"set model\.dtype=float32"):
            attach(low, AdapterConfig(kind=kind), LANGUAGE, seed=0)

    def test_a_base_with_a_classifier_of_its_own_is_named(self):
        class Odd(Recurrent):
            def __init__(self):
                super().__init__()
                self.classifier = nn.Linear(2, 2)

        with pytest.raises(ModelError, match=r"has a tensor classifier\.bias, and so has the task's head"):
            attach(base_from_module(Odd(), source="odd"), AdapterConfig(kind="full"), SENSOR, seed=0)

    @pytest.mark.parametrize("name", ["core", "factor_a"])
    def test_a_base_with_a_factor_s_name_is_named(self, name):
        plain = Recurrent()
        plain.register_parameter(name, nn.Parameter(torch.ones(2)))
        with pytest.raises(ModelError, match=f"has a tensor {name}, which is a factor's name"):
            attach(base_from_module(plain, source="odd"), AdapterConfig(kind="full"), SENSOR, seed=0)


class TestHead:
    def test_a_language_model_has_none(self):
        with pytest.raises(ModelError, match=r"trains the task's head alone, and this one has no head"):
            adapted("head", "llama", LANGUAGE)

    def test_a_frozen_head_leaves_nothing(self):
        with pytest.raises(ModelError, match=r"a frozen head; .*adapter\.train_head=true"):
            adapted("head", train_head=False)


WORDS = torch.tensor([17, 42, 99])


def prompted(name, task, **options):
    """A model whose prompt is the embeddings of real words: it must answer as the base does with those words there."""
    model = adapted("prompt", name, task, virtual_tokens=3, **options)
    words = base(name).model.get_input_embeddings().weight[WORDS]
    tensors = {**model.read().tensors, "prompt.embedding": words}
    model.write(AdapterState(model.spec, tensors))
    return model


def with_words(name):
    given = inputs(name)
    return {
        "input_ids": torch.cat([WORDS.expand(2, -1), given["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones(2, 3, dtype=torch.long), given["attention_mask"]], 1),
    }


class TestPrompt:
    @pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
    def test_features_are_those_of_the_text_behind_the_words(self, name):
        model = prompted(name, CLASSIFY)
        backbone = null_model(base(name), CLASSIFY, seed=1).backbone
        with torch.no_grad():
            whole = backbone(**with_words(name)).last_hidden_state[:, 3:]
            found = model.model.backbone(**inputs(name))
        real = inputs(name)["attention_mask"].bool()
        torch.testing.assert_close(found[real], whole[real], atol=0, rtol=0)

    @pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
    def test_a_classifier_takes_the_mean_of_the_text_alone(self, name):
        model = prompted(name, CLASSIFY)
        null = null_model(base(name), CLASSIFY, seed=1)
        mask = inputs(name)["attention_mask"]
        with torch.no_grad():
            hidden = null.backbone(**with_words(name)).last_hidden_state[:, 3:]
            mean = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
            expected = null.classifier(nn.functional.normalize(mean, dim=-1) * 8)
        torch.testing.assert_close(answers(model.model, name), expected)

    @pytest.mark.parametrize("name", ["gpt2", "llama"])
    def test_logits_are_those_of_the_text_behind_the_words(self, name):
        with torch.no_grad():
            whole = base(name).model(**with_words(name)).logits[:, 3:]
        real = inputs(name)["attention_mask"].bool()
        assert torch.equal(answers(prompted(name, LANGUAGE).model, name)[real], whole[real])

    @pytest.mark.parametrize("name", ["gpt2", "llama"])
    def test_targets_are_those_of_the_text_alone(self, name):
        task = make_task(LANGUAGE, base(name).tokenizer)
        batch = task.collate(task.encode([{"text": "one short text"}, {"text": "two"}]))
        behind = {
            "input_ids": torch.cat([WORDS.expand(2, -1), batch["input_ids"]], 1),
            "attention_mask": torch.cat([torch.ones(2, 3, dtype=torch.long), batch["attention_mask"]], 1),
            "labels": torch.cat([torch.full((2, 4), -100), batch["labels"][:, 1:]], 1),  # no first token either
        }
        with torch.no_grad():
            expected = task.per_sample_loss(base(name).model, behind)
            found = task.per_sample_loss(prompted(name, LANGUAGE).model, batch)
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("name", ["bert", "llama"])
    def test_padding_changes_nothing(self, name):
        task = CLASSIFY if name == "bert" else LANGUAGE
        model, given = prompted(name, task), inputs(name)
        alone = {key: value[1:, :3] for key, value in given.items()}
        with torch.no_grad():
            single = model.model(**alone)
        single, both = getattr(single, "logits", single), answers(model.model, name)[1:]
        torch.testing.assert_close(single, both if task is CLASSIFY else both[:, :3], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("name", ["gpt2", "llama"])
    def test_continuations_are_those_of_the_words_and_the_text(self, name):
        prompt = torch.tensor([[5, 80, 33, 120]])
        options = {
            "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True,
            "output_logits": True,
        }  # fmt: skip

        def continued(model, ids):
            made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            assert torch.equal(made.sequences[:, : ids.shape[1]], ids)
            return made.sequences[0, ids.shape[1] :].tolist(), torch.stack(made.logits)

        tokens, logits = continued(prompted(name, LANGUAGE).model, prompt)
        expected, known = continued(base(name).model, torch.cat([WORDS.expand(1, -1), prompt], 1))
        assert tokens == expected
        torch.testing.assert_close(logits, known, atol=1e-5, rtol=1e-5)

    def test_a_task_asks_it_for_a_continuation(self):
        rows = [{"text": "hello"}]
        task = make_task(LANGUAGE, base("llama").tokenizer)
        (prediction,) = task.predict(prompted("llama", LANGUAGE).model, rows)
        assert 0 < prediction.probability <= 1

    def test_it_starts_as_words_of_the_vocabulary_drawn_from_the_seed(self):
        first, again, other = (adapted("prompt", seed=seed).read().tensors["prompt.embedding"] for seed in (1, 1, 2))
        words = base().model.get_input_embeddings().weight
        assert all((row == words).all(1).any() for row in first)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_it_has_a_gradient_and_the_base_has_none(self):
        model = adapted("prompt", "llama", LANGUAGE)
        model.model(**inputs("llama")).logits.sum().backward()
        assert model.trainable()["prompt.embedding"].grad.any()
        assert all(tensor.grad is None for tensor in base("llama").model.parameters())

    def test_a_bfloat16_base(self):
        low = load_base(ModelConfig(source="tiny:llama", dtype="bfloat16"))
        model = attach(low, AdapterConfig(kind="prompt"), LANGUAGE, seed=0)
        assert model.trainable()["prompt.embedding"].dtype == torch.float32
        assert answers(model.model, "llama").dtype == torch.bfloat16

    def test_a_stock_head_is_refused(self):
        with pytest.raises(ModelError, match=r"set task\.head=mean_pool"):
            adapted("prompt", "bert", STOCK)

    def test_a_sensor_model_is_refused(self):
        with pytest.raises(ModelError, match="tiny:sensor takes no embeddings"):
            adapted("prompt", "sensor", SENSOR)

    def test_no_room_for_prompt_and_text_is_said_before_anything_starts(self):
        task = TaskConfig(labels=LABELS, max_length=500)
        with pytest.raises(
            ModelError, match=r"pass the 512 positions of tiny:bert; set task\.max_length to at most 496"
        ):
            adapted("prompt", "bert", task)

    def test_a_text_that_is_too_long_is_no_index_error(self):
        model = adapted("prompt", "bert", virtual_tokens=100)
        ids = torch.full((1, 413), 7)
        with pytest.raises(ModelError, match=r"100 virtual tokens and a text of 413 pass the model's 512 positions"):
            model.model(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_first_weights_come_from_the_seed_alone(kind):
    torch.manual_seed(0)
    first = adapted(kind, seed=4).read().tensors
    torch.manual_seed(1)
    second = adapted(kind, seed=4).read().tensors
    assert all(torch.equal(first[name], second[name]) for name in first)
