"""Prefixes: a fresh one is the base after its words, any one is what the attention's equation says, in float64."""

import copy

import pytest
import torch
from torch import nn

from federated.adapters import attach, base_from_module, load_base, null_model, shell
from federated.adapters.fingerprint import base_digest
from federated.adapters.heads import generator_for
from federated.config import AdapterConfig, ModelConfig, TaskConfig
from federated.errors import ModelError
from federated.state import AdapterState
from federated.tasks import make_task

LABELS = ("no", "yes", "perhaps")
CLASSIFY = TaskConfig(labels=LABELS)
STOCK = TaskConfig(labels=LABELS, head="stock")
LANGUAGE = TaskConfig(name="causal_lm")
TOKENS, SEED = 3, 1
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
REAL = MASK.bool()
causal = pytest.mark.parametrize("name", ["gpt2", "llama"])


def base(name="llama", **options):
    return load_base(ModelConfig(source=f"tiny:{name}", **options))


def prefixed(name="llama", task=LANGUAGE, *, seed=SEED, virtual_tokens=TOKENS, **options):
    adapter = AdapterConfig(kind="prefix", virtual_tokens=virtual_tokens, **options)
    return attach(base(name), adapter, task, seed=seed)


def words(seed=SEED, vocabulary=260):
    return torch.randint(vocabulary, (1, TOKENS), generator=generator_for(seed, "prefix"))


def text():
    ids = torch.randint(4, 200, MASK.shape, generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids * MASK, "attention_mask": MASK}


def behind_words():
    seen = torch.ones(len(MASK), TOKENS, dtype=torch.long)
    ids = torch.cat([words().expand(len(MASK), -1), text()["input_ids"]], 1)
    return {"input_ids": ids, "attention_mask": torch.cat([seen, MASK], 1)}


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def drawn(model, *, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return AdapterState(
        model.spec, {name: torch.randn(t.shape, generator=generator) for name, t in model.masters().items()}
    )


@torch.no_grad()
def logits(model, inputs):
    output = model(**inputs)
    return getattr(output, "logits", output)


class TestFresh:
    """First values are what the base keeps of words, so there is a model to compare with: the base behind them."""

    @causal
    def test_logits_are_those_of_the_base_behind_the_words(self, name):
        found = logits(prefixed(name).model, text())
        close(found[REAL], logits(base(name).model, behind_words())[:, TOKENS:][REAL])
        assert (found - logits(base(name).model, text()))[REAL].abs().max() > 1e-4

    @causal
    @pytest.mark.parametrize("task", [CLASSIFY, STOCK], ids=["mean_pool", "stock"])
    def test_a_classifier_reads_the_text_behind_the_words(self, name, task):
        model, null = prefixed(name, task).model, null_model(base(name), task, seed=SEED)
        if task is STOCK:
            expected = logits(null, behind_words())  # of the last real token, wherever it stands
        else:
            with torch.no_grad():
                hidden = null.backbone(**behind_words()).last_hidden_state[:, TOKENS:]
                mean = (hidden * MASK.unsqueeze(-1)).sum(1) / MASK.sum(1, keepdim=True)
                expected = null.classifier(nn.functional.normalize(mean, dim=-1) * 8)
        close(logits(model, text()), expected)

    def test_an_encoder_s_words_do_not_see_the_text(self):
        backbone, inputs = base("bert").model, behind_words()
        sees = inputs["attention_mask"].bool()[:, None, None, :].repeat(1, 1, TOKENS + MASK.shape[1], 1)
        sees[:, :, :TOKENS, TOKENS:] = False
        with torch.no_grad():
            whole = backbone(input_ids=inputs["input_ids"], attention_mask=sees).last_hidden_state[:, TOKENS:]
            found = prefixed("bert", CLASSIFY).model.backbone(**text()).last_hidden_state
        close(found[REAL], whole[REAL])

    def test_an_encoder_s_stock_head_reads_the_text_s_first_place(self):
        model = prefixed("bert", STOCK)
        null = null_model(base("bert"), STOCK, seed=SEED)
        assert not torch.equal(logits(model.model, text()), logits(null, text()))
        with torch.no_grad():
            features = model.model.stock.bert(**text()).last_hidden_state
            expected = null.stock.classifier(torch.tanh(null.stock.bert.pooler.dense(features[:, 0])))
        close(logits(model.model, text()), expected)

    def test_a_window_that_slides_slides_past_the_prefix_too(self):
        from transformers import MistralConfig, MistralForCausalLM

        config = MistralConfig(
            vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=64, max_position_embeddings=128, sliding_window=4, pad_token_id=0,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sliding = base_from_module(MistralForCausalLM(config))
        adapter = AdapterConfig(kind="prefix", virtual_tokens=TOKENS)
        model = attach(sliding, adapter, LANGUAGE, seed=SEED)
        expected = logits(sliding.model, behind_words())[:, TOKENS:]
        close(logits(model.model, text())[REAL], expected[REAL])

    @causal
    def test_continuations_are_those_of_the_words_and_the_text(self, name):
        ids = torch.tensor([[5, 80, 33, 120]])
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "output_logits": True}

        def continued(model, ids):
            made = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **options
            )
            assert torch.equal(made.sequences[:, : ids.shape[1]], ids)
            return made.sequences[0, ids.shape[1] :].tolist(), torch.stack(made.logits)

        model = prefixed(name).model
        tokens, found = continued(model, ids)
        expected, known = continued(base(name).model, torch.cat([words(), ids], 1))
        assert tokens == expected
        assert continued(model, ids)[0] == tokens  # nothing is left in the prefix from the first time
        close(found, known)

    def test_continuations_of_a_batch_with_padding_in_front(self):
        model = prefixed().model
        ids, mask = torch.tensor([[0, 0, 7, 8], [5, 80, 33, 120]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        both = model.generate(input_ids=ids, attention_mask=mask, **options).sequences
        alone = model.generate(input_ids=ids[:1, 2:], attention_mask=mask[:1, 2:], **options).sequences
        assert both[0, 4:].tolist() == alone[0, 2:].tolist()

    def test_a_task_asks_it_for_a_continuation(self):
        (prediction,) = make_task(LANGUAGE, base().tokenizer).predict(prefixed().model, [{"text": "hello"}])
        assert 0 < prediction.probability <= 1

    def test_words_come_from_the_seed_alone(self):
        before = torch.random.get_rng_state()
        first, again, other = (prefixed(seed=seed).read().tensors["prefix.0.key"] for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert torch.equal(before, torch.random.get_rng_state())

    def test_names_and_shapes(self):
        shapes = {name: tuple(tensor.shape) for name, tensor in prefixed().read().tensors.items()}
        each = (1, TOKENS, 16)  # two heads ask, and one holds keys and values
        assert shapes == {f"prefix.{layer}.{part}": each for layer in (0, 1) for part in ("key", "value")}
        assert prefixed("gpt2").read().tensors["prefix.1.value"].shape == (2, TOKENS, 16)


def turned(x, positions, size):
    """RoPE of [batch, heads, time, size], in float64: the first half of a head with the second."""
    angles = positions[:, None] * 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    return x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin


def projections(name, layer, x):
    """Queries, keys and values of a layer's input, float64 [batch, heads, time, 16]; keys and queries turned."""
    if name == "gpt2":
        parts = (x @ layer.c_attn.weight.double() + layer.c_attn.bias.double()).split(32, -1)
    else:
        parts = [x @ one.weight.double().T for one in (layer.q_proj, layer.k_proj, layer.v_proj)]
    query, key, value = (part.unflatten(-1, (-1, 16)).transpose(1, 2) for part in parts)
    if name == "llama":
        places = torch.arange(TOKENS, TOKENS + x.shape[1], dtype=torch.float64)
        query, key = turned(query, places, 16), turned(key, places, 16)
    return query, key, value


@causal
@pytest.mark.parametrize("number", [0, 1])
def test_attention_is_its_equation_in_float64(name, number):
    """softmax(q [P_k, K]^T / 4) [P_v, V], every token seeing all of the prefix, trained keys as they are."""
    model = prefixed(name)
    state = drawn(model)
    model.write(state)
    path = f"transformer.h.{number}.attn" if name == "gpt2" else f"model.layers.{number}.self_attn"
    layer, seen = model.model.model.get_submodule(path), {}
    hook = layer.register_forward_hook(
        lambda _, given, options, out: seen.update(x=(given or [options["hidden_states"]])[0], y=out[0]),
        with_kwargs=True,
    )
    logits(model.model, text())
    hook.remove()
    query, key, value = projections(name, layer, seen["x"].double())
    front = [state.tensors[f"prefix.{number}.{part}"].double().expand(2, -1, -1, -1) for part in ("key", "value")]
    key, value = (torch.cat([one, other], 2) for one, other in zip(front, (key, value), strict=True))
    groups = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(groups, 1) for one in (key, value))
    hidden = torch.ones(5, TOKENS + 5, dtype=torch.bool).triu(TOKENS + 1)
    weights = (query @ key.transpose(2, 3) / 4).masked_fill(hidden, -torch.inf).softmax(-1)
    mixed = (weights @ value).transpose(1, 2).flatten(2)
    if name == "gpt2":
        expected = mixed @ layer.c_proj.weight.double() + layer.c_proj.bias.double()
    else:
        expected = mixed @ layer.o_proj.weight.double().T
    torch.testing.assert_close(seen["y"].double()[REAL], expected[REAL], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("name", "task"), [("bert", CLASSIFY), ("llama", LANGUAGE), ("gpt2", LANGUAGE)])
def test_padding_changes_nothing(name, task):
    model = prefixed(name, task)
    model.write(drawn(model))
    alone = {key: value[1:, :3] for key, value in text().items()}
    both = logits(model.model, text())[1:]
    close(logits(model.model, alone), both if task is CLASSIFY else both[:, :3])


@causal
def test_the_null_adapter_is_the_base_alone(name):
    before = logits(base(name).model, text())
    model = prefixed(name)
    model.write(drawn(model))
    assert not torch.equal(logits(model.model, text()), before)
    assert null_model(base(name), LANGUAGE, seed=SEED) is base(name).model
    assert torch.equal(logits(base(name).model, text()), before)
    assert base_digest(base(name).model, base(name).tokenizer) == base(name).base_digest


@pytest.mark.parametrize(("name", "task"), [("gpt2", LANGUAGE), ("llama", LANGUAGE), ("bert", CLASSIFY)])
@pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
def test_two_steps_lower_the_loss(name, task, low):
    model, made = prefixed(name, task), make_task(task, base(name).tokenizer)
    batch = made.collate(made.encode([{"text": "over and over again", "label": 1}] * 2))
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=0.05, weight_decay=0.0)
    losses = []
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = made.per_sample_loss(model.model, batch).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]
    assert all(tensor.grad.any() for tensor in model.trainable().values())
    assert all(tensor.grad is None for tensor in base(name).model.parameters())


class TestBits:
    def test_a_bfloat16_base_has_its_words_in_float32_and_sees_them_in_bfloat16(self):
        low = base(dtype="bfloat16")
        model = attach(low, AdapterConfig(kind="prefix", virtual_tokens=TOKENS), LANGUAGE, seed=SEED)
        assert {tensor.dtype for tensor in model.trainable().values()} == {torch.float32}
        found, expected = logits(model.model, text()), logits(low.model, behind_words())[:, TOKENS:]
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found[REAL], expected[REAL], atol=2e-2, rtol=2e-2)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_fewer_bits_go_in_and_out_exactly(self, dtype):
        model = prefixed(dtype=dtype)
        state = model.read()
        assert {tensor.dtype for tensor in state.tensors.values()} == {getattr(torch, dtype)}
        slot = shell(base(), state.spec, seed=99)
        slot.write(state)
        assert all(torch.equal(slot.read().tensors[name], tensor) for name, tensor in state.tensors.items())


class TestRefused:
    def test_no_room_for_prefix_and_text_is_said_before_anything_starts(self):
        with pytest.raises(ModelError, match=r"pass the 512 positions of tiny:llama; set task\.max_length to at most"):
            prefixed(task=TaskConfig(name="causal_lm", max_length=510))

    def test_a_text_that_is_too_long_is_named(self):
        model, ids = prefixed(virtual_tokens=100), torch.full((1, 413), 7)
        with pytest.raises(ModelError, match=r"100 virtual tokens and a text of 413 pass the model's 512 positions"):
            model.model(input_ids=ids, attention_mask=torch.ones_like(ids))

    def test_an_encoder_without_a_cache(self):
        from transformers import DistilBertConfig, DistilBertModel

        config = DistilBertConfig(vocab_size=260, dim=32, n_layers=2, n_heads=2, hidden_dim=64)
        expected = r"module \(DistilBertModel\) takes no past_key_values; use adapter=prompt"
        with pytest.raises(ModelError, match=expected):
            attach(base_from_module(DistilBertModel(config)), AdapterConfig(kind="prefix"), CLASSIFY, seed=0)

    @pytest.mark.parametrize("layer", [0, 1])
    def test_a_layer_that_keeps_nothing(self, layer):
        odd = copy.deepcopy(base("bert").model)
        attention = odd.encoder.layer[layer].attention.self
        plain = attention.forward
        attention.forward = lambda *given, past_key_values=None, **options: plain(*given, **options)
        with pytest.raises(ModelError, match=r"keeps them in 1 of 2 layers; use adapter=prompt"):
            attach(base_from_module(odd), AdapterConfig(kind="prefix"), CLASSIFY, seed=0)

    def test_a_model_with_another_kind_of_memory(self):
        class Odd(type(base("bert").model)):
            def forward(self, input_ids, attention_mask, past_key_values):
                past_key_values.update_states(input_ids)

        odd = Odd(base("bert").model.config)
        with pytest.raises(ModelError, match=r"\(Odd\) cannot fill a DynamicCache \(AttributeError\)"):
            attach(base_from_module(odd), AdapterConfig(kind="prefix"), CLASSIFY, seed=0)
