"""Chats as tokens with the assistant's turns marked: loss falls on answers only.

A template with generation markers says itself what the assistant wrote. Otherwise the chat is rendered turn by turn:
what an assistant's turn adds to the text before it is the answer, and tokens are matched to it by character.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from federated.errors import DataError, ModelError

__all__ = ["check_template", "encode_chat", "render_prompt"]

Message = Mapping[str, str]


def check_template(tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot render chats.

    Raises:
        ModelError: if it has no chat template, or gives no character offsets.
    """
    if not tokenizer.chat_template:
        raise ModelError("the base model's tokenizer has no chat template; set task.chat=false or choose a chat model")
    if not tokenizer.is_fast:
        raise ModelError("chats need a fast tokenizer (tokenizer.json), which the base model does not have")


def encode_chat(tokenizer: Any, messages: Any, number: int) -> tuple[list[int], list[bool]]:
    """Tokens of a chat up to its last answer, and which of them the assistant wrote.

    Args:
        tokenizer: checked by `check_template`.
        messages: ``[{"role": ..., "content": ...}, ...]``.
        number: the row's number, for errors.

    Raises:
        DataError: if the messages are malformed, or hold no answer.
    """
    turns = _until_last_answer(_checked(messages, number), number)
    if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
        made = _template(tokenizer, turns, number, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(made["input_ids"]), [bool(flag) for flag in made["assistant_masks"]]
    text = _template(tokenizer, turns, number, tokenize=False)
    spans = [_span(tokenizer, turns, at, number) for at, turn in enumerate(turns) if turn["role"] == "assistant"]
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    marks = [any(start < to and stop > at for at, to in spans) for start, stop in made["offset_mapping"]]
    return list(made["input_ids"]), marks


def render_prompt(tokenizer: Any, messages: Any, number: int) -> list[int]:
    """Tokens that ask the assistant for the next turn, with a trailing answer (if any) left out.

    Raises:
        DataError: if the messages are malformed.
    """
    turns = list(_checked(messages, number))
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    text = _template(tokenizer, turns, number, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _checked(messages: Any, number: int) -> Sequence[Message]:
    good = isinstance(messages, Sequence) and all(
        isinstance(one, Mapping) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in messages
    )
    if not good or not messages:
        raise DataError(f"row {number}: 'messages' is not a list of {{'role': str, 'content': str}}")
    return list(messages)


def _until_last_answer(turns: Sequence[Message], number: int) -> Sequence[Message]:
    answers = [at for at, turn in enumerate(turns) if turn["role"] == "assistant" and turn["content"]]
    if not answers:
        raise DataError(f"row {number}: no assistant turn with content to learn from")
    return turns[: answers[-1] + 1]


def _span(tokenizer: Any, turns: Sequence[Message], at: int, number: int) -> tuple[int, int]:
    """Where the assistant's turn stands in the rendered text, in characters."""
    whole = _template(tokenizer, turns, number, tokenize=False)
    before = _template(tokenizer, turns[:at], number, tokenize=False, add_generation_prompt=True)
    after = _template(tokenizer, turns[: at + 1], number, tokenize=False)
    if not (whole.startswith(after) and after.startswith(before)):
        raise ModelError(
            "the chat template rewrites earlier turns, so answers cannot be told apart; "
            "use a template with {% generation %} markers or one answer per chat"
        )
    return len(before), len(after)


def _template(tokenizer: Any, turns: Sequence[Message], number: int, **options: Any) -> Any:
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template([dict(turn) for turn in turns], **options)
    except TemplateError as error:
        raise DataError(f"row {number}: the chat template refuses these roles ({error})") from None
