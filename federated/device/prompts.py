"""A text or a chat as the tokens to go on from. Needs a transformers tokenizer, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from federated.device.records import Prompt
from federated.errors import DeviceError

__all__ = ["encode_prompt", "plain_chat"]


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Tokens of a prompt.

    A text is encoded with the tokenizer's own special tokens. A chat goes through the tokenizer's template and asks for
    the assistant's turn; without a template it is the text of `plain_chat`.

    Raises:
        DeviceError: if the prompt has no token, is not of this shape, or the template refuses it.
    """
    if not _encodable(prompt):
        raise DeviceError("the prompt holds half of a surrogate pair, which is no character")
    if isinstance(prompt, str):
        ids = tokenizer(prompt, verbose=False)["input_ids"]
    elif tokenizer.chat_template:
        ids = tokenizer(_rendered(tokenizer, _checked(prompt)), add_special_tokens=False, verbose=False)["input_ids"]
    else:
        ids = tokenizer(plain_chat(prompt), verbose=False)["input_ids"]
    if not ids:
        raise DeviceError("the prompt has no token; expected a text or messages that are not empty")
    return list(ids)


def _encodable(prompt: Prompt) -> bool:
    texts = [prompt] if isinstance(prompt, str) else [one["content"] for one in _checked(prompt)]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def plain_chat(messages: Any) -> str:
    r"""A chat for a model that knows no template: a line for each message, and the assistant's that is to be written.

    Raises:
        DeviceError: if the messages are not of this shape.

    >>> plain_chat([{"role": "user", "content": "Hello"}])
    'user: Hello\nassistant:'
    """
    lines = [f"{one['role']}: {one['content']}" for one in _checked(messages)]
    return "\n".join([*lines, "assistant:"])


def _checked(messages: Any) -> list[dict[str, str]]:
    good = isinstance(messages, (list, tuple)) and all(
        isinstance(one, Mapping) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in messages
    )
    if not good or not messages:
        raise DeviceError("messages are not a list of {'role': str, 'content': str} with at least one message")
    return [{"role": one["role"], "content": one["content"]} for one in messages]


def _rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise DeviceError(f"the base model's chat template refuses these messages ({error})") from None
