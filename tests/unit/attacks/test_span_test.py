"""Reading a LoRA delta: the span's algebra against a float64 truth, real local training, and what defences change."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree as ET

import pytest
import torch
from torch import nn

from federated.adapters import attach, load_base
from federated.cli.compose import compose
from federated.config import AdapterConfig, ModelConfig, PrivacyConfig, TaskConfig
from federated.delta import norm
from federated.errors import ModelError
from federated.privacy.accounting import noise_for
from federated.state import AdapterState
from simulations.attacks.local_round import client_release, client_round, encoded, noised, opened
from simulations.attacks.picture import picture
from simulations.attacks.settings import ALL, MESSAGES, QUICK, UNDEFENDED
from simulations.attacks.span_test import (
    Suspect,
    assembled,
    layer_input,
    outside,
    read,
    readers,
    span_tests,
    words_at,
)

torch.set_num_threads(1)

APP = Path(__file__).resolve().parents[3]
QUERY, VALUE = (f"encoder.layer.0.attention.self.{name}" for name in ("query", "value"))
RANK, WIDTH = 6, 32


@pytest.fixture(scope="module")
def base():
    return load_base(ModelConfig(source="tiny:bert"))


def config_of(*overrides, rank=16):
    own = ["model=tiny_bert", "task=classification", "train=sgd", "rounds=1", f"adapter.rank={rank}"]
    return compose(APP, [*own, "train.precision=float32", "train.batch_size=1", "train.steps=1", *overrides])


def words_of(examples):
    return {one for example in examples for one in enumerate(example["input_ids"])}


def everything(base):
    """Position and word to the input that the first layer gets."""
    return {position: words_at(base, QUERY, position) for position in range(24)}


def passing(base, tests, bound=1e-6):
    """Every word at every position that lies in the span."""
    found = set()
    for position, words in everything(base).items():
        inside = (outside(tests, words) < bound).nonzero().flatten().tolist()
        found |= {(position, word) for word in inside}
    return found


class TestAlgebra:
    """Equations of the module's docstring, on made-up gradients in float64."""

    def made(self, count, *, factor_b=None):
        generator = torch.Generator().manual_seed(count)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        inputs, strangers = normal(count, WIDTH), normal(200, WIDTH)
        tensors, delta = {}, {}
        for layer in ("query", "value"):
            factor_a, gradients = normal(RANK, WIDTH), normal(count, WIDTH)
            tensors[f"{layer}.factor_a"] = factor_a
            delta[f"{layer}.factor_b"] = sum(
                torch.outer(g, factor_a @ x) for g, x in zip(gradients, inputs, strict=True)
            )
            moved = torch.zeros(RANK, WIDTH, dtype=torch.float64)
            if factor_b:
                out = normal(WIDTH, RANK)
                moved = sum(torch.outer(out.T @ g, x) for g, x in zip(gradients, inputs, strict=True))
            delta[f"{layer}.factor_a"] = moved
        spec = attach(
            load_base(ModelConfig(source="tiny:bert")), AdapterConfig(), TaskConfig(labels=("a", "b")), seed=0
        ).spec
        tests = span_tests(AdapterState(spec, tensors), delta, ("query", "value"), inputs=count)
        return tests, inputs.float(), strangers.float()

    @pytest.mark.parametrize("count", [1, 2, 4, RANK - 1])
    def test_below_the_rank_the_rows_of_b_hold_the_true_inputs_and_no_others(self, count):
        tests, inputs, strangers = self.made(count)
        assert [test.image is not None for test in tests] == [True, True]
        assert outside(tests, inputs).max() < 1e-6
        assert outside(tests, strangers).min() > 1e-3

    @pytest.mark.parametrize("count", [RANK, RANK + 1, 2 * RANK])
    def test_from_the_rank_on_b_tells_nothing(self, count):
        assert self.made(count)[0] == []

    @pytest.mark.parametrize("count", [RANK, 2 * RANK])
    def test_rows_of_a_hold_as_many_inputs_as_both_layers_have_rows(self, count):
        tests, inputs, strangers = self.made(count, factor_b=True)
        assert len(tests) == 1
        assert outside(tests, inputs).max() < 1e-6
        assert outside(tests, strangers).min() > 0.1

    def test_beyond_that_no_input_lies_in_what_is_known_of_the_span_but_all_are_nearer(self):
        tests, inputs, strangers = self.made(2 * RANK + 4, factor_b=True)
        assert outside(tests, inputs).min() > 1e-3
        assert outside(tests, inputs).mean() < outside(tests, strangers).mean() - 0.2


class TestRealTraining:
    """Deltas of the library's own trainer, on a tiny model."""

    def sent(self, base, text, *overrides, rank=16):
        config = config_of(*overrides, rank=rank)
        examples = encoded(config, base, [text])
        return client_round(config, base, examples), examples

    def evidence(self, sent, examples):
        return span_tests(sent.received, opened(sent), (QUERY, VALUE), inputs=len(words_of(examples)))

    def test_rows_span_the_inputs_of_the_float64_truth(self, base):
        sent, examples = self.sent(base, "hush now")
        ids = examples[0]["input_ids"]
        true = torch.stack([words_at(base, QUERY, place)[word] for place, word in enumerate(ids)]).double()
        for layer in (QUERY, VALUE):
            moved = opened(sent)[f"{layer}.factor_b"].double()
            span = torch.linalg.qr((true @ sent.received.tensors[f"{layer}.factor_a"].double().T).T).Q
            assert (moved - moved @ span @ span.T).norm() < 1e-5 * moved.norm()
            assert torch.linalg.matrix_rank(moved, rtol=1e-6) == len(ids)
            assert not opened(sent)[f"{layer}.factor_a"].any()

    @pytest.mark.parametrize("overrides", [(), ("strategy=ffa", "train.steps=3")])
    def test_below_the_rank_exactly_the_true_words_pass(self, base, overrides):
        sent, examples = self.sent(base, "hush now", *overrides)
        assert passing(base, self.evidence(sent, examples)) == words_of(examples)

    @pytest.mark.parametrize("text", ["sixteen letters.", "more than sixteen letter"])
    def test_from_the_rank_on_nothing_is_read(self, base, text):
        sent, examples = self.sent(base, text)
        tests = self.evidence(sent, examples)
        assert tests == []
        assert read(base, QUERY, [Suspect(tests, dict.fromkeys(range(len(text)), 1))]) == [{}]

    def test_where_b_is_not_zero_a_gives_away_what_b_cannot(self, base):
        config, text = config_of(rank=12), "sixteen letters."
        examples = encoded(config, base, [text])
        sent = client_round(
            config, base, examples, received=_with_random_b(attach(base, config.adapter, config.task, seed=0))
        )
        tests = self.evidence(sent, examples)
        assert tests[0].image is None
        (reading,) = read(base, QUERY, [Suspect(tests, dict.fromkeys(range(len(text)), 1))])
        assert {(place, words[0]) for place, words in reading.items()} == words_of(examples)

    def test_the_second_step_moves_a(self, base):
        sent, examples = self.sent(base, "sixteen letters.", "train.steps=2")
        assert [test.image for test in self.evidence(sent, examples)] == [None]

    def test_repeats_but_for_the_noise_of_privacy(self, base):
        packets = [self.sent(base, "hush now", "train.steps=3")[0].packet for _ in range(2)]
        assert packets[0] == packets[1]
        config = config_of("privacy=example_dp", "train.batch_size=2")
        examples = encoded(config, base, ["hush now", "not here"])
        private = [client_round(config, base, examples) for _ in range(2)]
        assert private[0].packet != private[1].packet
        assert 7.9 < private[0].epsilon <= 8.0

    def test_under_privacy_the_words_are_lost(self, base):
        config = config_of("train.batch_size=2", rank=24)
        texts = ["hush now", "not here"]
        examples = encoded(config, base, texts)
        wanted = words_of(examples)
        places = dict.fromkeys(range(8), 2)

        def share(sent):
            tests = span_tests(sent.received, opened(sent), (QUERY, VALUE), inputs=len(wanted))
            (reading,) = read(base, QUERY, [Suspect(tests, places)])
            return len({(place, word) for place, words in reading.items() for word in words} & wanted) / len(wanted)

        assert share(client_round(config, base, examples)) > 0.7
        silent = config_of("privacy=example_dp", "privacy.target_epsilon=0", "privacy.example.noise_multiplier=1e-12")
        assert share(client_round(replace(config, privacy=silent.privacy), base, examples)) > 0.7
        defended = replace(config, privacy=config_of("privacy=example_dp").privacy)
        assert sum(share(client_round(defended, base, examples)) for _ in range(3)) / 3 < 0.2

    def test_the_noise_is_what_epsilon_was_charged_for(self, base):
        config = config_of("privacy=example_dp", "train.batch_size=2", "train.max_grad_norm=0")
        sent = client_round(config, base, encoded(config, base, ["hush now", "not here"]))
        noise = torch.cat([one.flatten() for name, one in opened(sent).items() if name.endswith("factor_a")]).double()
        multiplier = noise_for(8.0, config.privacy.target_delta, sampling=1.0, steps=1)
        wanted = config.train.learning_rate * multiplier * config.privacy.example.clip_norm / 2
        assert float(noise.std()) == pytest.approx(wanted, rel=0.1)

    def test_messages_are_put_together_from_words(self, base):
        wrapped = replace(base, tokenizer=SimpleNamespace(cls_token_id=1, sep_token_id=2))
        ids = [[1, 40, 50, 60, 2], [1, 41, 51, 61, 2]]
        config = config_of("train.batch_size=2", rank=12)
        sent = client_round(config, base, [{"input_ids": one, "label": number} for number, one in enumerate(ids)])
        groups = readers(base, sent.received.spec)
        assert groups == [(QUERY, VALUE), tuple(name.replace("layer.0", "layer.1") for name in (QUERY, VALUE))]
        tests = span_tests(sent.received, opened(sent), groups[1], inputs=10)
        reading = {1: [41, 40], 2: [50, 51], 3: [61, 60]}
        made = assembled(wrapped, groups[1][0], tests, reading, [5, 5])
        assert sorted(made) == ids
        assert assembled(wrapped, groups[1][0], [], reading, [5, 5]) == []
        with pytest.raises(ModelError, match="5832 combinations of words; at most 4096"):
            assembled(wrapped, groups[1][0], tests, {place: list(range(18)) for place in (1, 2, 3)}, [5])

    def test_a_layer_that_never_runs_is_named(self):
        with pytest.raises(ModelError, match="the model does not run its layer idle"):
            layer_input(_Half(), "idle", values=torch.ones(1, 2, 3))


def _with_random_b(adapter):
    """A later round's adapter."""
    generator, state = torch.Generator().manual_seed(3), adapter.read()
    moved = {
        name: 2 * torch.randn(tensor.shape, generator=generator) if name.endswith("factor_b") else tensor
        for name, tensor in state.tensors.items()
    }
    return replace(state, tensors=moved)


class _Half(nn.Module):
    """Runs one of its layers."""

    def __init__(self):
        super().__init__()
        self.busy, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, values):
        return self.busy(values)


class TestReleases:
    def delta(self):
        generator = torch.Generator().manual_seed(0)
        return {name: torch.randn(100, 100, generator=generator) * 0.01 for name in ("a", "b")}

    def test_noise_has_the_length_that_was_asked_for(self):
        delta = self.delta()
        added = {name: one - delta[name] for name, one in noised(delta, 0.3, seed=1).items()}
        assert norm(added) == pytest.approx(0.3 * norm(delta), rel=0.03)

    def test_client_level_privacy_adds_its_noise_to_the_whole_update(self):
        delta = self.delta()
        release = client_release(delta, PrivacyConfig(target_epsilon=8.0))
        values = torch.cat([(release[name] - delta[name]).flatten() for name in delta]).double()
        multiplier = float(values.std()) / norm(delta)
        assert math.isclose(float(values.mean()) / float(values.std()), 0, abs_tol=0.05)
        assert 0.5 < multiplier < 0.9


class TestStory:
    def test_settings_compose_and_say_what_they_say(self):
        for setting in dict.fromkeys([*ALL, *QUICK]):
            config = compose(APP, setting.config)
            assert (config.adapter.rank, config.train.steps) == (setting.rank, setting.steps)
            assert config.train.batch_size == setting.messages
            assert setting.private == config.privacy.enabled
            assert (config.train.optimizer == "adamw") == ("AdamW" in setting.label)
            assert (config.train.precision == "bfloat16") == ("bfloat16" in setting.label)
            assert (config.strategy.rule == "ffa") == ("FFA-LoRA" in setting.label)

    def test_the_picture_marks_right_words_and_escapes_them(self):
        svg = picture(["a & b", "c"], {"read": ["a & x", "y"], "lost": []}, {UNDEFENDED: (0.5, 0.25)})
        tree = ET.fromstring(svg)  # noqa: S314 - our own
        spans = [
            (one.text, one.get("fill")) for one in tree.iter("{http://www.w3.org/2000/svg}tspan") if one.get("fill")
        ]
        red = [text.strip() for text, fill in spans if fill == "#c53030"]
        assert red == ["a", "&"]
        assert "undefended: 50%" in svg
        assert "<script" not in svg

    def test_the_made_up_messages_are_short_enough_to_put_together(self):
        assert 2 ** max(len(text.split()) for text in MESSAGES) <= 4096
