"""Language modelling: chunks, chats with loss on answers only, a mean per sample."""

import copy
import math

import pytest
import torch

from federated.adapters import load_base
from federated.config import ModelConfig, TaskConfig
from federated.errors import DataError, ModelError
from federated.tasks import make_task

PLAIN = TaskConfig(name="causal_lm", max_length=8)
CHAT = TaskConfig(name="causal_lm", chat=True, max_length=200)
QUESTION, ANSWER = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}
ROWS = [{"text": "some words " * (1 + index % 3) + str(index)} for index in range(6)]


@pytest.fixture(scope="module")
def base():
    return load_base(ModelConfig(source="tiny:llama"))


@pytest.fixture(scope="module")
def plain(base):
    return make_task(PLAIN, base.tokenizer)


@pytest.fixture(scope="module")
def chat(base):
    return make_task(CHAT, base.tokenizer)


def targets(features):
    """The tokens that a sample's loss falls on: all labelled ones but the first, which nothing predicts."""
    return [label for label in features["labels"][1:] if label != -100]


def learnt(base, features):
    return base.tokenizer.decode(targets(features))


class TestPlainText:
    def test_every_token_after_the_first_is_a_target_once(self, base, plain):
        text = "abcdefghijklmnopqrstuvwxyz"
        samples = plain.encode([{"text": text}])
        assert "".join(learnt(base, sample) for sample in samples) == text[1:] + "</s>"

    def test_no_sample_is_longer_than_asked(self, plain):
        assert {len(sample["input_ids"]) for sample in plain.encode([{"text": "x" * 30}])} <= set(range(2, 9))

    def test_one_token_is_enough_where_an_end_follows(self, base, plain):
        (sample,) = plain.encode([{"text": "x"}])
        assert learnt(base, sample) == "</s>"

    def test_a_text_without_any_target_is_named(self, base):
        endless = copy.deepcopy(base.tokenizer)
        endless.eos_token = None
        with pytest.raises(DataError, match="row 2: the text is 1 tokens long; expected at least 2"):
            make_task(PLAIN, endless).encode([{"text": "xy"}, {"text": "x"}])

    @pytest.mark.parametrize("row", [{"text": ""}, {"text": None}, {}, {"messages": [QUESTION, ANSWER]}])
    def test_a_row_without_a_text_is_named(self, plain, row):
        with pytest.raises(DataError, match="row 1: expected a text that is not empty under 'text'"):
            plain.encode([row])

    def test_no_rows_are_refused(self, plain):
        with pytest.raises(DataError, match="no rows"):
            plain.encode([])


class TestChat:
    def test_loss_falls_on_the_answer_only(self, base, chat):
        (sample,) = chat.encode([{"messages": [QUESTION, ANSWER]}])
        assert learnt(base, sample) == "That.</s>"

    def test_loss_falls_on_every_answer(self, base, chat):
        again = {"role": "assistant", "content": "This."}
        (sample,) = chat.encode([{"messages": [QUESTION, ANSWER, QUESTION, again]}])
        assert learnt(base, sample) == "That.</s>This.</s>"

    def test_what_follows_the_last_answer_is_left_out(self, chat):
        with_more = chat.encode([{"messages": [QUESTION, ANSWER, QUESTION]}])
        assert with_more == chat.encode([{"messages": [QUESTION, ANSWER]}])

    def test_an_answer_that_quotes_the_question_is_not_confused_with_it(self, base, chat):
        echo = {"role": "assistant", "content": "What?"}
        (sample,) = chat.encode([{"messages": [QUESTION, echo]}])
        assert learnt(base, sample) == "What?</s>"
        assert targets(sample)[0] == sample["input_ids"][-6]

    def test_of_a_long_chat_the_end_is_kept(self, base):
        short = make_task(TaskConfig(name="causal_lm", chat=True, max_length=4), base.tokenizer)
        (sample,) = short.encode([{"messages": [QUESTION, ANSWER]}])
        assert len(sample["input_ids"]) == 4
        assert learnt(base, sample) == "t.</s>"

    def test_a_template_with_generation_markers_marks_answers_itself(self, base):
        marked = copy.deepcopy(base.tokenizer)
        marked.chat_template = (
            "{% for message in messages %}{% if message['role'] == 'assistant' %}"
            "A:{% generation %}{{ message['content'] }}!{% endgeneration %}"
            "{% else %}Q:{{ message['content'] }}{% endif %}{% endfor %}"
        )
        (sample,) = make_task(CHAT, marked).encode([{"messages": [QUESTION, ANSWER]}])
        assert learnt(base, sample) == "That.!"
        assert base.tokenizer.decode(sample["input_ids"]) == "Q:What?A:That.!"

    @pytest.mark.parametrize(
        "messages",
        [None, "hello", [], [3], [{"role": "user"}], [{"role": "user", "content": None}], [{"content": "x"}]],
    )
    def test_malformed_messages_are_named(self, chat, messages):
        with pytest.raises(DataError, match=r"row 1: 'messages' is not a list of {'role': str, 'content': str}"):
            chat.encode([{"messages": messages}])

    @pytest.mark.parametrize("messages", [[QUESTION], [QUESTION, {"role": "assistant", "content": ""}]])
    def test_a_chat_without_an_answer_is_named(self, chat, messages):
        with pytest.raises(DataError, match="row 1: no assistant turn with content to learn from"):
            chat.encode([{"messages": messages}])

    def test_roles_that_the_template_refuses_are_named(self, base):
        strict = copy.deepcopy(base.tokenizer)
        strict.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(DataError, match=r"row 1: the chat template refuses these roles \(roles must alternate\)"):
            make_task(CHAT, strict).encode([{"messages": [QUESTION, ANSWER]}])

    def test_a_template_that_rewrites_earlier_turns_is_refused(self, base):
        rewriting = copy.deepcopy(base.tokenizer)
        rewriting.chat_template = (
            "{{ messages | length }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
        )
        with pytest.raises(ModelError, match="rewrites earlier turns"):
            make_task(CHAT, rewriting).encode([{"messages": [QUESTION, ANSWER]}])

    def test_an_answer_of_which_no_token_is_left_is_named(self, base):
        silent = copy.deepcopy(base.tokenizer)
        silent.chat_template = (
            "{% for message in messages if message['role'] == 'user' %}{{ message['content'] }}{% endfor %}"
        )
        with pytest.raises(DataError, match="row 1: no token of the answer is left"):
            make_task(CHAT, silent).encode([{"messages": [QUESTION, ANSWER]}])

    def test_a_tokenizer_without_a_template_is_refused(self):
        gpt2 = load_base(ModelConfig(source="tiny:gpt2"))
        with pytest.raises(ModelError, match=r"no chat template; set task\.chat=false"):
            make_task(CHAT, gpt2.tokenizer)

    def test_a_slow_tokenizer_is_refused(self):
        class Slow:
            chat_template = "x"
            is_fast = False

        with pytest.raises(ModelError, match="need a fast tokenizer"):
            make_task(CHAT, Slow())


def reference_loss(model, sample):
    """The definition, one sample and one token at a time."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([sample["input_ids"]])).logits[0].double().log_softmax(-1)
    pairs = [(at, label) for at, label in enumerate(sample["labels"][1:]) if label != -100]
    return -sum(logits[at, label].item() for at, label in pairs) / len(pairs), len(pairs)


@pytest.mark.parametrize("task_name", ["plain", "chat"])
def test_the_loss_of_a_sample_is_the_mean_over_its_own_targets(base, request, task_name):
    task = request.getfixturevalue(task_name)
    rows = ROWS if task_name == "plain" else [{"messages": [QUESTION, ANSWER]}, {"messages": [QUESTION, ANSWER] * 3}]
    samples = task.encode(rows)
    losses = task.per_sample_loss(base.model, task.collate(samples))
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx([reference_loss(base.model, one)[0] for one in samples], rel=1e-4)


def test_a_sample_s_loss_does_not_change_when_another_gets_shorter(base, plain):
    one, other = plain.encode([{"text": "abcdef"}])[0], plain.encode([{"text": "zyxwvu"}])[0]
    short = {"input_ids": other["input_ids"][:2], "labels": other["labels"][:2]}
    with_long = plain.per_sample_loss(base.model, plain.collate([one, other]))[0]
    with_short = plain.per_sample_loss(base.model, plain.collate([one, short]))[0]
    torch.testing.assert_close(with_long, with_short)


def test_evaluation_weighs_loss_by_sample_and_perplexity_by_token(base, plain):
    samples = plain.encode(ROWS)
    pairs = [reference_loss(base.model, one) for one in samples]
    found = plain.evaluate(base.model, samples, batch_size=4)
    total = sum(count for _, count in pairs)
    assert found.num_examples == len(samples)
    assert found.loss == pytest.approx(sum(loss for loss, _ in pairs) / len(pairs), rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(sum(a * b for a, b in pairs) / total), rel=1e-4)
    assert found.metrics["num_tokens"] == total


def test_token_accuracy_counts_right_guesses(base, plain):
    samples = plain.encode(ROWS)
    hits = 0
    for one in samples:
        with torch.no_grad():
            guesses = base.model(input_ids=torch.tensor([one["input_ids"]])).logits[0].argmax(-1).tolist()
        hits += sum(guess == label for guess, label in zip(guesses, one["labels"][1:], strict=False))
    found = plain.evaluate(base.model, samples, batch_size=3).metrics
    assert found["token_accuracy"] == hits / found["num_tokens"]


def test_evaluation_does_not_depend_on_order(base, plain):
    samples = plain.encode(ROWS)
    shuffled = [*samples[3:], *samples[:3]][::-1]
    assert plain.evaluate(base.model, samples, batch_size=4) == plain.evaluate(base.model, shuffled, batch_size=4)


def test_no_features_are_refused(base, plain):
    with pytest.raises(DataError, match="no examples to evaluate on"):
        plain.evaluate(base.model, [], batch_size=2)


def test_a_continuation_is_greedy_and_repeats(base, plain):
    first, second = (plain.predict(base.model, [{"text": "once upon"}]) for _ in range(2))
    assert first == second
    assert 0 < first[0].probability <= 1


def test_a_continuation_of_a_chat_answers_the_last_question(base, chat):
    asked = chat.predict(base.model, [{"messages": [QUESTION]}])
    assert asked == chat.predict(base.model, [{"messages": [QUESTION, ANSWER]}])


def test_a_bare_text_is_a_question_to_a_chat(base, chat):
    assert chat.predict(base.model, [{"text": "What?"}]) == chat.predict(base.model, [{"messages": [QUESTION]}])


def test_a_prompt_without_a_text_is_named(base, chat):
    with pytest.raises(DataError, match="row 1"):
        chat.predict(base.model, [{"text": None}])
