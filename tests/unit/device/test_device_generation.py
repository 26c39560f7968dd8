"""Answers token by token: transformers' own, from one slot to the end, and pins that come back."""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from federated.adapters import load_base
from federated.config import AdapterConfig, TaskConfig
from federated.device import NULL, AdapterRuntime, Route, Sampling, open_runtime
from federated.device.prompts import encode_prompt
from federated.errors import DeviceError

Make = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = "the flight was late"
CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "?"}]


@pytest.fixture(params=["tiny:llama", "tiny:gpt2"])
def lm(request: pytest.FixtureRequest, recipe: Make) -> Any:
    model = replace(recipe("tiny:llama").model, source=request.param)
    return recipe("tiny:llama", model=model, task=TaskConfig(name="causal_lm", max_length=64))


@pytest.fixture
def llama(recipe: Make) -> Any:
    return recipe("tiny:llama", task=TaskConfig(name="causal_lm", max_length=64))


def opened(recipe: Any, real_version: Make, *values: int) -> tuple[AdapterRuntime, list[Any]]:
    versions = [real_version(recipe, value) for value in values]
    runtime = open_runtime(versions[0].manifest)
    for one in versions:
        one.install(runtime)
    return runtime, versions


def theirs(runtime: AdapterRuntime, recipe: Any, digest: str, *, tokens: int = 24) -> tuple[list[int], str]:
    """What transformers' greedy ``generate`` makes of the same module tree."""
    tokenizer = load_base(recipe.model).tokenizer
    ids = torch.tensor([encode_prompt(tokenizer, TEXT)])
    with runtime.pin(digest) as slot, torch.no_grad():
        made = slot.handle.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            return_dict_in_generate=True,
        )
    answer = made.sequences[0, ids.shape[1] :].tolist()
    return answer, tokenizer.decode(answer, skip_special_tokens=True)


@pytest.mark.parametrize(
    "adapter",
    [
        AdapterConfig(rank=2, target_modules="all-linear"),
        AdapterConfig(kind="lora_xs", rank=2),
        AdapterConfig(kind="ia3"),
        AdapterConfig(kind="prompt", virtual_tokens=3),
        AdapterConfig(kind="prefix", virtual_tokens=3),
    ],
    ids=lambda adapter: adapter.kind,
)
def test_greedy_answers_are_those_of_transformers(lm: Any, adapter: AdapterConfig, real_version: Make) -> None:
    made = replace(lm, adapter=adapter)
    runtime, (version,) = opened(made, real_version, 1)
    answers = []
    for digest in (NULL, version.digest):
        tokens = list(runtime.generate(TEXT, Sampling(24), digest=digest))
        expected, text = theirs(runtime, made, digest)
        assert [token.token_id for token in tokens] == expected
        assert "".join(token.text for token in tokens) == text
        answers.append([token.logprob for token in tokens])
    assert answers[0] != answers[1]  # random models may say the same, but not as surely


def test_an_answer_ends_with_the_end_token_where_transformers_ends(llama: Any, real_version: Make) -> None:
    runtime, _ = opened(llama, real_version, 1)
    usual, _ = theirs(runtime, llama, NULL)
    model = load_base(llama.model).model
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [usual[-1], 3]
    try:
        generation = runtime.generate(TEXT, Sampling(24))
        tokens = [token.token_id for token in generation]
        assert tokens == usual[: usual.index(usual[-1]) + 1] == theirs(runtime, llama, NULL)[0]
    finally:
        model.generation_config.eos_token_id = before
    assert (generation.finish_reason, generation.completion_tokens) == ("stop", len(tokens))


def test_answers_interleaved_with_other_slots_and_activations_are_the_same(lm: Any, real_version: Make) -> None:
    runtime, versions = opened(lm, real_version, 1, 2, 3)
    digests = [NULL, *(one.digest for one in versions)]
    alone = {digest: [t.token_id for t in runtime.generate(TEXT, Sampling(12), digest=digest)] for digest in digests}
    assert len({str(answer) for answer in alone.values()}) == 4
    running = {digest: runtime.generate(TEXT, Sampling(12), digest=digest) for digest in digests * 1}
    made: dict[str, list[int]] = {digest: [] for digest in digests}
    for step in range(12):
        runtime.activate(digests[step % 4])
        for digest, generation in running.items():
            made[digest].append(next(generation).token_id)
    assert made == alone
    assert runtime.pins == {}


def test_a_request_keeps_its_slot_until_its_last_token(llama: Any, real_version: Make) -> None:
    one, two, three = (real_version(llama, value) for value in (1, 2, 3))
    runtime = AdapterRuntime(open_runtime(one.manifest).backend, capacity=1)
    one.install(runtime)
    runtime.activate(one.digest)
    expected = [token.token_id for token in runtime.generate(TEXT, Sampling(8))]
    generation = runtime.generate(TEXT, Sampling(8))
    made = [next(generation).token_id]
    for version in (two, three):
        version.install(runtime)
        runtime.activate(version.digest)
    assert runtime.pins == {one.digest: 1}
    assert one.digest in {slot.digest for slot in runtime.slots}
    made += [token.token_id for token in generation]
    assert (made, runtime.pins) == (expected, {})
    assert one.digest not in {slot.digest for slot in runtime.slots}


def test_cancelling_frees_the_pin_and_the_tokenizer(llama: Any, real_version: Make) -> None:
    runtime, (version,) = opened(llama, real_version, 1)
    with runtime.generate(TEXT, digest=version.digest) as generation:
        next(generation)
        assert runtime.pins == {version.digest: 1}
    assert (generation.finish_reason, runtime.pins, list(generation)) == ("cancelled", {}, [])
    generation.close()
    gc.collect()
    assert runtime.backend._desks.qsize() >= 1


def test_an_answer_that_is_dropped_frees_its_pin(llama: Any, real_version: Make) -> None:
    runtime, (version,) = opened(llama, real_version, 1)
    generation = runtime.generate(TEXT, digest=version.digest)
    next(generation)
    del generation
    gc.collect()
    assert runtime.pins == {}


def test_an_error_in_the_middle_frees_the_pin(llama: Any, real_version: Make, monkeypatch: Any) -> None:
    runtime, (version,) = opened(llama, real_version, 1)
    generation = runtime.generate(TEXT, digest=version.digest)
    next(generation)
    with runtime.pin(version.digest) as slot:
        monkeypatch.setattr(slot.handle.model, "forward", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(generation)
    assert (runtime.pins, generation.finish_reason) == ({}, "cancelled")


def test_max_tokens_ends_an_answer_by_length(llama: Any, real_version: Make) -> None:
    runtime, (version,) = opened(llama, real_version, 1)
    tokens = list(runtime.generate(TEXT, Sampling(3), digest=version.digest))
    assert [token.finish_reason for token in tokens] == [None, None, "length"]


def test_a_stop_text_ends_an_answer_and_is_not_part_of_it(llama: Any, real_version: Make) -> None:
    runtime, (version,) = opened(llama, real_version, 1)
    whole = runtime.generate(TEXT, Sampling(24), digest=version.digest).text()
    stop = whole[4:6]
    generation = runtime.generate(TEXT, Sampling(24, stop=(stop,)), digest=version.digest)
    assert generation.text() == whole[: whole.index(stop)]
    assert generation.finish_reason == "stop"


def test_equal_seeds_give_equal_answers_and_others_do_not(llama: Any, real_version: Make) -> None:
    runtime, _ = opened(llama, real_version, 1)
    before = torch.random.get_rng_state()

    def answer(seed: int | None) -> list[int]:
        return [token.token_id for token in runtime.generate(TEXT, Sampling(12, temperature=1.0, seed=seed))]

    assert answer(1) == answer(1)
    assert len({str(answer(seed)) for seed in (1, 2, None, None)}) == 4
    assert torch.equal(torch.random.get_rng_state(), before)


def test_draws_follow_the_models_probabilities(llama: Any, real_version: Make) -> None:
    runtime, _ = opened(llama, real_version, 1)
    first = [next(runtime.generate(TEXT, Sampling(1, temperature=1.0, seed=seed))) for seed in range(2000)]
    for token_id, count in Counter(token.token_id for token in first).most_common(5):
        chance = next(math.exp(token.logprob) for token in first if token.token_id == token_id)
        assert abs(count - 2000 * chance) < 5 * math.sqrt(2000 * chance)


def test_top_p_draws_among_the_fewest_likeliest_tokens(llama: Any, real_version: Make) -> None:
    runtime, _ = opened(llama, real_version, 1)
    tokenizer = load_base(llama.model).tokenizer
    ids = torch.tensor([encode_prompt(tokenizer, TEXT)])
    chances = load_base(llama.model).model(ids).logits[0, -1].softmax(-1).sort(descending=True)
    most = int((chances.values.cumsum(-1) < 0.05).sum()) + 1
    drawn = {next(runtime.generate(TEXT, Sampling(1, 1.0, 0.05, seed=seed))).token_id for seed in range(400)}
    assert drawn == set(chances.indices[:most].tolist())


def test_a_small_top_p_is_greedy(llama: Any, real_version: Make) -> None:
    runtime, (version,) = opened(llama, real_version, 1)
    answers = [
        runtime.generate(TEXT, sampling, digest=version.digest).text()
        for sampling in (Sampling(12), Sampling(12, temperature=1.0, top_p=1e-6))
    ]
    assert answers[0] == answers[1]


def test_probabilities_are_those_of_the_model_whatever_the_temperature(llama: Any, real_version: Make) -> None:
    runtime, _ = opened(llama, real_version, 1)
    tokenizer = load_base(llama.model).tokenizer
    ids = torch.tensor([encode_prompt(tokenizer, TEXT)])
    expected = load_base(llama.model).model(ids).logits[0, -1].log_softmax(-1)
    token = next(runtime.generate(TEXT, Sampling(1, temperature=3.0, seed=4)))
    assert token.logprob == pytest.approx(float(expected[token.token_id]), abs=1e-5)


def test_a_chat_goes_through_the_template(llama: Any, real_version: Make) -> None:
    runtime, _ = opened(llama, real_version, 1)
    text = "<s>user\nHello</s><s>assistant\nHi</s><s>user\n?</s><s>assistant\n"
    generation = runtime.generate(CHAT, Sampling(8))
    assert generation.prompt_tokens == len(load_base(llama.model).tokenizer(text)["input_ids"])
    assert generation.text() == runtime.generate(text, Sampling(8)).text()


def test_a_chat_without_a_template_is_plain_lines(recipe: Make, real_version: Make) -> None:
    made = recipe("tiny:llama", model=replace(recipe("tiny:llama").model, source="tiny:gpt2"))
    runtime, _ = opened(made, real_version, 1)
    text = "user: Hello\nassistant: Hi\nuser: ?\nassistant:"
    assert runtime.generate(CHAT, Sampling(8)).text() == runtime.generate(text, Sampling(8)).text()


def test_a_template_that_refuses_says_so(llama: Any, real_version: Make) -> None:
    runtime, _ = opened(llama, real_version, 1)
    tokenizer = load_base(llama.model).tokenizer
    before = tokenizer.chat_template
    tokenizer.chat_template = "{{ raise_exception('only users') }}"
    try:
        with pytest.raises(DeviceError, match=r"chat template refuses these messages \(only users\)"):
            runtime.generate(CHAT)
    finally:
        tokenizer.chat_template = before
    assert runtime.pins == {}


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ("", Sampling(), "the prompt has no token"),
        ([], Sampling(), "messages are not a list"),
        ([{"role": "user"}], Sampling(), "messages are not a list"),
        ([{"role": "user", "content": 7}], Sampling(), "messages are not a list"),
        ("a" * 500, Sampling(100), "a prompt of 500 tokens and max_tokens = 100 pass the model's 512 positions"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused_at_once(
    llama: Any, real_version: Make, prompt: Any, sampling: Sampling, message: str
) -> None:
    runtime, _ = opened(llama, real_version, 1)
    with pytest.raises(DeviceError, match=message):
        runtime.generate(prompt, sampling)
    assert runtime.pins == {}


def test_virtual_tokens_take_positions(llama: Any, real_version: Make) -> None:
    made = replace(llama, adapter=AdapterConfig(kind="prompt", virtual_tokens=10))
    runtime, (version,) = opened(made, real_version, 1)
    runtime.generate("a" * 500, Sampling(12)).close()
    with pytest.raises(DeviceError, match="pass the model's 502 positions"):
        runtime.generate("a" * 500, Sampling(12), digest=version.digest)


def test_a_classifier_generates_no_text(recipe: Make, real_version: Make) -> None:
    runtime, _ = opened(recipe(), real_version, 1)
    with pytest.raises(DeviceError, match="answers sequence_classification; only causal_lm generates text"):
        runtime.generate(TEXT)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"stop": ("a", "")}, "a stop text is empty"),
    ],
)
def test_sampling_out_of_range_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        Sampling(**values)


def test_a_name_chooses_who_answers(llama: Any, real_version: Make) -> None:
    runtime, (version,) = opened(llama, real_version, 1)
    runtime.reroute(lambda routes: routes.named("mine", version.digest))
    named = runtime.generate(TEXT, Sampling(8), route=Route(name="mine"))
    assert named.slot.digest == version.digest
    assert named.text() == runtime.generate(TEXT, Sampling(8), digest=version.digest).text()


@pytest.fixture
def counted(llama: Any, real_version: Make) -> Iterator[tuple[AdapterRuntime, list[int]]]:
    runtime, (version,) = opened(llama, real_version, 1)
    runtime.activate(version.digest)
    lengths: list[int] = []
    model = runtime.active.handle.model.model
    hook = model.embed_tokens.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    yield runtime, lengths
    hook.remove()


def test_each_token_costs_one_pass_over_one_position(counted: tuple[AdapterRuntime, list[int]]) -> None:
    runtime, lengths = counted
    generation = runtime.generate(TEXT, Sampling(5))
    assert lengths == []  # nothing is computed before it is asked for
    list(generation)
    assert lengths == [generation.prompt_tokens, 1, 1, 1, 1]
